"""Which blocks of a teacher's UNet stay: one object, from which config, weight map and feature pairs are derived.

Block-removed architectures follow BK-SDM (Kim et al., arXiv 2305.15798, section 3.1), told here by shape and not by
name, so that they hold for any `UNet2DConditionModel` whose levels allow them. Level 0 is the outermost (highest
resolution).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import PlanError, UsageError

UNetConfig = Mapping[str, Any]


@dataclass(frozen=True)
class LevelPlan:
    """What stays of one level.

    Attributes:
        down: indices of the resnet–attention pairs of the teacher's down block that stay.
        up: indices of the pairs of its up block that stay; always one more than `down`.
        transformer_blocks: indices of the transformer blocks that stay in each attention; None keeps all (SDXL has up
            to ten).
    """

    down: tuple[int, ...]
    up: tuple[int, ...]
    transformer_blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Preset:
    """A published block-removal rule: whether the mid block stays and how many innermost levels go."""

    summary: str
    mid: bool
    dropped_levels: int


PRESETS = {
    "bk-base": Preset("one pair a level instead of two", mid=True, dropped_levels=0),
    "bk-small": Preset("bk-base without the mid block", mid=False, dropped_levels=0),
    "bk-tiny": Preset("bk-small without the innermost level", mid=False, dropped_levels=1),
}
ALIASES = {"sd-small": "bk-base", "sd-tiny": "bk-tiny"}


@dataclass(frozen=True)
class BlockPlan:
    """The removal of blocks from one UNet architecture.

    Attributes:
        name: the preset's name, or `custom`.
        teacher: the teacher's UNet config, as diffusers writes it.
        levels: the levels that stay, outermost first; the teacher's others are gone.
        mid: whether `mid_block` stays.
    """

    name: str
    teacher: dict[str, Any]
    levels: tuple[LevelPlan, ...]
    mid: bool

    def __post_init__(self) -> None:
        _check(self)

    @property
    def dropped_levels(self) -> int:
        return len(self.teacher["block_out_channels"]) - len(self.levels)

    def student_config(self) -> dict[str, Any]:
        """The student's UNet config: what `UNet2DConditionModel.from_config` builds the student from."""
        kept = len(self.levels)
        config = dict(self.teacher)
        total = len(config["block_out_channels"])
        # Everything a config may give level by level, outermost first; up_block_types runs the other way.
        for key in (
            "block_out_channels",
            "down_block_types",
            "attention_head_dim",
            "num_attention_heads",
            "cross_attention_dim",
            "only_cross_attention",
            "transformer_layers_per_block",
        ):
            if isinstance(config.get(key), list | tuple):
                config[key] = list(config[key][:kept])
        config["up_block_types"] = list(config["up_block_types"][total - kept :])
        reverse = config.get("reverse_transformer_layers_per_block")
        if reverse is not None:
            config["reverse_transformer_layers_per_block"] = list(reverse[total - kept :])
        pairs = [len(level.down) for level in self.levels]
        config["layers_per_block"] = pairs[0] if len(set(pairs)) == 1 else pairs
        if any(level.transformer_blocks is not None for level in self.levels):
            have = _per_level(self.teacher, "transformer_layers_per_block", 1)
            config["transformer_layers_per_block"] = [
                have[i] if level.transformer_blocks is None else len(level.transformer_blocks)
                for i, level in enumerate(self.levels)
            ]
        if not self.mid:
            config["mid_block_type"] = None
        return config

    def teacher_key(self, key: str) -> str:
        """The teacher's name of a student's parameter or module: `up_blocks.0.resnets.1.x` → `up_blocks.1.resnets.2.x`."""
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
            where = parts.index("transformer_blocks") + 1
            if where < len(parts):
                parts[where] = str(level.transformer_blocks[int(parts[where])])
        return ".".join(parts)

    def weight_map(self, student_keys: Sequence[str]) -> dict[str, str]:
        """Student parameter → teacher parameter, for every one of `student_keys`."""
        return {key: self.teacher_key(key) for key in student_keys}

    def feature_pairs(self, choice: str = "blocks") -> list[tuple[str, str]]:
        """(student module, teacher module) whose outputs have equal shapes, from input to output.

        Block outputs (BK-SDM, equation 3). A down block that has lost its downsampler is compared before it, at the
        output projection of the last attention, as the paper does for its tiny model.

        Args:
            choice: `blocks` takes all; `bk-sdm` leaves the mid block out, as the paper's code does; `segmind` compares
                a last down block that has lost its downsampler with what reaches the level's up block in the teacher,
                as theirs does.
        """
        pairs = []
        for i, level in enumerate(self.levels):
            lost_downsampler = self.dropped_levels > 0 and i == len(self.levels) - 1
            if not lost_downsampler:
                student = f"down_blocks.{i}"
            elif "CrossAttn" in self.teacher["down_block_types"][i]:
                student = f"down_blocks.{i}.attentions.{len(level.down) - 1}.proj_out"
            else:
                student = f"down_blocks.{i}.resnets.{len(level.down) - 1}"
            # The teacher's side of the exception is the end of its block, kept by the student or not.
            if lost_downsampler and choice == "segmind":
                pairs.append((f"down_blocks.{i}", f"up_blocks.{self.dropped_levels - 1}"))
                continue
            teacher = (
                student
                if not lost_downsampler
                else student.replace(
                    f".{len(level.down) - 1}", f".{_per_level(self.teacher, 'layers_per_block', 2)[i] - 1}"
                )
            )
            pairs.append((student, teacher))
        if self.mid and choice != "bk-sdm":
            pairs.append(("mid_block", "mid_block"))
        pairs += [(f"up_blocks.{i}", f"up_blocks.{i + self.dropped_levels}") for i in range(len(self.levels))]
        return pairs

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str | Path = "plan.json") -> BlockPlan:
        """Read a plan back.

        Raises:
            PlanError: the text is no plan, or an illegal one.
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
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(
                f"is not a plan ({error})", where=where, hint="sdcompress plan TEACHER --preset bk-tiny -o plan.json"
            ) from error


def _per_level(config: UNetConfig, key: str, default: Any) -> list[Any]:
    value = config.get(key)
    value = default if value is None else value
    return list(value) if isinstance(value, list | tuple) else [value] * len(config["block_out_channels"])


def _check(plan: BlockPlan) -> None:
    channels = plan.teacher.get("block_out_channels")
    if not channels:
        raise PlanError("the UNet config has no block_out_channels", expected="the config of a UNet2DConditionModel")
    layers = _per_level(plan.teacher, "layers_per_block", 2)
    transformers = _per_level(plan.teacher, "transformer_layers_per_block", 1)
    if not 1 <= len(plan.levels) <= len(channels):
        raise PlanError(f"{len(plan.levels)} levels are to stay of {len(channels)}")
    for i in range(len(plan.levels), len(channels)):
        if channels[i] != channels[i - 1]:
            raise PlanError(
                f"level {i} cannot go: it has {channels[i]} channels and its neighbour {channels[i - 1]}, so the blocks"
                " around the gap would not fit",
                expected="equal channels on both sides (SD1.x and SD2.x have them, SDXL has not)",
                hint="a preset that keeps every level: bk-base or bk-small",
            )
    if plan.mid and len(plan.levels) < len(channels):
        raise PlanError(
            "the mid block cannot stay when the innermost level goes: it works at the resolution that level leaves"
        )
    for i, level in enumerate(plan.levels):
        if len(level.up) != len(level.down) + 1:
            raise PlanError(
                f"level {i} keeps {len(level.down)} down and {len(level.up)} up pairs",
                expected="one up pair more than down pairs: each takes one skip tensor",
            )
        for side, kept, have in (("down", level.down, layers[i]), ("up", level.up, layers[i] + 1)):
            if list(kept) != sorted(set(kept)) or not set(kept) <= set(range(have)):
                raise PlanError(
                    f"level {i} keeps {side} pairs {list(kept)}", expected=f"ascending indices below {have}"
                )
        if level.down[:1] != (0,):
            raise PlanError(f"level {i} drops down pair 0, where the channels change")
        if level.up[0] != 0 or level.up[-1] != layers[i]:
            raise PlanError(
                f"level {i} keeps up pairs {list(level.up)}",
                expected=f"the first (0) and the last ({layers[i]}), where the channels change",
            )
        if level.transformer_blocks is not None:
            if not isinstance(transformers[i], int):
                raise PlanError(
                    f"level {i} has another number of transformer blocks in each pair; they can only stay as they are"
                )
            if not level.transformer_blocks or not set(level.transformer_blocks) <= set(range(transformers[i])):
                raise PlanError(
                    f"level {i} keeps transformer blocks {list(level.transformer_blocks)}",
                    expected=f"some of 0 to {transformers[i] - 1}",
                )


def preset_name(name: str) -> str:
    """The preset a name or alias stands for.

    Raises:
        UsageError: no such preset; the message lists them and the nearest.
    """
    found = ALIASES.get(name, name)
    if found not in PRESETS:
        known = [*PRESETS, *ALIASES]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise UsageError(
            f"no preset {name!r}",
            expected=f"one of {', '.join(known)}, or the path of a plan.json",
            hint=f"--preset {near[0] if near else 'bk-tiny'}",
        )
    return found


def make_plan(
    config: UNetConfig, preset: str | None = None, *, levels: Sequence[LevelPlan] | None = None, mid: bool = True
) -> BlockPlan:
    """A plan for a UNet config (no weights needed), from a preset's name or from keep-lists.

    Args:
        config: the teacher's UNet config.
        preset: a key of `PRESETS` or `ALIASES`.
        levels: instead of a preset, what stays of each level that stays, outermost first.
        mid: with `levels`, whether the mid block stays.

    Raises:
        UsageError: unknown preset. PlanError: this UNet cannot be pruned so; says why.
    """
    # Private keys go: diffusers would take `_use_default_values` as leave to ignore what the plan sets.
    teacher = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}
    if "block_out_channels" not in teacher:
        raise PlanError("the UNet config has no block_out_channels", expected="the config of a UNet2DConditionModel")
    if preset is None:
        if levels is None:
            raise PlanError("neither a preset nor keep-lists were given")
        return BlockPlan("custom", teacher, tuple(levels), mid)
    name = preset_name(preset)
    rule = PRESETS[name]
    layers = _per_level(teacher, "layers_per_block", 2)
    if teacher.get("mid_block_type", "UNetMidBlock2DCrossAttn") is None and rule.mid is False and max(layers) == 1:
        raise PlanError(
            f"{name} removes nothing here: the UNet has one pair a level and no mid block, so it is a student already",
            hint="a whole teacher",
        )
    kept = len(layers) - rule.dropped_levels
    has_mid = teacher.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None
    return BlockPlan(name, teacher, tuple(LevelPlan(down=(0,), up=(0, n)) for n in layers[:kept]), rule.mid and has_mid)


def read_plan(name_or_path: str, config: UNetConfig) -> BlockPlan:
    """A preset's plan for `config`, or the plan in a file, which must have been made for such a UNet.

    Raises:
        UsageError: neither a preset nor a file. PlanError: made for another UNet.
    """
    path = Path(name_or_path)
    if not path.is_file():
        return make_plan(config, name_or_path)
    plan = BlockPlan.from_json(path.read_text(encoding="utf-8"), path)
    ours = make_plan(config, levels=plan.levels, mid=plan.mid)
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "down_block_types"):
        if plan.teacher.get(key) != ours.teacher.get(key):
            raise PlanError(
                f"was made for a UNet with {key} {plan.teacher.get(key)}",
                where=path,
                expected=f"{ours.teacher.get(key)}, as the teacher has",
                hint="sdcompress plan TEACHER --preset bk-tiny -o plan.json",
            )
    return plan
