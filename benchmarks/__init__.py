"""Measurements, each `python -m benchmarks.NAME [--json FILE]`. They print and write; they judge nothing."""
