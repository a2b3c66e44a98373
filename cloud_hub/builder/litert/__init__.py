"""Writes stages as .tflite files."""
