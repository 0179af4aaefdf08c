"""Converts diffusers' UNet config to ComfyUI's `unet_config`, and to the names and shapes of the UNet's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .library import signature

Shapes = Iterator[tuple[str, tuple[int, ...]]]
_MOST_LEVELS, _MOST_PAIRS, _MOST_DEPTH, _MOST_WIDTH = 8, 16, 64, 2**16
"""Limits far above those of every published UNet, because a config may come from anyone."""


def ldm_layout(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a UNet's blocks as ComfyUI's `unet_config` describes them. With it ComfyUI finds the layers of a LoRA.

    `transformer_depth` lists the input blocks, and `transformer_depth_output` the output blocks from the last to the
    first. `transformer_depth_middle` is -1 without attention there, and -2 without a middle block.

    Args:
        unet: diffusers' config.

    Raises:
        TypeError, ValueError, LookupError: the config is not one of a UNet, or has sizes that no UNet has.
    """
    channels = list(unet["block_out_channels"])
    levels = len(channels)
    pairs = _per_level(unet.get("layers_per_block", 2), levels)
    _check_sizes("block_out_channels", channels, _MOST_LEVELS, _MOST_WIDTH)
    _check_sizes("layers_per_block", pairs, _MOST_LEVELS, _MOST_PAIRS)
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
    for name, found, count in (("down", down, sum(pairs)), ("up", up, sum(pairs) + levels)):
        _check_sizes(f"transformer blocks of the {name} blocks", found, count, _MOST_DEPTH, least=0)
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


def parameter_shapes(unet: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns LDM name → shape of a UNet's parameters, without `model.diffusion_model.`.

    Args:
        unet: diffusers' config.

    Raises:
        TypeError, ValueError, LookupError: as `ldm_layout`.
    """
    layout, widths = ldm_layout(unet), list(unet["block_out_channels"])
    shapes = _Shapes(4 * widths[0], layout["context_dim"], layout["use_linear_in_transformer"])
    inputs, skips = _input_blocks(shapes, layout, widths)
    found = dict(_outside_blocks(layout, widths[0]))
    found.update(inputs)
    if layout["transformer_depth_middle"] != -2:
        found.update(shapes.resnet("middle_block.0", widths[-1], widths[-1]))
        found.update(shapes.attention("middle_block.1", widths[-1], max(layout["transformer_depth_middle"], 0)))
        found.update(shapes.resnet("middle_block.2", widths[-1], widths[-1]))
    found.update(_output_blocks(shapes, layout, widths, skips))
    return found


class _Shapes:
    """The shapes of the modules in a UNet's blocks.

    Args:
        time: width of the embedded timestep.
        context: width of the text embeddings.
        linear: whether attentions are entered and left by linear layers, not by 1×1 convolutions.
    """

    def __init__(self, time: int, context: int, linear: bool) -> None:
        self._time, self._context, self._kernel = time, context, () if linear else (1, 1)

    def resnet(self, place: str, inputs: int, width: int) -> Shapes:
        """Yields name → shape of a resnet."""
        yield from _layer(f"{place}.in_layers.0", inputs)
        yield from _layer(f"{place}.in_layers.2", width, inputs, 3, 3)
        yield from _layer(f"{place}.emb_layers.1", width, self._time)
        yield from _layer(f"{place}.out_layers.0", width)
        yield from _layer(f"{place}.out_layers.3", width, width, 3, 3)
        if inputs != width:
            yield from _layer(f"{place}.skip_connection", width, inputs, 1, 1)

    def attention(self, place: str, width: int, depth: int) -> Shapes:
        """Yields name → shape of an attention with `depth` transformer blocks; nothing where that is 0."""
        if not depth:
            return
        yield from _layer(f"{place}.norm", width)
        yield from _layer(f"{place}.proj_in", width, width, *self._kernel)
        for index in range(depth):
            block = f"{place}.transformer_blocks.{index}"
            for name, source in (("attn1", width), ("attn2", self._context)):
                yield f"{block}.{name}.to_q.weight", (width, width)
                yield f"{block}.{name}.to_k.weight", (width, source)
                yield f"{block}.{name}.to_v.weight", (width, source)
                yield from _layer(f"{block}.{name}.to_out.0", width, width)
            yield from _layer(f"{block}.ff.net.0.proj", 8 * width, width)
            yield from _layer(f"{block}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                yield from _layer(f"{block}.{norm}", width)
        yield from _layer(f"{place}.proj_out", width, width, *self._kernel)


def _outside_blocks(layout: Mapping[str, Any], width: int) -> Shapes:
    time = 4 * width
    yield from _layer("time_embed.0", time, width)
    yield from _layer("time_embed.2", time, time)
    if layout["adm_in_channels"]:
        yield from _layer("label_emb.0.0", time, layout["adm_in_channels"])
        yield from _layer("label_emb.0.2", time, time)
    yield from _layer("input_blocks.0.0", width, layout["in_channels"], 3, 3)
    yield from _layer("out.0", width)
    yield from _layer("out.2", layout["out_channels"], width, 3, 3)


def _input_blocks(
    shapes: _Shapes, layout: Mapping[str, Any], widths: list[int]
) -> tuple[dict[str, tuple[int, ...]], list[int]]:
    """Returns name → shape of the input blocks but the first, and the widths of the tensors that they pass on."""
    found: dict[str, tuple[int, ...]] = {}
    depths, skips, number = iter(layout["transformer_depth"]), [widths[0]], 1
    for level, (width, count) in enumerate(zip(widths, layout["num_res_blocks"], strict=True)):
        for _ in range(count):
            found.update(shapes.resnet(f"input_blocks.{number}.0", skips[-1], width))
            found.update(shapes.attention(f"input_blocks.{number}.1", width, next(depths)))
            skips.append(width)
            number += 1
        if level < len(widths) - 1:
            found.update(_layer(f"input_blocks.{number}.0.op", width, width, 3, 3))
            skips.append(width)
            number += 1
    return found, skips


def _output_blocks(shapes: _Shapes, layout: Mapping[str, Any], widths: list[int], skips: list[int]) -> Shapes:
    depths, before, number = list(layout["transformer_depth_output"]), widths[-1], 0
    for width, count in zip(reversed(widths), reversed(layout["num_res_blocks"]), strict=True):
        depth = 0
        for _ in range(count + 1):
            yield from shapes.resnet(f"output_blocks.{number}.0", before + skips.pop(), width)
            depth = depths.pop()
            yield from shapes.attention(f"output_blocks.{number}.1", width, depth)
            before, number = width, number + 1
        if skips:  # the last level has no upsampler
            yield from _layer(f"output_blocks.{number - 1}.{2 if depth else 1}.conv", width, width, 3, 3)


def _layer(place: str, *shape: int) -> Shapes:
    """Yields the weight and the bias of a layer or of a norm."""
    yield f"{place}.weight", shape
    yield f"{place}.bias", shape[:1]


def _check_sizes(name: str, sizes: list[Any], most: int, largest: int, *, least: int = 1) -> None:
    """Raises a ValueError if there are no sizes, more than `most`, or one that is not from `least` to `largest`."""
    if not 0 < len(sizes) <= most or not all(type(size) is int and least <= size <= largest for size in sizes):
        raise ValueError(f"{name} are {str(sizes)[:60]}")


def _per_level(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * levels


def _spread(entry: Any, count: int) -> list[int]:
    return list(entry) if isinstance(entry, (list, tuple)) else [entry] * count
