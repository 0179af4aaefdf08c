"""The shapes of a UNet's LDM weights → its diffusers config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


def derive_config_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """Returns the entries of a UNet's diffusers config that its weights' shapes determine.

    In the LDM layout, every entry of a level is one resnet–attention pair, and a sampler ends the level. The head
    count and the sample size leave no trace in the shapes, and are not part of the result.

    Args:
        shapes: LDM key, without the `model.diffusion_model.` prefix, → shape.

    Raises:
        KeyError, IndexError, StopIteration: a weight of Stable Diffusion's UNet is missing.
        ValueError: the UNet has not as many down as up blocks.
    """
    channels, down = _read_down_blocks(shapes)
    up = _read_up_blocks(shapes)
    if len(down) != len(up):
        raise ValueError(f"{len(down)} levels down and {len(up)} up: a sampler")
    pairs = [len(level) for level in down]
    config: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": pairs[0] if len(set(pairs)) == 1 else pairs,
        "down_block_types": ["CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in down],
        "up_block_types": ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in up],
        "mid_block_type": _derive_mid_block_type(shapes),
        "cross_attention_dim": next(
            shape[1] for key, shape in shapes.items() if key.endswith("transformer_blocks.0.attn2.to_k.weight")
        ),
        "use_linear_projection": (
            next(len(shape) for key, shape in shapes.items() if key.endswith(".1.proj_in.weight")) == 2
        ),
    }
    down_depths, up_depths = ([_merge_depths(level) for level in side] for side in (down, up))
    config["transformer_layers_per_block"] = 1 if all(depth == 1 for depth in down_depths) else down_depths
    if up_depths != down_depths[::-1]:
        config["reverse_transformer_layers_per_block"] = up_depths
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return config


def _read_down_blocks(shapes: Shapes) -> tuple[list[int], list[list[int]]]:
    """Returns the channels of each level, and its number of transformer blocks pair by pair; outermost level first."""
    channels: list[int] = []
    levels: list[list[int]] = [[]]
    for i in range(1, _count_entries(shapes, "input_blocks")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
        else:
            channels[len(levels) - 1 :] = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0]]
            levels[-1].append(_count_transformer_blocks(shapes, f"input_blocks.{i}.1"))
    return channels, levels


def _read_up_blocks(shapes: Shapes) -> list[list[int]]:
    """Returns the number of transformer blocks of each level pair by pair, innermost level first."""
    levels: list[list[int]] = [[]]
    for i in range(_count_entries(shapes, "output_blocks")):
        levels[-1].append(_count_transformer_blocks(shapes, f"output_blocks.{i}.1"))
        if any(f"output_blocks.{i}.{j}.conv.weight" in shapes for j in (1, 2)):
            levels.append([])
    return levels


def _derive_mid_block_type(shapes: Shapes) -> str | None:
    if _count_transformer_blocks(shapes, "middle_block.1"):
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if _count_entries(shapes, "middle_block") else None


def _count_entries(shapes: Shapes, side: str) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{side}.")})


def _count_transformer_blocks(shapes: Shapes, attention: str) -> int:
    place = len(attention.split(".")) + 1
    return len({key.split(".")[place] for key in shapes if key.startswith(f"{attention}.transformer_blocks.")})


def _merge_depths(level: list[int]) -> int | list[int]:
    """Returns a level's numbers of transformer blocks as diffusers writes them.

    Equal numbers become one, and a level without attention counts as 1.
    """
    return max(level[0], 1) if len(set(level)) == 1 else level
