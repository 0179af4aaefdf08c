"""The plan presets, and plans by preset, keep-lists or file."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import PlanError, UsageError

from sdcompress.families.family import UNetConfig
from sdcompress.families.unet_blocks import has_mid_block
from sdcompress.prune.plan import BlockPlan, LevelPlan, spread_over_levels


@dataclass(frozen=True)
class Preset:
    """A published block-removal rule. Of each level it keeps the first down pair, and the first and last up pair.

    Attributes:
        summary: what it removes. mid: whether the mid block stays. dropped_levels: innermost levels that are removed.
        alias: another name; empty for none.
    """

    summary: str
    mid: bool
    dropped_levels: int
    alias: str = ""


PRESETS = {
    "bk-base": Preset("one pair fewer in each down and up block", mid=True, dropped_levels=0, alias="sd-small"),
    "bk-small": Preset("bk-base without the mid block", mid=False, dropped_levels=0),
    "bk-tiny": Preset("bk-small without the innermost level", mid=False, dropped_levels=1, alias="sd-tiny"),
}
ALIASES = {preset.alias: name for name, preset in PRESETS.items() if preset.alias}


def preset_name(name: str) -> str:
    """Returns the name of the preset that a name or alias stands for.

    Raises:
        UsageError: there is no such preset; the message lists all and names the nearest.
    """
    canonical = ALIASES.get(name, name)
    if canonical not in PRESETS:
        known = [*PRESETS, *ALIASES]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise UsageError(
            f"no preset {name!r}",
            expected=f"one of {', '.join(known)}, or the path of a plan.json",
            hint=near[0] if near else "bk-tiny",
        )
    return canonical


def make_plan(
    config: UNetConfig, preset: str | None = None, *, levels: Sequence[LevelPlan] | None = None, mid: bool = True
) -> BlockPlan:
    """Returns a plan for a UNet, from a preset or from keep-lists; no weights are needed.

    Args:
        config: the teacher's UNet config.
        preset: a key of `PRESETS` or `ALIASES`.
        levels: the keep-lists instead of a preset: one for each level that stays, outermost first.
        mid: with `levels`, whether the mid block stays.

    Raises:
        UsageError: the preset is unknown.
        PlanError: this UNet cannot be pruned so; the message gives the reason.
    """
    teacher = _strip_private_keys(config)
    if "block_out_channels" not in teacher:
        raise PlanError("the UNet config has no block_out_channels", expected="the config of a UNet2DConditionModel")
    if preset is None:
        if levels is None:
            raise PlanError("neither a preset nor keep-lists were given")
        return BlockPlan("custom", teacher, tuple(levels), mid)
    name = preset_name(preset)
    rule = PRESETS[name]
    layers = spread_over_levels(teacher, "layers_per_block", 2)
    has_mid = has_mid_block(teacher)
    if not has_mid and not rule.mid and max(layers) == 1:
        raise PlanError(
            f"{name} removes nothing here: the UNet has one pair a level and no mid block, so it is a student already",
            hint="a whole teacher",
        )
    kept = len(layers) - rule.dropped_levels
    return BlockPlan(name, teacher, tuple(LevelPlan(down=(0,), up=(0, n)) for n in layers[:kept]), rule.mid and has_mid)


def plan_files(*names_or_paths: str | None) -> list[Path]:
    """Returns the files among presets and paths of plans, as `read_plan` takes them."""
    return [Path(name) for name in names_or_paths if name and os.path.isfile(name)]


def _strip_private_keys(config: UNetConfig) -> dict[str, Any]:
    """Returns a UNet config as JSON holds it, without diffusers' private keys.

    With `_use_default_values`, diffusers would ignore entries that the plan sets.
    """
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}


def read_plan(name_or_path: str, config: UNetConfig) -> BlockPlan:
    """Returns a preset's plan for a UNet, or the plan in a file.

    Args:
        name_or_path: a preset, an alias, or the path of a `plan.json`.
        config: of the teacher's UNet.

    Raises:
        UsageError: there is neither such a preset nor such a file.
        PlanError: the plan was made for another UNet.
    """
    path = Path(name_or_path)
    if not path.is_file():
        return make_plan(config, name_or_path)
    plan = BlockPlan.from_json(path.read_text(encoding="utf-8"), path)
    teacher = _strip_private_keys(config)
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "down_block_types"):
        if plan.teacher.get(key) != teacher.get(key):
            raise PlanError(
                f"was made for a UNet with {key} {plan.teacher.get(key)}",
                where=path,
                expected=f"{teacher.get(key)}, as the teacher has",
                hint="sdcompress plan TEACHER --preset bk-tiny -o plan.json",
            )
    return plan
