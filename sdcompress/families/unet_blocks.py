"""The blocks of a UNet, from its diffusers config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdcompress_engines.errors import ModelError, shorten
from sdcompress_engines.signature import MOST_LEVELS

PLAIN, ATTENTION = "DownBlock2D", "CrossAttnDownBlock2D"
_DOWN = {PLAIN: False, ATTENTION: True}
_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
_MID: dict[str | None, bool] = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False, None: False}
_MID_BLOCK = "UNetMidBlock2DCrossAttn"
_OTHER_CONDITIONS = ("encoder_hid_dim_type", "class_embed_type", "num_class_embeds")

DEPTHS, UP_DEPTHS = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
"""The keys of the numbers of transformer blocks: one for all attentions, one a level, or one a pair.

`UP_DEPTHS` begins with the innermost level. Without it the up blocks have the entries of `DEPTHS`.
"""

MOST_PAIRS, MOST_DEPTH, MOST_CHANNELS = 8, 64, 10_240
"""Limits of what is read; the largest published UNets have 3 pairs, 10 transformer blocks, 1,536 channels."""


@dataclass(frozen=True)
class Level:
    """A down block and the up block of the same resolution.

    Attributes:
        channels: of its outputs.
        down: the number of transformer blocks of each resnet–attention pair of the down block; 0 without attention.
        up: the same of the up block, which has one pair more.
    """

    channels: int
    down: tuple[int, ...]
    up: tuple[int, ...]


@dataclass(frozen=True)
class UNetBlocks:
    """What a UNet consists of.

    Attributes:
        levels: outermost first.
        mid: the number of transformer blocks of the mid block: 0 without attention, None without a mid block.
    """

    levels: tuple[Level, ...]
    mid: int | None


def read_blocks(config: Mapping[str, Any]) -> UNetBlocks:
    """Returns the blocks of a UNet as diffusers builds them.

    Raises:
        ModelError: an entry is missing, of another type or out of range, or a block is of another kind.
    """
    channels = config.get("block_out_channels")
    if not channels:
        raise ModelError("the UNet config has no block_out_channels", expected="the config of a UNet2DConditionModel")
    count = len(channels) if isinstance(channels, list | tuple) else 0
    if not 1 <= count <= MOST_LEVELS:
        raise _wrong(config, "block_out_channels", f"a list of 1 to {MOST_LEVELS} numbers of channels")
    for width in channels:
        _check_number(config, "block_out_channels", width, MOST_CHANNELS)
    pairs = spread_over_levels(config, "layers_per_block", 2)
    down_attended = _read_kinds(config, "down_block_types", _DOWN)
    up_attended = _read_kinds(config, "up_block_types", _UP)
    depths = spread_over_levels(config, DEPTHS, 1)
    if not isinstance(config.get(UP_DEPTHS), list | tuple | None):  # diffusers takes no single number here
        raise _wrong(config, UP_DEPTHS, "a list with one entry a level")
    up_depths = depths[::-1] if config.get(UP_DEPTHS) is None else spread_over_levels(config, UP_DEPTHS, 1)
    levels = []
    for i, width in enumerate(channels):
        _check_number(config, "layers_per_block", pairs[i], MOST_PAIRS)
        down = _read_depths(config, DEPTHS, depths[i], pairs[i]) if down_attended[i] else (0,) * pairs[i]
        inner = count - 1 - i
        up_pairs = pairs[i] + 1
        up = _read_depths(config, UP_DEPTHS, up_depths[inner], up_pairs) if up_attended[inner] else (0,) * up_pairs
        levels.append(Level(width, down, up))
    return UNetBlocks(tuple(levels), _read_mid(config, depths[-1]))


def spread_over_levels(config: Mapping[str, Any], key: str, default: Any) -> list[Any]:
    """Returns one value a level of an entry of a UNet config, in the order of the entry.

    Args:
        config: of the UNet.
        key: of the entry, which may hold one value for all levels.
        default: for an entry that is missing.

    Raises:
        ModelError: the entry holds more or fewer values than the UNet has levels.
    """
    value, levels = config.get(key, default), len(config["block_out_channels"])
    if not isinstance(value, list | tuple):
        return [value] * levels
    if len(value) != levels:
        raise _wrong(config, key, f"one value for each of the {levels} levels")
    return list(value)


def _read_kinds(config: Mapping[str, Any], key: str, known: Mapping[str, bool]) -> list[bool]:
    """Returns whether each block has attention."""
    kinds = config.get(key)
    if not isinstance(kinds, list | tuple) or not all(isinstance(kind, str) and kind in known for kind in kinds):
        raise _wrong(config, key, f"a list of {' and '.join(known)}")
    return [known[kind] for kind in spread_over_levels(config, key, None)]


def _read_depths(config: Mapping[str, Any], key: str, entry: Any, pairs: int) -> tuple[int, ...]:
    """Returns the number of transformer blocks of each pair of one block; entries beyond the last pair do not count."""
    if not isinstance(entry, list | tuple):
        entry = [entry] * pairs
    if len(entry) < pairs:
        raise _wrong(config, key, f"{pairs} numbers in the list of a block with {pairs} pairs")
    for depth in entry:
        _check_number(config, key, depth, MOST_DEPTH)
    return tuple(entry[:pairs])


def _read_mid(config: Mapping[str, Any], innermost: Any) -> int | None:
    """Returns `UNetBlocks.mid`: as many transformer blocks as the first pair of the innermost level has.

    Args:
        config: of the UNet.
        innermost: the entry of the innermost level.
    """
    kind = config.get("mid_block_type", _MID_BLOCK)
    if not isinstance(kind, str | None) or kind not in _MID:
        raise _wrong(config, "mid_block_type", f"{', '.join(filter(None, _MID))} or null")
    if kind is None:
        return None
    return _read_depths(config, DEPTHS, innermost, 1)[0] if _MID[kind] else 0


def _check_number(config: Mapping[str, Any], key: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise _wrong(config, key, f"whole numbers from 1 to {most}")


def _wrong(config: Mapping[str, Any], key: str, expected: str) -> ModelError:
    found = f"has {key} {shorten(repr(config[key]), 100)}" if key in config else f"has no {key}"
    return ModelError(f"the UNet config {found}", expected=expected)


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
    return spread_over_levels(config, "layers_per_block", 2)


def transformer_depths(config: Mapping[str, Any]) -> tuple[list[list[int]], list[list[int]], int | None]:
    """Returns the number of transformer blocks of each attention; blocks without attention are left out.

    Returns:
        Of the down blocks, outermost level first; of the up blocks, innermost level first; of the mid block (0 without
        attention, None without a mid block).
    """
    blocks = read_blocks(config)

    def attended(sides: Sequence[tuple[int, ...]]) -> list[list[int]]:
        return [list(depths) for depths in sides if any(depths)]

    return (
        attended([level.down for level in blocks.levels]),
        attended([level.up for level in reversed(blocks.levels)]),
        blocks.mid,
    )
