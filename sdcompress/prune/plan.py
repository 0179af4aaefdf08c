"""`BlockPlan`: which blocks of a teacher's UNet stay. Config, weight map and feature pairs are derived from it.

Block-pruned architectures follow BK-SDM (Kim et al., arXiv 2305.15798, section 3.1). They are described by shape and
not by name, so that they apply to any `UNet2DConditionModel` whose levels allow them. Level 0 is the outermost, with
the highest resolution.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from sdcompress_engines.errors import PlanError, SdCompressError, shorten
from sdcompress_engines.json_files import parse_json

from sdcompress.families.family import UNetConfig
from sdcompress.families.unet_blocks import DEPTHS, UP_DEPTHS, UNetBlocks, read_blocks, spread_over_levels
from sdcompress.support.faults import faults_of

# Entries of a UNet config that may hold one value a level, outermost first; up_block_types runs the other way.
_PER_LEVEL = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "cross_attention_dim",
    "only_cross_attention",
)

_LONGEST_NAME = 64
_STRICT = {"strict": True, "extra": "forbid"}  # how pydantic reads the classes from JSON
PLAN_ENTRY = "plan"
"""The entry of a manifest with the plan that a UNet was made with."""
PLAN_HINT = "sdcompress plan TEACHER --preset bk-tiny -o plan.json"


@dataclass(frozen=True)
class LevelPlan:
    """The blocks that stay in one level.

    Attributes:
        down: indices of the resnet–attention pairs that stay in the teacher's down block.
        up: indices of the pairs that stay in its up block; always one more than `down`.
        transformer_blocks: indices of the transformer blocks that stay in each attention, the mid block's included;
            None keeps all (SDXL has up to ten).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    down: tuple[int, ...]
    up: tuple[int, ...]
    transformer_blocks: tuple[int, ...] | None = None

    def select_depth(self, depth: int | Sequence[int], pairs: Sequence[int], attended: bool) -> int | list[int]:
        """Returns the entry of a block's transformer blocks in the student's config.

        Args:
            depth: the teacher's: one number for all pairs, or one a pair.
            pairs: indices of the pairs that stay: `down` or `up`.
            attended: whether the block has attention.
        """
        if self.transformer_blocks is not None:
            return len(self.transformer_blocks)
        if isinstance(depth, int):
            return depth
        # Of a down block without attention, the mid block still takes the first number.
        return [depth[i] for i in pairs] if attended else depth[0]


