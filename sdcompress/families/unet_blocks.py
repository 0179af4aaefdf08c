"""The blocks of a UNet, from its diffusers config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN, ATTENTION = "DownBlock2D", "CrossAttnDownBlock2D"
_MID_BLOCK = "UNetMidBlock2DCrossAttn"
_OTHER_CONDITIONS = ("encoder_hid_dim_type", "class_embed_type", "num_class_embeds")


def has_plain_conditioning(config: Mapping[str, Any]) -> bool:
    """Returns whether the UNet takes text by cross-attention.

    It then has only known down blocks, and no other inputs than SDXL's.
    """
    return (
        all(config.get(key) is None for key in _OTHER_CONDITIONS)
        and set(config.get("down_block_types", [""])) <= {PLAIN, ATTENTION}
        and bool(config.get("cross_attention_dim"))
    )


def has_mid_block(config: Mapping[str, Any]) -> bool:
    """Returns whether the UNet has a mid block."""
    return config.get("mid_block_type", _MID_BLOCK) is not None


def resnet_pairs(config: Mapping[str, Any]) -> list[int]:
    """Returns the number of resnet–attention pairs of each down block, outermost first."""
    layers = config.get("layers_per_block", 2)
    return list(layers) if isinstance(layers, list | tuple) else [layers] * len(config["block_out_channels"])


def transformer_depths(config: Mapping[str, Any]) -> tuple[list[list[int]], list[list[int]], int | None]:
    """Returns the number of transformer blocks of each attention; levels without attention are left out.

    Returns:
        Of the down blocks, outermost level first; of the up blocks, innermost level first; of the mid block (0 without
        attention, None without a mid block).
    """
    pairs, levels = resnet_pairs(config), len(config["block_out_channels"])
    layers = config.get("transformer_layers_per_block", 1)
    down = list(layers) if isinstance(layers, list | tuple) else [layers] * levels
    reverse = config.get("reverse_transformer_layers_per_block")
    up = (
        list(reverse)
        if reverse is not None
        else [entry[0] if isinstance(entry, list | tuple) else entry for entry in reversed(down)]
    )

    def spread(entry: Any, count: int) -> list[int]:
        return list(entry) if isinstance(entry, list | tuple) else [entry] * count

    attention_levels = [i for i, kind in enumerate(config["down_block_types"]) if kind == ATTENTION]
    mid_block = config.get("mid_block_type", _MID_BLOCK)
    last = spread(down[-1], 1)[0]
    mid = None if mid_block is None else last if mid_block == _MID_BLOCK else 0
    return (
        [spread(down[i], pairs[i]) for i in attention_levels],
        [spread(up[levels - 1 - i], pairs[i] + 1) for i in reversed(attention_levels)],
        mid,
    )
