"""From a teacher, a plan and data to a trained student on disk."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sdcompress_engines.errors import ModelError
from sdcompress_engines.manifest import check_free, staged, storage_errors, write_manifest
from sdcompress_engines.progress import SILENT, Reporter
from torch import nn

from sdcompress.data.cache import LatentCache
from sdcompress.prune.plan import BlockPlan
from sdcompress.prune.student import build_student
from sdcompress.teacher import quiet

from .config import DistillConfig
from .loop import Batches, TrainResult, train
from .objectives import BlockDistillation

if TYPE_CHECKING:
    from sdcompress.teacher import LoadedPipeline

PIPELINE = "pipeline"


def student_pipeline(teacher: Any, unet: nn.Module) -> Any:
    """The teacher's pipeline around another UNet; every other component is shared, not copied."""
    components = dict(teacher.components) | {"unet": unet}
    if "safety_checker" in components:
        components["requires_safety_checker"] = False
    pipeline = type(teacher)(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: Any, target: Path, kind: str, *, precision: str = "fp32", force: bool = False, **manifest: Any) -> None:
    """Save a pipeline as an ordinary diffusers folder with a manifest, by one rename; the pipeline is left as it is."""
    with staged(target, force) as out:
        if precision == "fp16":
            pipeline = student_pipeline(pipeline, copy.deepcopy(pipeline.unet).half())
            for name in ("vae", "text_encoder", "text_encoder_2"):
                if getattr(pipeline, name, None) is not None:
                    pipeline.register_modules(**{name: copy.deepcopy(getattr(pipeline, name)).half()})
        with quiet():
            pipeline.save_pretrained(out)
        write_manifest(out, kind, **manifest)


def distill(teacher: LoadedPipeline, plan: BlockPlan, cache: LatentCache, config: DistillConfig, output: Path, *, resume: bool = False, force: bool = False, report: Reporter = SILENT) -> TrainResult:
    """Train a student of `teacher` as `plan` says; the finished pipeline lands in `output/pipeline`.

    The teacher's weights are never touched, never handed to the optimizer and never saved as the student's.

    Raises:
        ArtifactError: `output` is in the way (neither `resume` nor `force`). TrainingError: divergence, or a resume of another run.
        ModelError: a UNet that needs more than text (SDXL's is not trained yet).
    """
    pipeline: Any = teacher.pipeline
    if pipeline.unet.config.get("addition_embed_type"):
        raise ModelError("this UNet takes pooled text embeddings and sizes (SDXL): it can be planned and exported, not yet distilled", where=teacher.name, expected="an SD1.x or SD2.x teacher")
    if not resume:
        check_free(output, force)
        if force and output.exists():
            shutil.rmtree(output)
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        if not (output / "plan.json").is_file():  # a resume with another plan is refused below, and must find this one unharmed
            (output / "plan.json").write_text(plan.to_json())
    torch.manual_seed(config.seed)
    student = build_student(pipeline.unet, plan).float()
    frozen = pipeline.unet.requires_grad_(False).eval()
    weights = {"task_loss": config.task_weight, "output_kd_loss": config.output_kd_weight, "feature_kd_loss": config.feature_kd_weight}
    needs_teacher = config.output_kd_weight > 0 or config.feature_kd_weight > 0
    objective = BlockDistillation(frozen if needs_teacher else None, plan.feature_pairs(), weights, config.feature_norm)
    batches = Batches(cache, training_scheduler(pipeline.scheduler), pipeline.vae.config.scaling_factor, config)
    identity = {"teacher": teacher.sha256, "plan": json.loads(plan.to_json()), "data": cache.sha256, "config": config.model_dump(mode="json")}
    result = train(student, objective, batches, config, output, identity, sampler=_sampler(pipeline, config, output, cache.size_px) if config.validation_prompts else None, report=report)
    saved = student_pipeline(pipeline, student.cpu().eval())
    with storage_errors(output):
        save_pipeline(
            saved,
            output / PIPELINE,
            "student",
            precision=config.save_precision,
            force=True,
            config={"plan": identity["plan"], "train": identity["config"], "teacher_name": teacher.name},
            inputs={"teacher": teacher.sha256, "data": cache.sha256},
            figures=asdict(result),
            seed=config.seed,
        )
    return result


def training_scheduler(scheduler: Any) -> Any:
    """DDPM with the pipeline's noise schedule, whatever sampler it carries."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(scheduler.config)


def _sampler(pipeline: Any, config: DistillConfig, output: Path, size_px: int) -> Any:
    folder = output / "samples"

    def draw(student: nn.Module, step: int) -> None:
        from sdcompress.pipeline import generate, grid

        was_training = student.training
        student.eval()
        # The other components come to where the student trains.
        pictures = generate(student_pipeline(pipeline, student).to(next(student.parameters()).device), list(config.validation_prompts), seeds=list(range(len(config.validation_prompts))), size_px=size_px)
        student.train(was_training)
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
            grid(pictures).save(folder / f"step-{step:06d}.webp", quality=90)

    return draw
