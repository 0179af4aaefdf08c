"""What a UNet costs: parameters and multiply–accumulates, counted without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sdcompress_engines.errors import ModelError, shorten
from sdcompress_engines.signature import context_width

from sdcompress.prune.student import meta_unet

if TYPE_CHECKING:
    from torch import nn

_TOKENS = 77
_TIME_IDS = 6  # SDXL's original size, crop and target size


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply–accumulates of one forward pass at batch 1."""

    parameters: int
    macs: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs)


def count_parameters(module: nn.Module) -> int:
    """Returns the number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


def count_unet_parameters(config: Mapping[str, Any]) -> int:
    """Returns the number of parameters of a UNet of this config; entries that start with `_` are ignored.

    Raises:
        ModelError: diffusers cannot build a UNet of this config.
    """
    return count_parameters(meta_unet({key: value for key, value in config.items() if not key.startswith("_")}))


def unet_cost(config: Mapping[str, Any]) -> dict[str, Cost]:
    """Returns the cost of each top-level part (`down_blocks.0`, `mid_block`, `rest`, ...) and of the `total`.

    MACs are counted on the meta device by torch's FLOP counter, in one forward pass at the UNet's own sample size with
    77 tokens.

    Raises:
        ModelError: diffusers cannot build a UNet of this config, or it takes other inputs than latents, a timestep,
            text and SDXL's sizes.
    """
    from torch.utils.flop_counter import FlopCounterMode

    unet = meta_unet(config).eval()
    try:
        with FlopCounterMode(display=False, depth=3) as counter, torch.no_grad():
            unet(**_meta_inputs(unet.config))
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ModelError(
            f"the UNet does not run on latents, a timestep and text alone ({shorten(error, 200)})",
            expected="a UNet of Stable Diffusion",
        ) from error
    flops = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    total = Cost(count_parameters(unet), flops["Global"] // 2)
    names = (
        [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
        + (["mid_block"] if unet.mid_block is not None else [])
        + [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]
    )
    parts = {
        name: Cost(count_parameters(unet.get_submodule(name)), flops.get(f"{type(unet).__name__}.{name}", 0) // 2)
        for name in names
    }
    named = sum(parts.values(), Cost(0, 0))
    return parts | {"rest": Cost(total.parameters - named.parameters, total.macs - named.macs), "total": total}


def _meta_inputs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of one forward pass at batch 1, on the meta device."""
    size = config.get("sample_size") or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    inputs: dict[str, Any] = {
        "sample": torch.empty(1, config["in_channels"], height, width, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, _TOKENS, context_width(config), device="meta"),
    }
    if config.get("addition_embed_type") == "text_time":
        text_width = config["projection_class_embeddings_input_dim"] - _TIME_IDS * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, text_width, device="meta"),
            "time_ids": torch.empty(1, _TIME_IDS, device="meta"),
        }
    return inputs
