"""A UNet's weights beside its engine, under LDM's names, which the WebUIs' LoRAs and `torch_unet` use."""

from __future__ import annotations

from pathlib import Path

import torch
from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.ldm_keys import UNET_PREFIX, ldm_unet_keys
from sdcompress_engines.safetensors_file import read_tensors

PLACES = (
    "pipeline/unet/diffusion_pytorch_model.safetensors",
    "pipeline/unet/diffusion_pytorch_model.fp16.safetensors",
    "student.safetensors",
)
"""Where weights may lie in an engine's folder: a UNet as diffusers writes it, or an LDM file of `export --ldm`."""


def find_weights(folder: Path) -> Path | None:
    """Returns the file with the UNet's weights, or None."""
    return next((folder / place for place in PLACES if (folder / place).is_file()), None)


def read_unet(path: Path) -> dict[str, torch.Tensor]:
    """Returns LDM name, without its prefix → tensor, on the CPU and in the file's dtype.

    Raises:
        ArtifactError: the file is cut or damaged, or holds no UNet.
    """
    tensors = read_tensors(path)
    if any(name.startswith(UNET_PREFIX) for name in tensors):
        return {
            name.removeprefix(UNET_PREFIX): value for name, value in tensors.items() if name.startswith(UNET_PREFIX)
        }
    if "input_blocks.0.0.weight" in tensors:
        return tensors
    names = ldm_unet_keys(tensors)
    if None in names.values() or "conv_in.weight" not in tensors:
        unknown = next((key for key, name in names.items() if name is None), "conv_in.weight")
        raise ArtifactError(
            f"holds no weights of a UNet ({unknown})", where=path, expected="a UNet under diffusers' or LDM's names"
        )
    return {names[key] or key: value for key, value in tensors.items()}
