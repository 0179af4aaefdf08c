"""From a teacher, a plan and a cache to a trained student on disk."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from sdcompress_engines.manifest import storage_errors
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.data.cache import LatentCache
from sdcompress.prune.plan import BlockPlan
from sdcompress.prune.student import attention_pairs, build_student
from sdcompress.train.batches import Batches
from sdcompress.train.config import DistillConfig
from sdcompress.train.loop import TrainResult, train
from sdcompress.train.objectives.block_distillation import BlockDistillation
from sdcompress.train.optim import choose_precision
from sdcompress.train.run_folder import (
    PIPELINE,
    recipe_text,
    run_folder,
    sampler,
    save_pipeline,
    training_scheduler,
    with_unet,
    write_once,
)

if TYPE_CHECKING:
    from sdcompress.models.load import LoadedPipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    """Train a student of `teacher` as `plan` says; the finished pipeline lands in `output/pipeline`.

    The teacher's weights are never touched, never handed to the optimizer and never saved as the student's.

    Raises:
        ArtifactError: `output` is in the way (neither `resume` nor `force`), or in use. TrainingError: divergence, or a
            resume of another run.
    """
    pipeline: Any = teacher.pipeline
    with run_folder(output, resume=resume, force=force), storage_errors(output):
        write_once(output / "plan.json", plan.to_json())
        write_once(output / "recipe.json", recipe_text(config))
        torch.manual_seed(config.seed)
        student = build_student(pipeline.unet, plan).float()
        weights = {
            "task_loss": config.task_weight,
            "output_kd_loss": config.output_kd_weight,
            "feature_kd_loss": config.feature_kd_weight,
            "attention_kd_loss": config.attention_kd_weight,
        }
        frozen = (
            frozen_copy(pipeline.unet, config.precision)
            if any(weight > 0 for name, weight in weights.items() if name != "task_loss")
            else None
        )
        objective = BlockDistillation(
            frozen,
            plan.feature_pairs(config.feature_pairs),
            weights,
            config.feature_norm,
            attention_pairs(student, plan),
        )
        batches = Batches(cache, training_scheduler(pipeline.scheduler), pipeline.vae.config.scaling_factor, config)
        identity = {
            "teacher": teacher.sha256,
            "plan": json.loads(plan.to_json()),
            "data": cache.sha256,
            "config": config.model_dump(mode="json"),
        }
        draw = sampler(lambda unet: with_unet(pipeline, unet), config, output, cache.size_px)
        result = train(
            student,
            objective,
            batches,
            config,
            output,
            identity,
            frozen=frozen,
            sampler=draw,
            label="distill",
            report=report,
        )
        if PartialState().is_main_process:
            save_pipeline(
                with_unet(pipeline, student.cpu().eval()),
                output / PIPELINE,
                "student",
                precision=config.save_precision,
                force=True,
                config={
                    "plan": identity["plan"],
                    "train": identity["config"],
                    "teacher_name": teacher.name,
                    "data": cache.about(),
                },
                inputs={"teacher": teacher.sha256, "data": cache.sha256},
                figures=asdict(result),
                seed=config.seed,
            )
    return result


def frozen_copy(unet: Any, precision: str) -> Any:
    """The teacher for training: a copy in the precision it computes in, without gradients, in eval mode."""
    dtype = DTYPES[choose_precision(precision, "cuda" if torch.cuda.is_available() else "cpu")]
    return copy.deepcopy(unet).to(dtype).requires_grad_(False).eval()
