"""A small decoder in TAESD's own layout, in which ComfyUI (`models/vae_approx`) and the WebUIs (`models/VAE-taesd`)
load one.

Keys and shape are those of `comfy/taesd/taesd.py` (ComfyUI) and `modules/sd_vae_taesd.py` (AUTOMATIC1111, Forge): two
stacks of layers that are numbered, the decoder's from a clamp without weights on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WIDTH, DECODER_BLOCKS, LATENT_CHANNELS = 64, (3, 3, 3, 1), 4
"""The only shape that these programs build."""
_SIDES = ("decoder", "encoder")
_FIRST = {"decoder": 1, "encoder": 0}
"""The number of the first layer that diffusers has too: its decoder clamps outside of its layers."""


def taesd_names(is_xl: bool) -> dict[str, str]:
    """Returns side → stem of the file by which these programs find it.

    Args:
        is_xl: whether it is for SDXL's latents; else SD 1.x's and 2.x's.
    """
    return {side: f"taesd{'xl' if is_xl else ''}_{side}" for side in _SIDES}


def fits_taesd(config: Mapping[str, Any]) -> bool:
    """Returns whether an `AutoencoderTiny` has TAESD's shape, which alone these programs build.

    Args:
        config: diffusers' config of it.
    """
    levels = len(DECODER_BLOCKS)
    shape = {
        "latent_channels": LATENT_CHANNELS,
        "encoder_block_out_channels": [WIDTH] * levels,
        "decoder_block_out_channels": [WIDTH] * levels,
        "num_encoder_blocks": list(reversed(DECODER_BLOCKS)),
        "num_decoder_blocks": list(DECODER_BLOCKS),
        "act_fn": "relu",
        "upsample_fn": "nearest",
    }
    found = {name: list(config[name]) if isinstance(shape[name], list) else config[name] for name in shape}
    return found == shape


def taesd_weights(network: torch.nn.Module, side: str) -> dict[str, torch.Tensor]:
    """Returns the weights of a small decoder or of its encoder by TAESD's keys, such as `3.conv.0.weight`.

    Args:
        network: an `AutoencoderTiny`.
        side: `decoder`, which returns pictures in [0, 1], or `encoder`, which takes them.
    """
    prefix = f"{side}.layers."
    weights = {}
    for key, weight in network.state_dict().items():
        if key.startswith(prefix):
            number, _, rest = key.removeprefix(prefix).partition(".")
            weights[f"{int(number) + _FIRST[side]}.{rest}"] = weight.detach().cpu().contiguous()
    return weights


def write_taesd(network: torch.nn.Module, folder: Path, *, is_xl: bool) -> list[str]:
    """Write decoder and encoder in TAESD's layout; returns the names of the files.

    Each is written twice: as `.safetensors` for ComfyUI, and as `.pth` for the WebUIs, which look for that name. The
    `.pth` has torch's old format, because A1111's check of pickles refuses the members of the new one.

    Args:
        network: an `AutoencoderTiny` for which `fits_taesd` holds.
        folder: a staged folder.
        is_xl: see `taesd_names`.
    """
    written = []
    for side, stem in taesd_names(is_xl).items():
        weights = taesd_weights(network, side)
        save_file(weights, folder / f"{stem}.safetensors")
        torch.save(weights, folder / f"{stem}.pth", _use_new_zipfile_serialization=False)
        written += [f"{stem}.safetensors", f"{stem}.pth"]
    return written
