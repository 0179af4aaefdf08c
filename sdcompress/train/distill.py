"""Block distillation: from a teacher, a plan and a cache to a trained student on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from sdcompress_engines.errors import PlanError, storage_errors
from sdcompress_engines.progress import SILENT, Reporter
from torch import nn

from sdcompress.data.cache import LatentCache
from sdcompress.prune.plan import BlockPlan
from sdcompress.prune.student import attention_pairs, build_student
from sdcompress.train.config import DistillConfig
from sdcompress.train.loop import TrainResult, train
from sdcompress.train.objectives.block_distillation import BlockDistillation
from sdcompress.train.pipelines import (
    PIPELINE,
    describe_training,
    make_batches,
    make_sampler,
    save_pipeline,
    with_unet,
)
from sdcompress.train.precision import copy_frozen
from sdcompress.train.run_folder import run_folder, write_recipe

if TYPE_CHECKING:
    from sdcompress.models.load import LoadedPipeline


def distill(
    teacher: LoadedPipeline,
    plan: BlockPlan,
    cache: LatentCache,
    config: DistillConfig,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    report: Reporter = SILENT,
) -> TrainResult:
    """Train the student that `plan` makes of `teacher`; the finished pipeline is saved in `output/pipeline`.

    The teacher's weights are never changed, never handed to the optimizer and never saved as the student's.

    Args:
        teacher: the pipeline to learn from.
        plan: the block-removal plan.
        cache: the data, encoded with the teacher's VAE and text encoder.
        config: loss weights, steps and the rest.
        output: the training folder.
        resume, force: continue the run in `output`, or replace what is in it.
        report: shows the progress.

    Raises:
        ArtifactError: `output` is not empty (with neither `resume` nor `force`), or in use.
        PlanError, UsageError: the plan does not fit the teacher, or an option does not fit the processes.
        TrainingError: divergence, or a resume of another run.
    """
    pipeline: Any = teacher.pipeline
    inputs = [teacher.folder, cache.folder]
    with run_folder(output, resume=resume, force=force, inputs=inputs, result=PIPELINE), storage_errors(output):
        write_recipe(config, output, plan.to_json())
        torch.manual_seed(config.seed)
        student = build_student(pipeline.unet, plan).float()
        objective = make_objective(pipeline.unet, student, plan, config)
        described = plan.to_content()
        identity = {"teacher": teacher.sha256, "plan": described, "data": cache.sha256}
        result = train(
            student,
            objective,
            make_batches(pipeline, cache, config),
            config,
            output,
            identity | {"config": config.model_dump(mode="json")},
            frozen=objective.teacher,
            sampler=make_sampler(lambda unet: with_unet(pipeline, unet), config, output, cache.size_px),
            label="distill",
            report=report,
        )
        if PartialState().is_main_process:
            manifest = describe_training(teacher, cache, config, result, role="teacher")
            manifest["config"] = {"plan": described} | manifest["config"]
            finished, folder = with_unet(pipeline, student.cpu().eval()), output / PIPELINE
            save_pipeline(finished, folder, "student", precision=config.save_precision, force=True, **manifest)
    return result


def make_objective(
    teacher_unet: nn.Module, student: nn.Module, plan: BlockPlan, config: DistillConfig
) -> BlockDistillation:
    """Returns the losses of a distillation, with a frozen copy of the teacher where a weight asks for one.

    Args:
        teacher_unet: stays unchanged.
        student: the network that `plan` makes of it.
        plan: pairs the student's modules with the teacher's.
        config: the loss weights, the feature pairs and the precision.

    Raises:
        PlanError: as `find_attentions`.
    """
    weights = config.loss_weights()
    attentions = find_attentions(student, plan, config)
    needs_teacher = any(weight > 0 for name, weight in weights.items() if name != "task_loss")
    return BlockDistillation(
        copy_frozen(teacher_unet, config.precision) if needs_teacher else None,
        plan.feature_pairs(config.feature_pairs),
        weights,
        config.feature_norm,
        attentions,
    )


def find_attentions(student: nn.Module, plan: BlockPlan, config: DistillConfig) -> list[tuple[str, str]]:
    """Returns the self-attentions that can be compared, as (student module, teacher module) names.

    Args:
        student: the network of `plan`; one on the meta device will do.
        plan, config: as of `make_objective`.

    Raises:
        PlanError: they are to be compared, and the student has none.
    """
    attentions = attention_pairs(student, plan)
    if config.attention_kd_weight > 0 and not attentions:
        raise PlanError(
            f"{plan.name} leaves no attention in the student for attention_kd_weight to compare",
            hint="--set attention_kd_weight=0",
        )
    return attentions
