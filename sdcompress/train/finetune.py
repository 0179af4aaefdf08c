"""Full finetuning: every weight of a UNet, teacher's or student's, on new data."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from sdcompress_engines.manifest import storage_errors
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.data.cache import LatentCache
from sdcompress.train.batches import Batches
from sdcompress.train.config import FinetuneConfig
from sdcompress.train.loop import TrainResult, train
from sdcompress.train.objectives.denoising import Denoising
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


def finetune(
    model: LoadedPipeline,
    cache: LatentCache,
    config: FinetuneConfig,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    report: Reporter = SILENT,
) -> TrainResult:
    """Train a copy of `model`'s UNet by the diffusion loss; the finished pipeline lands in `output/pipeline`.

    Raises:
        ArtifactError: `output` is in the way (neither `resume` nor `force`), or in use. TrainingError: divergence, or a
            resume of another run.
    """
    pipeline: Any = model.pipeline
    with run_folder(output, resume=resume, force=force), storage_errors(output):
        write_once(output / "recipe.json", recipe_text(config))
        torch.manual_seed(config.seed)
        unet = copy.deepcopy(pipeline.unet).float().requires_grad_(True)
        batches = Batches(cache, training_scheduler(pipeline.scheduler), pipeline.vae.config.scaling_factor, config)
        identity = {"model": model.sha256, "data": cache.sha256, "config": config.model_dump(mode="json")}
        draw = sampler(lambda trained: with_unet(pipeline, trained), config, output, cache.size_px)
        result = train(
            unet, Denoising(), batches, config, output, identity, sampler=draw, label="finetune", report=report
        )
        if PartialState().is_main_process:
            save_pipeline(
                with_unet(pipeline, unet.cpu().eval()),
                output / PIPELINE,
                "finetuned",
                precision=config.save_precision,
                force=True,
                config={"train": identity["config"], "model_name": model.name, "data": cache.about()},
                inputs={"model": model.sha256, "data": cache.sha256},
                figures=asdict(result),
                seed=config.seed,
            )
    return result
