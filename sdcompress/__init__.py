"""sdcompress: Stable Diffusion teacher → small student → ONNX → TensorRT engine."""
