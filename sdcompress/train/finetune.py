"""Full finetuning: every weight of a teacher's or a student's UNet, on new data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from sdcompress_engines.errors import storage_errors
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.data.cache import LatentCache
from sdcompress.train.config import FinetuneConfig
from sdcompress.train.loop import TrainResult, train
from sdcompress.train.objectives.denoising import Denoising
from sdcompress.train.pipelines import (
    PIPELINE,
    describe_training,
    make_batches,
    make_sampler,
    save_pipeline,
    with_unet,
)
from sdcompress.train.run_folder import run_folder, write_recipe

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
    """Train a copy of `model`'s UNet by the diffusion loss; the finished pipeline is saved in `output/pipeline`.

    Args:
        model: the pipeline to start from; it stays unchanged.
        cache: the data, encoded with the model's VAE and text encoder.
        config: steps, learning rate and the rest.
        output: the training folder.
        resume: continue the run in `output`.
        force: replace what is in `output`.
        report: shows the progress.

    Raises:
        ArtifactError: `output` is not empty (with neither `resume` nor `force`), or in use.
        TrainingError: divergence, or a resume of another run.
        UsageError: the batch does not divide over the processes, or an option does not fit them.
    """
    pipeline: Any = model.pipeline
    inputs = [model.folder, cache.folder]
    with run_folder(output, resume=resume, force=force, inputs=inputs, result=PIPELINE), storage_errors(output):
        write_recipe(config, output)
        torch.manual_seed(config.seed)
        unet = copy.deepcopy(pipeline.unet).float().requires_grad_(True)
        result = train(
            unet,
            Denoising(),
            make_batches(pipeline, cache, config),
            config,
            output,
            {"model": model.sha256, "data": cache.sha256, "config": config.model_dump(mode="json")},
            sampler=make_sampler(lambda trained: with_unet(pipeline, trained), config, output, cache.size_px),
            label="finetune",
            report=report,
        )
        if PartialState().is_main_process:
            save_pipeline(
                with_unet(pipeline, unet.cpu().eval()),
                output / PIPELINE,
                "finetuned",
                precision=config.save_precision,
                force=True,
                **describe_training(model, cache, config, result),
            )
    return result
