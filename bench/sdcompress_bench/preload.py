"""The imports that the fork server makes once for all measured processes.

Nothing here computes, because the threads of a pool that was started before the fork do not exist after it.
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
