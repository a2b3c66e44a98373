"""From a trained network to a bundle: exits, quantisation, cutting, calibration, ONNX."""