@dataclass(frozen=True)
class BlockPlan:
    """The removal of blocks from one UNet architecture.

    Attributes:
        name: of the preset, or `custom`.
        teacher: the teacher's UNet config, as diffusers writes it.
        levels: the levels that stay, outermost first; the teacher's other levels are removed.
        mid: whether `mid_block` stays.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: str
    teacher: dict[str, Any]
    levels: tuple[LevelPlan, ...]
    mid: bool

    def __post_init__(self) -> None:
        check_plan(self)

    @cached_property
    def blocks(self) -> UNetBlocks:
        """The teacher's blocks."""
        return read_blocks(self.teacher)

    @property
    def dropped_levels(self) -> int:
        """The number of innermost levels that are removed."""
        return len(self.teacher["block_out_channels"]) - len(self.levels)

    @property
    def removes_nothing(self) -> bool:
        """Whether the student has every block of the teacher."""
        return read_blocks(self.student_config()) == self.blocks

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
        teachers = list(zip(self.levels, self.blocks.levels, strict=False))
        if not isinstance(config.get(DEPTHS, 1), int) or any(v.transformer_blocks is not None for v in self.levels):
            depths = spread_over_levels(self.teacher, DEPTHS, 1)
            config[DEPTHS] = [
                v.select_depth(depth, v.down, any(t.down)) for (v, t), depth in zip(teachers, depths, strict=False)
            ]
        up_depths = explicit_up_depths(self.teacher)
        if up_depths is not None:
            config[UP_DEPTHS] = [
                v.select_depth(depth, v.up, any(t.up))
                for (v, t), depth in zip(reversed(teachers), up_depths[removed:], strict=True)
            ]
        if not self.mid:
            config["mid_block_type"] = None
        return config

    def teacher_key(self, key: str) -> str:
        """Returns the teacher's name of a student's parameter or module.

        For example, `up_blocks.0.resnets.1.x` → `up_blocks.1.resnets.2.x`.
        """
        return self._rename(key, lambda kept, index: kept[index], to_student=False)

    def student_key(self, key: str) -> str | None:
        """Returns the student's name of a teacher's parameter or module; None where the plan removes it."""
        if key.startswith("mid_block.") and not self.mid:
            return None
        try:
            return self._rename(key, lambda kept, index: kept.index(index), to_student=True)
        except ValueError:  # the index is not among those that stay
            return None

    def _rename(self, key: str, move: Callable[[Sequence[int], int], int], *, to_student: bool) -> str:
        """Returns a name with every index in it moved.

        Args:
            key: of a parameter or module.
            move: (the teacher's indices that stay, index) → the index on the other side.
            to_student: whether `key` is the teacher's.
        """
        parts = key.split(".")
        for place, kept in self._indices(parts, to_student):
            parts[place] = str(move(kept, int(parts[place])))
        return ".".join(parts)

    def _indices(self, parts: list[str], to_student: bool) -> Iterator[tuple[int, Sequence[int]]]:
        """Yield the place of each index in a name, and which of the teacher's modules stay there."""
        side, levels = parts[0], len(self.levels)
        if side not in ("down_blocks", "mid_block", "up_blocks"):
            return
        level = self.levels[-1]
        if side != "mid_block" and len(parts) > 1:
            down, given = side == "down_blocks", int(parts[1])
            yield 1, range(levels) if down else range(self.dropped_levels, self.dropped_levels + levels)
            block = given - self.dropped_levels if to_student and not down else given
            level = self.levels[block if down else levels - 1 - block]
            if len(parts) > 3 and parts[2] in ("resnets", "attentions"):
                yield 3, level.down if down else level.up
            elif len(parts) > 3 and parts[2] == "downsamplers" and self.dropped_levels and level is self.levels[-1]:
                yield 3, ()
        if "transformer_blocks" in parts[:-1] and level.transformer_blocks is not None:
            yield parts.index("transformer_blocks") + 1, level.transformer_blocks

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
        last_of_teacher = len(self.blocks.levels[i].down) - 1
        if any(self.blocks.levels[i].down):
            return (
                f"down_blocks.{i}.attentions.{last}.proj_out",
                f"down_blocks.{i}.attentions.{last_of_teacher}.proj_out",
            )
        return f"down_blocks.{i}.resnets.{last}", f"down_blocks.{i}.resnets.{last_of_teacher}"

    def to_json(self) -> str:
        """Returns the text of a `plan.json`."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    def to_content(self) -> dict[str, Any]:
        """Returns the parsed content of a `plan.json`, which manifests hold as their entry `PLAN_ENTRY`."""
        content: dict[str, Any] = json.loads(self.to_json())
        return content

    @classmethod
    def from_json(cls, text: str, where: str | Path = "plan.json") -> BlockPlan:
        """Returns the plan in the text of a `plan.json`.

        Args:
            text: as `to_json` returns it.
            where: the file it comes from, for the message.

        Raises:
            PlanError: the text is no plan, or the plan is illegal.
        """
        return cls.from_content(parse_json(text, where, PlanError), where)

    @classmethod
    def from_content(cls, content: Any, where: str | Path = "plan.json") -> BlockPlan:
        """Returns the plan in the parsed content of a `plan.json`.

        Raises:
            PlanError: the content is no plan, or the plan is illegal.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_json(json.dumps(content))
        except ValidationError as error:
            reason = shorten(faults_of(error, noun="entry"))
        except PlanError as error:
            raise PlanError(error.what, where=where, expected=error.expected, hint=PLAN_HINT) from error
        except SdCompressError as error:
            reason = str(error)
        raise PlanError(f"is not a plan ({reason})", where=where, hint=PLAN_HINT)


