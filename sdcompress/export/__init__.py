"""A pipeline to ONNX graphs, TensorRT engines and ahead-of-time packages."""
