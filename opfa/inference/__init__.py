"""Answering without training: ONNX export and its check."""
