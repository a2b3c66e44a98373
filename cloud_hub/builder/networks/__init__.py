"""Networks of our own: layers as values, a family of them, training in torch, export to ONNX."""
