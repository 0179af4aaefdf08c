"""The precision in which the VAE encodes pictures.

A cache holds fp16 values. bf16 has 8 bits of mantissa: encoding nano's pictures in it moves the latents by 0.5%
(relative L2; 1.0% for the worst of 256 pictures; bench/studies/encoding.py). The limit is 1%. That is a third of the
noise that the first training timestep adds (SD's schedule begins at sigma 0.029, in units of the latents' spread), and
less than what saving the pictures as JPEG at quality 95 does (2.1%).

SD1's and SD2's VAE are assumed to stay under the limit as nano's does, so CUDA devices that compute bf16 natively use
it. SDXL's VAE has activations so large that fp16 overflows. What bf16 loses there is not measured, so it stays fp32.
Nothing is encoded in fp16. fp32 is torch's own, which on CUDA lets convolutions round their inputs to TF32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from sdcompress_engines.errors import BackendMissing

from sdcompress.families.registry import family_of
from sdcompress.support.pipeline import TextToImagePipeline

Precision = Literal["fp32", "bf16"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_CAPABILITY = (8, 0)
"""Compute capability from which an NVIDIA card has bf16 arithmetic; older cards emulate it."""
_FP32_LAYERS = ("encoder.conv_norm_out.", "encoder.conv_out.", "quant_conv.")


def has_bf16_instructions(device: Any = None) -> bool:
    """Returns whether a GPU has instructions for bfloat16.

    `torch.cuda.is_bf16_supported` is also true where bfloat16 is emulated.
    """
    return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY


def choose_vae_precision(
    pipeline: TextToImagePipeline, device: torch.device, wanted: PrecisionChoice = "auto"
) -> Precision:
    """Returns the precision in which a pipeline's VAE encodes on a device.

    `auto` is bf16 on CUDA devices that have it, for families with `bf16_vae` and for a VAE whose config turns
    `force_upcast` off, which means that it was finetuned for half precision. Otherwise it is fp32. `force_upcast`
    alone does not decide: SD1's config lacks it, and diffusers' default is on.

    Args:
        pipeline: its UNet's config gives the family, its VAE's config `force_upcast`.
        device: where the VAE encodes.
        wanted: what the user chose.

    Raises:
        BackendMissing: bf16 is wanted on a CUDA device that only emulates it.
    """
    native = device.type != "cuda" or has_bf16_instructions(device)
    if wanted == "bf16" and not native:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise BackendMissing(
            f"compute capability {capability} has no bf16",
            where=str(device),
            expected="8.0 or newer",
            hint="--vae-precision fp32",
        )
    if wanted != "auto":
        return wanted
    bf16_safe = family_of(pipeline.unet.config).bf16_vae or not pipeline.vae.config.get("force_upcast", True)
    return "bf16" if device.type == "cuda" and native and bf16_safe else "fp32"


def uses_channels_last(device: torch.device, precision: Precision) -> bool:
    """Returns whether convolutions read channels last: in bf16 on a GPU, as its tensor cores do.

    On a CPU that layout moves fp32 latents by 3e-4, so it is not used there.
    """
    return device.type == "cuda" and precision == "bf16"


def copy_encoder(vae: Any, device: torch.device, precision: Precision) -> Any:
    """Returns a copy of a VAE that only encodes. The VAE itself keeps its weights, device and tiling.

    Weights that need no conversion are shared. In bf16 the layers after the last block stay fp32: they run at an eighth
    of the resolution, and 8 bits of mantissa are too few for the log-variance.

    Args:
        vae: an AutoencoderKL.
        device: of the copy.
        precision: of the copy's weights and activations.
    """

    def convert(name: str, weight: torch.Tensor) -> torch.nn.Parameter:
        dtype = torch.float32 if name.startswith(_FP32_LAYERS) else DTYPES[precision]
        is_nhwc = uses_channels_last(device, precision) and weight.ndim == 4
        layout = torch.channels_last if is_nhwc else torch.preserve_format
        return torch.nn.Parameter(weight.detach().to(device, dtype, memory_format=layout), requires_grad=False)

    memo: dict[int, Any] = {id(part): None for part in (vae.decoder, vae.post_quant_conv)}
    memo |= {
        id(weight): convert(name, weight)
        for name, weight in vae.named_parameters()
        if not name.startswith(("decoder.", "post_quant_conv."))
    }
    copied = copy.deepcopy(vae, memo).eval()
    copied.encoder.conv_norm_out.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return copied
