"""Reverse-mode differentiation of ONNX graphs, and train steps that the stock onnxruntime runs."""
