"""What a run reads: the training settings, the plans of its students, and the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.errors import UsageError, shorten
from sdcompress_engines.paths import is_plain_path

from .prompts import read_prompts

if TYPE_CHECKING:
    from sdcompress.data.sources import Source
    from sdcompress.prune.plan import BlockPlan
    from sdcompress.train.config import DistillConfig, FewStepConfig

CACHE, REPORT = "cache", "report"
"""Folders of a run that belong to no model."""


@dataclass(frozen=True)
class FewStepSettings:
    """A training after which a student draws in few steps, and without guidance.

    Attributes:
        steps: in which the student learns to draw.
        recipe: the training settings, a name or a file; None takes the defaults.
        overrides: training settings that override the recipe's; None values are ignored.
    """

    steps: int
    recipe: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChainSettings:
    """What a run does.

    Attributes:
        teacher: a name, a path or a hub id.
        data: a folder of captioned pictures, shards, or `nano`.
        plans: presets or plan files, one for each student.
        recipe: the training settings, a name or a file; None takes the defaults.
        overrides: training settings that override the recipe's; None values are ignored.
        output: the run's folder.
        compute_capabilities: (major, minor) of the cards to build engines for; None takes the usual ones.
        prompts_file: captions for the report; None takes the usual ones.
        quick: measure less.
        force: replace the output folder.
        few_step: what makes the smallest student draw in few steps; None leaves this out.
    """

    teacher: str
    data: str
    plans: tuple[str, ...]
    recipe: str | None
    overrides: Mapping[str, Any]
    output: Path
    compute_capabilities: Sequence[tuple[int, int]] | None = None
    prompts_file: Path | None = None
    quick: bool = False
    force: bool = False
    few_step: FewStepSettings | None = None


@dataclass(frozen=True)
class FewStepStudent:
    """A student that is trained further, to draw in few steps.

    Attributes:
        name: its own, which is also its folder in the run's.
        student: the name of the student that it is made from.
        config: of the training.
    """

    name: str
    student: str
    config: FewStepConfig


@dataclass(frozen=True)
class Inputs:
    """The run's inputs, read and checked.

    Attributes:
        config: of the training.
        plans: student, which is also its folder in the run's → its plan.
        source: the data.
        few_step: the student that draws in few steps, or None.
    """

    config: DistillConfig
    plans: Mapping[str, BlockPlan]
    source: Source
    few_step: FewStepStudent | None = None


def read_inputs(settings: ChainSettings) -> Inputs:
    """Returns the inputs of a run.

    Raises:
        UsageError, PlanError, ModelError, DataError: the teacher, the plans, the data, the prompts or the training
            settings are wrong. BackendMissing: what the training needs is not installed.
    """
    from sdcompress.data.sources import open_source
    from sdcompress.models.locate import display_name, locate_pipeline, read_unet_config, refuse_student
    from sdcompress.models.nano import BUILT_IN
    from sdcompress.prune.presets import read_plan
    from sdcompress.prune.student import meta_unet
    from sdcompress.train.accelerator import check_settings
    from sdcompress.train.config import DistillConfig
    from sdcompress.train.distill import find_attentions
    from sdcompress.train.recipes import load_config

    config = load_config(DistillConfig, settings.recipe, dict(settings.overrides))
    check_settings(config)
    if settings.prompts_file is not None:  # it is read again when the report is written
        read_prompts(settings.prompts_file)
    unet_config = read_unet_config(settings.teacher)
    refuse_student(unet_config, settings.teacher)
    teacher = settings.teacher if settings.teacher in BUILT_IN else display_name(locate_pipeline(settings.teacher))
    taken = {CACHE, REPORT, teacher.casefold()}
    plans: dict[str, BlockPlan] = {}
    for given in settings.plans:
        plan = read_plan(given, unet_config)
        find_attentions(meta_unet(plan.student_config()), plan, config)
        name = plan.name if plan.name != "custom" else Path(given).stem
        others = taken | {other.casefold() for other in plans if other != name}
        if not is_plain_path(name) or "/" in name or name[0] == "." or name.casefold() in others:
            raise UsageError(
                f"--plan {shorten(given, 200)} is named {shorten(repr(name), 80)}",
                expected="a name that can be a folder of its own in the run's; it is the plan's own, or its file's",
            )
        if plans.setdefault(name, plan) != plan:
            raise UsageError(
                f"two --plan are named {name!r}", expected="a name for each; it is the plan's own, or its file's"
            )
    few_step = None
    if settings.few_step is not None:
        few_step = _read_few_step(settings.few_step, plans, config)
        if few_step.name.casefold() in taken | {name.casefold() for name in plans}:
            raise UsageError(f"--few-step makes {few_step.name!r}, and a --plan has this name", hint="rename the plan")
    return Inputs(config, plans, open_source(settings.data, config.data), few_step)


def _read_few_step(
    settings: FewStepSettings, plans: Mapping[str, BlockPlan], distillation: DistillConfig
) -> FewStepStudent:
    """Returns the smallest student, by its UNet's parameters, as one that draws in few steps; the last of equal ones.

    It learns from the data of the distillation, encoded with the settings of that.

    Raises:
        UsageError: the training settings are wrong.
    """
    from sdcompress.prune.cost import count_unet_parameters
    from sdcompress.train.accelerator import check_settings
    from sdcompress.train.config import FewStepConfig
    from sdcompress.train.recipes import load_config

    overrides = {**settings.overrides, "num_inference_steps": settings.steps}
    config = load_config(FewStepConfig, settings.recipe, overrides).model_copy(update={"data": distillation.data})
    check_settings(config)
    student = min(reversed(list(plans)), key=lambda name: count_unet_parameters(plans[name].student_config()))
    return FewStepStudent(f"{student}-{settings.steps}step", student, config)


def list_read(settings: ChainSettings, inputs: Inputs) -> list[Path]:
    """Returns the files and folders that a run reads."""
    from sdcompress.models.locate import local_paths
    from sdcompress.prune.presets import plan_files
    from sdcompress.train.recipes import recipe_files

    prompts = [] if settings.prompts_file is None else [settings.prompts_file]
    recipes = [settings.recipe, settings.few_step.recipe if settings.few_step else None]
    files = [*plan_files(*settings.plans), *(file for recipe in recipes for file in recipe_files(recipe)), *prompts]
    return [*local_paths(settings.teacher), *inputs.source.inputs, *files]
