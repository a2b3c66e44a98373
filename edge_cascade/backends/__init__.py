"""Runtimes behind one port: a stage at a precision in, its features and head out."""
