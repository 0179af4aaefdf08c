"""Bounds of the numbers that a person can ask for, shared by recipes, suites and the command line."""

from __future__ import annotations

LEAST_PX, MOST_PX, STEP_PX = 64, 8192, 8
"""Sides of pictures; a VAE makes one latent of 8 pixels."""
MOST_STEPS = 1000
"""Denoising steps: the noise schedules have 1000 timesteps."""
MOST_TRAINING_STEPS = 10**9
MOST_FEW_STEPS = 20
"""Denoising steps that a model is trained for, in few-step training."""
MOST_BATCH = 2**16
MOST_PICTURES = 10**8
MOST_GUIDANCE = 100.0
MOST_SEED = 2**62 - 1
"""Seeds of pictures are counted up from one, and stay in the 64 bits of torch and of JSON's readers."""
MOST_THREADS = 4096
LEAST_OPSET, MOST_OPSET = 18, 23
"""ONNX opsets that torch's exporter writes its graphs in."""
MOST_DECODER_WIDTH, MOST_DECODER_BLOCKS = 1024, 64