def explicit_up_depths(config: UNetConfig) -> list[Any] | None:
    """Returns the entries of the up blocks' transformer blocks, innermost level first.

    Returns None where they are those of the down blocks in reverse. diffusers reads lists of one number a pair from a
    JSON file only where both sides are given.
    """
    given = config.get(UP_DEPTHS)
    if given is not None:
        return list(given)
    depths = spread_over_levels(config, DEPTHS, 1)
    return depths[::-1] if any(isinstance(depth, list | tuple) for depth in depths) else None


def check_plan(plan: BlockPlan) -> None:
    """Check that the student of a plan can be built.

    Raises:
        PlanError: it cannot; the message gives the reason.
        ModelError: the teacher's config is not one of a UNet that can be pruned.
    """
    if not 0 < len(plan.name) <= _LONGEST_NAME or not plan.name.isprintable():
        raise PlanError(f"the name of the plan is {shorten(repr(plan.name), 80)}", expected="a short printable name")
    blocks = plan.blocks
    _check_removed_levels(plan, [level.channels for level in blocks.levels])
    if plan.mid and blocks.mid is None:
        raise PlanError("the plan keeps a mid block, and the UNet has none")
    for i, (level, whole) in enumerate(zip(plan.levels, blocks.levels, strict=False)):
        _check_pairs(level, i, len(whole.down))
        if level.transformer_blocks is not None:
            depths = [whole.down[pair] for pair in level.down] + [whole.up[pair] for pair in level.up]
            if plan.mid and i == len(plan.levels) - 1:
                depths.append(blocks.mid or 0)
            _check_transformer_blocks(level.transformer_blocks, i, [depth for depth in depths if depth > 0])


def _check_removed_levels(plan: BlockPlan, channels: list[int]) -> None:
    kept = len(plan.levels)
    if not 1 <= kept <= len(channels):
        raise PlanError(f"the plan keeps {kept} levels of {len(channels)}", expected="at least one, and no more")
    if kept == len(channels):
        return
    if channels[kept] != channels[kept - 1]:
        raise PlanError(
            f"level {kept} cannot be removed: it has {channels[kept]} channels and its neighbor {channels[kept - 1]},"
            " so the blocks around the gap would not fit",
            expected="equal channels on both sides (SD1.x and SD2.x have them, SDXL does not)",
        )
    if plan.mid:
        raise PlanError("the mid block cannot stay when the innermost level is removed: it needs that level's output")


def _check_pairs(level: LevelPlan, i: int, layers: int) -> None:
    """Check the resnet–attention pairs of level `i`, whose down block has `layers` in the teacher."""
    for side, kept, count in (("down", level.down, layers), ("up", level.up, layers + 1)):
        _check_ascending(kept, count, f"level {i} keeps {side} pairs")
    if len(level.up) != len(level.down) + 1:
        raise PlanError(
            f"level {i} keeps {len(level.down)} down and {len(level.up)} up pairs",
            expected="one more up pair than down pairs: each up pair takes one skip tensor",
        )
    if level.down[0] != 0:
        raise PlanError(f"level {i} does not keep down pair 0, where the channels change")
    if level.up[0] != 0 or level.up[-1] != layers:
        raise PlanError(
            f"level {i} keeps up pairs {list(level.up)}",
            expected=f"the first (0) and the last ({layers}), where the channels change",
        )


def _check_transformer_blocks(kept: tuple[int, ...], i: int, depths: list[int]) -> None:
    """Check the transformer blocks of level `i`, whose attentions that stay have `depths` in the teacher."""
    if not depths:
        raise PlanError(f"level {i} has no attention, so no transformer blocks", expected="null for that level")
    _check_ascending(kept, min(depths), f"level {i} keeps transformer blocks")


def _check_ascending(kept: tuple[int, ...], count: int, what: str) -> None:
    """Refuse indices that are not ascending, of none, or of more than the `count` modules that there are."""
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < count:
        raise PlanError(f"{what} {shorten(list(kept), 80)}", expected=f"ascending indices from 0 to {count - 1}")
