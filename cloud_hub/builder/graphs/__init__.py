"""ONNX graphs: a user's file taken in, exits attached, quantised, cut into stages."""
