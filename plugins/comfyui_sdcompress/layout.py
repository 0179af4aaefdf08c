"""Converts diffusers' UNet config to ComfyUI's `unet_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .library import signature


def ldm_layout(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a UNet's blocks as ComfyUI's `unet_config` describes them. With it ComfyUI finds the layers of a LoRA.

    `transformer_depth` lists the input blocks, and `transformer_depth_output` the output blocks from the last to the
    first. `transformer_depth_middle` is -1 without attention there, and -2 without a middle block.

    Args:
        unet: diffusers' config.
    """
    channels = list(unet["block_out_channels"])
    levels = len(channels)
    pairs = _per_level(unet.get("layers_per_block", 2), levels)
    depths = _per_level(unet.get("transformer_layers_per_block") or 1, levels)
    reverse = unet.get("reverse_transformer_layers_per_block") or [_spread(depth, 1)[0] for depth in reversed(depths)]
    down = [
        depth * ("CrossAttn" in kind)
        for kind, depth, count in zip(unet["down_block_types"], depths, pairs, strict=True)
        for depth in _spread(depth, count)
    ]
    up = [
        depth * ("CrossAttn" in kind)
        for kind, depth, count in zip(unet["up_block_types"], reverse, reversed(pairs), strict=True)
        for depth in _spread(depth, count + 1)
    ]
    middle = unet.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    return {
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": pairs,
        "transformer_depth": down,
        "transformer_depth_output": up[::-1],
        "transformer_depth_middle": (
            -2 if middle is None else _spread(depths[-1], 1)[0] if "CrossAttn" in middle else -1
        ),
        "context_dim": signature.context_width(unet),
        "use_linear_in_transformer": bool(unet.get("use_linear_projection")),
        "adm_in_channels": unet.get("projection_class_embeddings_input_dim"),
        "use_temporal_attention": False,
    }


def _per_level(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * levels


def _spread(entry: Any, count: int) -> list[int]:
    return list(entry) if isinstance(entry, (list, tuple)) else [entry] * count
