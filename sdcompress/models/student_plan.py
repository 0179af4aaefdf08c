"""The block-removal plan that a model's UNet was made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ModelError, PlanError
from sdcompress_engines.json_files import read_json
from sdcompress_engines.manifest import read_manifest

from sdcompress.families.registry import families, family_of
from sdcompress.families.unet_blocks import read_blocks
from sdcompress.prune.plan import PLAN_ENTRY, BlockPlan
from sdcompress.prune.presets import PRESETS, make_plan


def find_plan(folder: Path, unet_config: Mapping[str, Any]) -> BlockPlan | None:
    """Returns the plan from the whole model to a student; None of a whole model, or where no plan is known.

    It is the one in the model's manifest or in `unet/plan.json`. Of another student, such as one of the hub, it is the
    preset that gives its blocks from a published UNet.

    Args:
        folder: of the model, or its single file.
        unet_config: of its UNet.

    Raises:
        PlanError: the plan in the folder is broken, or makes another UNet.
    """
    found = _read_plan(folder)
    if found is None:
        return infer_plan(unet_config)
    plan, where = found
    if read_blocks(plan.student_config()) != read_blocks(unet_config):
        raise PlanError("the plan makes another UNet than the one beside it", where=where)
    return plan


def _read_plan(folder: Path) -> tuple[BlockPlan, Path] | None:
    """Returns the plan in a model's folder, and the file that it is from."""
    if not folder.is_dir():
        return None
    manifest, file = read_manifest(folder), folder / "unet" / "plan.json"
    content = None if manifest is None else manifest.config.get(PLAN_ENTRY)
    if content is not None and not isinstance(content, str):  # a model with random weights has a preset's name there
        return BlockPlan.from_content(content, folder), folder
    return (BlockPlan.from_content(read_json(file, PlanError), file), file) if file.is_file() else None


def infer_plan(config: Mapping[str, Any]) -> BlockPlan | None:
    """Returns the preset's plan from a published UNet to the student with this config, or None."""
    try:
        family = family_of(config)
        if family.student_of(config) is None:
            return None
    except ModelError:
        return None
    base = families().get(family.base or family.name)
    if base is None or not base.published:
        return None
    teacher = {**base.read_config("unet/config.json"), "sample_size": config.get("sample_size")}
    for preset in PRESETS:
        try:
            plan = make_plan(teacher, preset)
        except PlanError:
            continue
        if _same_network(plan.student_config(), config):
            return plan
    return None


def _same_network(planned: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Returns whether two configs are of one network, as far as a LoRA's names and shapes go."""
    widths = ("block_out_channels", "cross_attention_dim", "use_linear_projection", "addition_embed_type")
    return read_blocks(planned) == read_blocks(config) and all(
        _plain(planned.get(name)) == _plain(config.get(name)) for name in widths
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value or None
