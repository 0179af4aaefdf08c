"""Random small UNets and plans for property tests, and block removal without `sdcompress`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from hypothesis import strategies as st
from torch import nn

from sdcompress.prune.plan import LevelPlan

GROUPS, CONTEXT = 4, 6
KINDS = (("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"))
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)

Levels = Sequence[LevelPlan]


@st.composite
def unet_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Configs of UNets with 2 to 5 levels of 1 to 3 pairs, in every form that diffusers reads."""
    levels = draw(st.integers(2, 5))

    def one_or_each(values: st.SearchStrategy[Any]) -> Any:
        """One value for all levels, or one a level."""
        return draw(values | st.lists(values, min_size=levels, max_size=levels))

    attended = draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
    attended_up = draw(st.just(attended) | st.lists(st.booleans(), min_size=levels, max_size=levels))
    widths = st.sampled_from([8, 16])
    config = {
        "sample_size": 2**levels,
        "block_out_channels": draw(
            st.lists(widths, min_size=levels, max_size=levels) | widths.map(lambda width: [width] * levels)
        ),
        "down_block_types": [KINDS[kind][0] for kind in attended],
        "up_block_types": [KINDS[kind][1] for kind in attended_up[::-1]],
        "layers_per_block": one_or_each(st.integers(1, 3)),
        "norm_num_groups": GROUPS,
        "attention_head_dim": one_or_each(st.sampled_from([1, 2, 4])),
        "cross_attention_dim": draw(st.sampled_from([CONTEXT, [CONTEXT] * levels])),
        "only_cross_attention": one_or_each(st.booleans()),
        "use_linear_projection": draw(st.booleans()),
        **draw(st.sampled_from([{}, *({"mid_block_type": kind} for kind in MID_BLOCKS)])),
    }
    return config | draw(depths(config))


@st.composite
def depths(draw: st.DrawFn, config: dict[str, Any]) -> dict[str, Any]:
    """The numbers of transformer blocks of a config: one for all, one a level, or one a pair."""
    levels = len(config["block_out_channels"])
    pairs = pair_counts(config)
    numbers = st.integers(1, 3)
    form = draw(st.sampled_from(["default", "one", "levels", "levels, up apart", "pairs"]))
    if form == "default":
        return {}
    if form == "one":
        return {"transformer_layers_per_block": draw(numbers)}
    if form != "pairs":
        each = st.lists(numbers, min_size=levels, max_size=levels)
        apart = {"reverse_transformer_layers_per_block": draw(each)} if form == "levels, up apart" else {}
        return {"transformer_layers_per_block": draw(each), **apart}

    def entry(count: int) -> Any:
        return draw(numbers | st.lists(numbers, min_size=count, max_size=count))

    return {
        "transformer_layers_per_block": [entry(count) for count in pairs],
        "reverse_transformer_layers_per_block": [entry(count + 1) for count in pairs[::-1]],
    }


def pair_counts(config: dict[str, Any]) -> list[int]:
    layers = config["layers_per_block"]
    return list(layers) if isinstance(layers, list) else [layers] * len(config["block_out_channels"])


@st.composite
def keep_lists(draw: st.DrawFn, config: dict[str, Any]) -> tuple[list[LevelPlan], bool]:
    """Legal levels of a plan for this config, and whether the mid block stays; every transformer block stays."""
    channels, pairs = config["block_out_channels"], pair_counts(config)
    kept = draw(st.sampled_from([n for n in range(1, len(channels) + 1) if len(set(channels[n - 1 :])) == 1]))
    levels = []
    for count in pairs[:kept]:
        down = [0, *sorted(draw(st.sets(st.integers(1, count - 1)) if count > 1 else st.just(set())))]
        inner = draw(st.permutations(range(1, count)))[: len(down) - 1]
        levels.append(LevelPlan(tuple(down), (0, *sorted(inner), count)))
    return levels, kept == len(channels) and draw(st.booleans())


@st.composite
def cut_lists(draw: st.DrawFn, teacher: UNet2DConditionModel, levels: Levels, mid: bool) -> list[LevelPlan]:
    """The same levels, some of which keep some of their transformer blocks."""
    blocks: Any = teacher
    result = []
    for i, level in enumerate(levels):
        sides = [(blocks.down_blocks[i], level.down), (blocks.up_blocks[-1 - i], level.up)]
        if mid and blocks.mid_block is not None and i == len(levels) - 1:
            sides.append((blocks.mid_block, (0,)))
        counts = [
            len(block.attentions[pair].transformer_blocks)
            for block, pairs in sides
            if getattr(block, "attentions", None)
            for pair in pairs
        ]
        kept = draw(st.none() | st.sets(st.integers(0, min(counts) - 1), min_size=1)) if counts else None
        result.append(replace(level, transformer_blocks=None if kept is None else tuple(sorted(kept))))
    return result


def build_teacher(config: dict[str, Any], seed: int = 0) -> UNet2DConditionModel:
    """A UNet with random weights, none of them zero or one, so that each shows in the output."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_config(config).eval()
    with torch.no_grad():
        for weight in unet.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return unet


def remove_by_hand(teacher: UNet2DConditionModel, levels: Levels, mid: bool) -> UNet2DConditionModel:
    """A copy of the teacher without the modules that a plan removes."""
    unet: Any = copy.deepcopy(teacher)
    lost = len(unet.down_blocks) - len(levels)
    unet.down_blocks = unet.down_blocks[: len(levels)]
    unet.up_blocks = unet.up_blocks[lost:]
    if lost:
        unet.down_blocks[-1].downsamplers = None
    for level, down, up in zip(levels, unet.down_blocks, reversed(unet.up_blocks), strict=True):
        for block, pairs in ((down, level.down), (up, level.up)):
            for name in ("resnets", "attentions"):
                if getattr(block, name, None) is not None:
                    setattr(block, name, take(getattr(block, name), pairs))
            cut_transformers(block, level)
    if not mid:
        unet.mid_block = None
    elif unet.mid_block is not None:
        cut_transformers(unet.mid_block, levels[-1])
    return unet


def cut_transformers(block: Any, level: LevelPlan) -> None:
    for attention in getattr(block, "attentions", None) or ():
        if level.transformer_blocks is not None:
            attention.transformer_blocks = take(attention.transformer_blocks, level.transformer_blocks)


def take(modules: nn.ModuleList, places: Iterable[int]) -> nn.ModuleList:
    return nn.ModuleList([modules[place] for place in places])


@torch.no_grad()
def predict(unet: UNet2DConditionModel, seed: int = 0) -> torch.Tensor:
    """The UNet's output for one random input of its own size."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = unet.config
    sample = torch.randn(1, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    context = torch.randn(1, 7, CONTEXT, generator=generator)
    prediction: torch.Tensor = unet(sample, 500, context).sample
    return prediction
