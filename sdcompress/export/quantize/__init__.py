"""The UNet's graph in int8 or fp8: calibrated, quantized in a process of its own, and checked."""
