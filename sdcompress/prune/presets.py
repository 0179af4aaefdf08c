"""The plan presets, and plans by preset, keep-lists or file."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import PlanError, UsageError, shorten
from sdcompress_engines.json_files import read_json

from sdcompress.families.family import UNetConfig
from sdcompress.families.unet_blocks import UP_DEPTHS, read_blocks, spread_over_levels
from sdcompress.prune.plan import PLAN_HINT, BlockPlan, LevelPlan, explicit_up_depths


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
        PlanError: this UNet cannot be pruned so, or nothing would be removed; the message gives the reason.
        ModelError: the config is not one of a UNet that can be pruned.
    """
    teacher = _normalize_config(config)
    if preset is None:
        if levels is None:
            raise PlanError("neither a preset nor keep-lists were given")
        plan = BlockPlan("custom", teacher, tuple(levels), mid and read_blocks(teacher).mid is not None)
        _check_removal(plan)
        return plan
    name = preset_name(preset)
    try:
        return _apply_preset(name, teacher)
    except PlanError as error:
        others = [other for other in PRESETS if other != name and _fits(other, teacher)]
        raise PlanError(
            f"{name}: {error.what}", expected=error.expected, hint=" or ".join(others) or "a whole teacher"
        ) from error


def _apply_preset(name: str, teacher: dict[str, Any]) -> BlockPlan:
    rule, blocks = PRESETS[name], read_blocks(teacher)
    levels = blocks.levels[: max(0, len(blocks.levels) - rule.dropped_levels)]
    kept = tuple(LevelPlan(down=(0,), up=(0, len(level.down))) for level in levels)
    plan = BlockPlan(name, teacher, kept, rule.mid and blocks.mid is not None)
    _check_removal(plan)
    return plan


def _fits(name: str, teacher: dict[str, Any]) -> bool:
    try:
        _apply_preset(name, teacher)
    except PlanError:
        return False
    return True


def _check_removal(plan: BlockPlan) -> None:
    if plan.removes_nothing:
        raise PlanError("removes nothing here: the UNet has no more blocks than the plan keeps")


def plan_files(*names_or_paths: str | None) -> list[Path]:
    """Returns the files among presets and paths of plans, as `read_plan` takes them."""
    return [Path(name) for name in names_or_paths if name and os.path.isfile(name)]


def _normalize_config(config: UNetConfig) -> dict[str, Any]:
    """Returns a UNet config as JSON holds it, without diffusers' private keys.

    With `_use_default_values`, diffusers would ignore entries that the plan sets.
    """
    read_blocks(config)
    teacher = {key: _without_tuples(value) for key, value in config.items() if not key.startswith("_")}
    up_depths = explicit_up_depths(teacher)
    return teacher if up_depths is None else teacher | {UP_DEPTHS: up_depths}


def _without_tuples(value: Any) -> Any:
    return [_without_tuples(each) for each in value] if isinstance(value, list | tuple) else value


def read_plan(name_or_path: str, config: UNetConfig) -> BlockPlan:
    """Returns a preset's plan for a UNet, or the plan in a file.

    Args:
        name_or_path: a preset, an alias, or the path of a `plan.json`.
        config: of the teacher's UNet.

    Raises:
        UsageError: there is neither such a preset nor such a file.
        PlanError: the file is no plan, was made for another UNet, or removes nothing.
        ModelError: the config is not one of a UNet that can be pruned.
    """
    path = Path(name_or_path)
    if not path.is_file():
        return make_plan(config, name_or_path)
    plan = BlockPlan.from_content(read_json(path, PlanError), path)
    teacher = _normalize_config(config)
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "down_block_types", "up_block_types"):
        planned, found = (spread_over_levels(each, key, 2) for each in (plan.teacher, teacher))
        if planned != found:
            raise _other_unet(path, f"{key} {shorten(planned, 100)}", f"{found}, as the teacher has")
    if plan.blocks != read_blocks(teacher):
        raise _other_unet(path, "other transformer blocks or another mid block", "a plan of this teacher")
    plan = BlockPlan(plan.name, teacher, plan.levels, plan.mid)
    if plan.removes_nothing:
        raise PlanError("removes nothing: it keeps every block of the UNet", where=path, hint=PLAN_HINT)
    return plan


def _other_unet(path: Path, made_for: str, expected: str) -> PlanError:
    return PlanError(f"was made for a UNet with {made_for}", where=path, expected=expected, hint=PLAN_HINT)
