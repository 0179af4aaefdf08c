"""The graph of the UNet in int8 or fp8: calibrated, quantized in a process of its own, and compared with fp32."""
