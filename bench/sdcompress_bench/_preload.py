"""What the fork server imports once for every measured process.

Nothing here computes: a thread pool started before the fork would be dead after it.
"""

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

import sdcompress.backends.assemble
import sdcompress.sampling

__all__ = [
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTokenizer",
    "DDIMScheduler",
    "StableDiffusionPipeline",
    "UNet2DConditionModel",
    "diffusers",
    "sdcompress",
    "torch",
    "transformers",
]
