"""The UNets that backends are proved and timed on, and their inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from sdcompress_engines.manifest import canonical
from sdcompress_engines.signature import CONTEXT_TOKENS

from sdcompress.export.components import Precision, latent_side, random_inputs, signature_of
from sdcompress.models.load import LoadedPipeline, load_pipeline

WHOLE, SMALL = "whole", "small"
"""The model's own UNet, and `small_unet` of it, which compiles in a fraction of the time."""
BATCH = 2
"""Samples of one UNet call: one picture with guidance."""
TIMESTEP = 501


def load_subject(model: str, subject: str) -> LoadedPipeline:
    """Returns the pipeline of a model on the CPU in fp32; for `SMALL`, with `small_unet` in it and its own sha256.

    Args:
        model: what `load_pipeline` takes.
        subject: `WHOLE` or `SMALL`.
    """
    loaded = load_pipeline(model)
    if subject == WHOLE:
        return loaded
    loaded.pipeline.unet = small_unet(loaded.pipeline.unet.config)
    config = dict(loaded.pipeline.unet.config)
    sha256 = hashlib.sha256(canonical({"small UNet of": loaded.sha256, "config": config})).hexdigest()
    return replace(loaded, name=f"a small UNet like {loaded.name}'s", sha256=sha256)


def small_unet(config: Mapping[str, Any]) -> Any:
    """Returns a UNet with the operators of an SD1 or SD2 UNet and few of them.

    It has the two outer levels, one block each, and random weights.

    Args:
        config: of a larger UNet, from diffusers.
    """
    from diffusers import UNet2DConditionModel

    changes: dict[str, Any] = {
        "block_out_channels": list(config["block_out_channels"])[:2],
        "down_block_types": [config["down_block_types"][0], "DownBlock2D"],
        "up_block_types": ["UpBlock2D", config["up_block_types"][-1]],
        "layers_per_block": 1,
        "mid_block_type": None,
    }
    # diffusers ignores what is listed here, so the list must not have what is changed.
    defaults = [name for name in config.get("_use_default_values", ()) if name not in changes]
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(dict(config) | changes | {"_use_default_values": defaults}).eval()
        for weight in unet.parameters():
            if weight.ndim == 1:  # norms and biases are ones and zeros, which would hide a fault in them
                weight.add_(0.1 * torch.randn_like(weight))
    return unet


def unet_inputs(
    unet: Any, precision: Precision, device: torch.device | str, batch: int = BATCH
) -> dict[str, torch.Tensor]:
    """Returns random inputs of a UNet at its own size by canonical name. They are the same for every backend.

    Args:
        unet: in diffusers, or a runner in its place.
        precision: of the inputs.
        device: of the inputs.
        batch: samples.
    """
    side = latent_side(unet.config)
    sizes = {"batch": batch, "height": side, "width": side, "tokens": CONTEXT_TOKENS}
    inputs = random_inputs(signature_of("unet", unet, precision), unet.config, sizes, TIMESTEP)
    return {name: value.to(device) for name, value in inputs.items()}
