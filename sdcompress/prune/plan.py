"""`BlockPlan`: which blocks of a teacher's UNet stay. Config, weight map and feature pairs are derived from it.

Block-pruned architectures follow BK-SDM (Kim et al., arXiv 2305.15798, section 3.1). They are described by shape and
not by name, so that they apply to any `UNet2DConditionModel` whose levels allow them. Level 0 is the outermost, with
the highest resolution.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import PlanError

from sdcompress.families.family import UNetConfig

# Entries of a UNet config that may hold one value a level, outermost first; up_block_types runs the other way.
_PER_LEVEL = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
)

# The number of transformer blocks of each attention: one for all, or one a level, which may be one a pair. The second
# is given where the up blocks differ from the down blocks; it begins with the innermost level.
_DEPTHS, _UP_DEPTHS = "transformer_layers_per_block", "reverse_transformer_layers_per_block"


@dataclass(frozen=True)
class LevelPlan:
    """The blocks that stay in one level.

    Attributes:
        down: indices of the resnet–attention pairs that stay in the teacher's down block.
        up: indices of the pairs that stay in its up block; always one more than `down`.
        transformer_blocks: indices of the transformer blocks that stay in each attention; None keeps all (SDXL has up
            to ten).
    """

    down: tuple[int, ...]
    up: tuple[int, ...]
    transformer_blocks: tuple[int, ...] | None = None

    def select_depth(self, depth: int | Sequence[int], pairs: Sequence[int]) -> int | list[int]:
        """Returns the number of transformer blocks that stay in each attention: one for all, or pair by pair.

        Args:
            depth: the teacher's, in the same form.
            pairs: indices of the pairs that stay: `down` or `up`.
        """
        if self.transformer_blocks is not None:
            return len(self.transformer_blocks)
        return depth if isinstance(depth, int) else [depth[i] for i in pairs]


@dataclass(frozen=True)
class BlockPlan:
    """The removal of blocks from one UNet architecture.

    Attributes:
        name: of the preset, or `custom`.
        teacher: the teacher's UNet config, as diffusers writes it.
        levels: the levels that stay, outermost first; the teacher's other levels are removed.
        mid: whether `mid_block` stays.
    """

    name: str
    teacher: dict[str, Any]
    levels: tuple[LevelPlan, ...]
    mid: bool

    def __post_init__(self) -> None:
        check_plan(self)

    @property
    def dropped_levels(self) -> int:
        """The number of innermost levels that are removed."""
        return len(self.teacher["block_out_channels"]) - len(self.levels)

    def student_config(self) -> dict[str, Any]:
        """Returns the student's UNet config, from which `UNet2DConditionModel.from_config` builds the student."""
        kept, removed = len(self.levels), self.dropped_levels
        config = dict(self.teacher)
        for key in _PER_LEVEL:
            if isinstance(config.get(key), list | tuple):
                config[key] = list(config[key][:kept])
        config["up_block_types"] = list(config["up_block_types"][removed:])
        pairs = [len(level.down) for level in self.levels]
        config["layers_per_block"] = pairs[0] if len(set(pairs)) == 1 else pairs
        if not isinstance(config.get(_DEPTHS, 1), int) or any(v.transformer_blocks is not None for v in self.levels):
            depths = spread_over_levels(self.teacher, _DEPTHS, 1)[:kept]
            config[_DEPTHS] = [v.select_depth(depth, v.down) for v, depth in zip(self.levels, depths, strict=True)]
        if config.get(_UP_DEPTHS) is not None:
            depths = config[_UP_DEPTHS][removed:]
            config[_UP_DEPTHS] = [v.select_depth(n, v.up) for v, n in zip(self.levels[::-1], depths, strict=True)]
        if not self.mid:
            config["mid_block_type"] = None
        return config

    def teacher_key(self, key: str) -> str:
        """Returns the teacher's name of a student's parameter or module.

        For example, `up_blocks.0.resnets.1.x` → `up_blocks.1.resnets.2.x`.
        """
        parts = key.split(".")
        if parts[0] == "mid_block":
            level = self.levels[-1]
        elif parts[0] in ("down_blocks", "up_blocks"):
            block = int(parts[1])
            down = parts[0] == "down_blocks"
            level = self.levels[block if down else len(self.levels) - 1 - block]
            parts[1] = str(block if down else block + self.dropped_levels)
            if len(parts) > 3 and parts[2] in ("resnets", "attentions"):
                parts[3] = str((level.down if down else level.up)[int(parts[3])])
        else:
            return key
        if "transformer_blocks" in parts and level.transformer_blocks is not None:
            place = parts.index("transformer_blocks") + 1
            if place < len(parts):
                parts[place] = str(level.transformer_blocks[int(parts[place])])
        return ".".join(parts)

    def feature_pairs(self, choice: str = "blocks") -> list[tuple[str, str]]:
        """Returns pairs (student module, teacher module) whose outputs have equal shapes, from input to output.

        They are block outputs (BK-SDM, equation 3). A down block that has lost its downsampler is compared before it,
        at the output projection of the last attention, as the paper does for its tiny model.

        Args:
            choice: `blocks` takes all. `bk-sdm` leaves the mid block out, as the paper's code does. `segmind` compares
                a last down block that has lost its downsampler with the input of the teacher's up block of this level,
                as Segmind's code does.
        """
        pairs = [self._down_feature_pair(i, choice) for i in range(len(self.levels))]
        if self.mid and choice != "bk-sdm":
            pairs.append(("mid_block", "mid_block"))
        pairs += [(f"up_blocks.{i}", f"up_blocks.{i + self.dropped_levels}") for i in range(len(self.levels))]
        return pairs

    def _down_feature_pair(self, i: int, choice: str) -> tuple[str, str]:
        lost_downsampler = self.dropped_levels > 0 and i == len(self.levels) - 1
        if not lost_downsampler:
            return f"down_blocks.{i}", f"down_blocks.{i}"
        if choice == "segmind":
            return f"down_blocks.{i}", f"up_blocks.{self.dropped_levels - 1}"
        # On the teacher's side it is the end of the block, whether or not the student keeps that pair.
        last = len(self.levels[i].down) - 1
        last_of_teacher = spread_over_levels(self.teacher, "layers_per_block", 2)[i] - 1
        if "CrossAttn" in self.teacher["down_block_types"][i]:
            return (
                f"down_blocks.{i}.attentions.{last}.proj_out",
                f"down_blocks.{i}.attentions.{last_of_teacher}.proj_out",
            )
        return f"down_blocks.{i}.resnets.{last}", f"down_blocks.{i}.resnets.{last_of_teacher}"

    def to_json(self) -> str:
        """Returns the text of a `plan.json`."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str | Path = "plan.json") -> BlockPlan:
        """Returns the plan in the text of a `plan.json`.

        Args:
            text: as `to_json` returns it.
            where: the file it comes from, for the message.

        Raises:
            PlanError: the text is no plan, or the plan is illegal.
        """
        try:
            raw = json.loads(text)
            levels = tuple(
                LevelPlan(
                    tuple(v["down"]),
                    tuple(v["up"]),
                    None if v["transformer_blocks"] is None else tuple(v["transformer_blocks"]),
                )
                for v in raw["levels"]
            )
            return cls(name=raw["name"], teacher=raw["teacher"], levels=levels, mid=raw["mid"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise PlanError(
                f"is not a plan ({error})", where=where, hint="sdcompress plan TEACHER --preset bk-tiny -o plan.json"
            ) from error


def spread_over_levels(config: UNetConfig, key: str, default: Any) -> list[Any]:
    """Returns one value a level of an entry of a UNet config, outermost level first.

    Args:
        config: of the UNet.
        key: of the entry, which may hold one value for all levels.
        default: for an entry that is missing or None.
    """
    value = config.get(key)
    value = default if value is None else value
    return list(value) if isinstance(value, list | tuple) else [value] * len(config["block_out_channels"])


def check_plan(plan: BlockPlan) -> None:
    """Check that the student of a plan can be built.

    Raises:
        PlanError: it cannot; the message gives the reason.
    """
    channels = plan.teacher.get("block_out_channels")
    if not channels:
        raise PlanError("the UNet config has no block_out_channels", expected="the config of a UNet2DConditionModel")
    _check_removed_levels(plan, list(channels))
    layers = spread_over_levels(plan.teacher, "layers_per_block", 2)
    depths = spread_over_levels(plan.teacher, _DEPTHS, 1)
    reverse = plan.teacher.get(_UP_DEPTHS)
    up_depths = depths if reverse is None else list(reversed(reverse))
    for i, level in enumerate(plan.levels):
        _check_pairs(level, i, layers[i])
        if level.transformer_blocks is not None:
            _check_transformer_blocks(level.transformer_blocks, i, (depths[i], up_depths[i]))


def _check_removed_levels(plan: BlockPlan, channels: list[int]) -> None:
    if not 1 <= len(plan.levels) <= len(channels):
        raise PlanError(f"the plan keeps {len(plan.levels)} levels of {len(channels)}")
    for i in range(len(plan.levels), len(channels)):
        if channels[i] != channels[i - 1]:
            raise PlanError(
                f"level {i} cannot be removed: it has {channels[i]} channels and its neighbor {channels[i - 1]}, so the"
                " blocks around the gap would not fit",
                expected="equal channels on both sides (SD1.x and SD2.x have them, SDXL does not)",
                hint="a preset that keeps every level: bk-base or bk-small",
            )
    if plan.mid and len(plan.levels) < len(channels):
        raise PlanError("the mid block cannot stay when the innermost level is removed: it needs that level's output")


def _check_pairs(level: LevelPlan, i: int, layers: int) -> None:
    """Check the resnet–attention pairs of level `i`, whose down block has `layers` in the teacher."""
    if len(level.up) != len(level.down) + 1:
        raise PlanError(
            f"level {i} keeps {len(level.down)} down and {len(level.up)} up pairs",
            expected="one more up pair than down pairs: each up pair takes one skip tensor",
        )
    for side, kept, count in (("down", level.down, layers), ("up", level.up, layers + 1)):
        if list(kept) != sorted(set(kept)) or not set(kept) <= set(range(count)):
            raise PlanError(f"level {i} keeps {side} pairs {list(kept)}", expected=f"ascending indices below {count}")
    if level.down[:1] != (0,):
        raise PlanError(f"level {i} does not keep down pair 0, where the channels change")
    if level.up[0] != 0 or level.up[-1] != layers:
        raise PlanError(
            f"level {i} keeps up pairs {list(level.up)}",
            expected=f"the first (0) and the last ({layers}), where the channels change",
        )


def _check_transformer_blocks(kept: tuple[int, ...], i: int, depths: tuple[Any, Any]) -> None:
    """Check the transformer blocks of level `i`, whose attentions have `depths` (down, up) in the teacher."""
    if not all(isinstance(depth, int) for depth in depths):
        raise PlanError(f"level {i} has pairs of different numbers of transformer blocks; all of them must stay")
    if not kept or not set(kept) <= set(range(min(depths))):
        raise PlanError(
            f"level {i} keeps transformer blocks {list(kept)}",
            expected=f"some of 0 to {min(depths) - 1}",
        )
