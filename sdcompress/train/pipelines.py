"""Pipelines around the network in training: those that draw validation pictures, and the finished one on disk."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sdcompress_engines.errors import ModelError, storage_errors
from sdcompress_engines.files import write_atomically
from sdcompress_engines.manifest import write_manifest
from sdcompress_engines.noise import find_unusual_noise
from sdcompress_engines.output_folders import staged
from torch import nn

from sdcompress.data.cache import LatentCache
from sdcompress.data.embed import TEXT_ENCODERS
from sdcompress.prune.plan import PLAN_ENTRY
from sdcompress.support.pictures import save_picture
from sdcompress.support.pipeline import latent_scale, scheduler_config
from sdcompress.support.quiet import quiet
from sdcompress.train.batches import Batches
from sdcompress.train.config import LoopConfig, TrainConfig
from sdcompress.train.loop import Sampler, TrainResult

if TYPE_CHECKING:
    from sdcompress.models.load import LoadedPipeline

PIPELINE = "pipeline"
SAMPLES = "samples"


def with_unet(pipeline: Any, unet: nn.Module) -> Any:
    """Returns a pipeline with another UNet; every other component is shared, and every switch is the same."""
    other = copy.copy(pipeline)
    other.register_modules(unet=unet)
    other.set_progress_bar_config(disable=True)
    return other


def make_training_scheduler(scheduler: Any) -> Any:
    """Returns a DDPM scheduler with the noise schedule of a pipeline's scheduler, whatever sampler that is.

    Raises:
        ModelError: it has other noise (EDM, flow matching), which this training would replace by DDPM's.
    """
    from diffusers import DDPMScheduler

    if kind := find_unusual_noise(scheduler_config(scheduler)):
        raise ModelError(
            f"a model with the noise of {type(scheduler).__name__} ({kind}) cannot be trained",
            expected="the noise of SD 1.x, SD 2.x and SDXL, in numbered timesteps",
        )
    return DDPMScheduler.from_config(scheduler.config)


def make_batches(
    pipeline: Any,
    cache: LatentCache,
    config: TrainConfig,
    *,
    tokens: bool = False,
    timesteps: torch.Tensor | None = None,
) -> Batches:
    """Returns the noisy batches that a pipeline's UNet is trained on.

    Args:
        pipeline: gives the noise schedule and the scale of the latents; see `latent_scale`.
        cache, config, tokens, timesteps: see `Batches`.

    Raises:
        ModelError: as `check_trainable`.
    """
    check_trainable(pipeline)
    scheduler = make_training_scheduler(pipeline.scheduler)
    factor, mean = latent_scale(pipeline.vae.config, pipeline.components)
    return Batches(cache, scheduler, factor, config, tokens=tokens, latents_mean=mean, timesteps=timesteps)


def check_trainable(pipeline: Any) -> None:
    """Refuse a pipeline whose UNet takes other noise or further inputs than it gets in training.

    Raises:
        ModelError: as `make_training_scheduler`, or the UNet takes the guidance scale.
    """
    make_training_scheduler(pipeline.scheduler)
    if pipeline.unet.config.get("time_cond_proj_dim") is not None:
        raise ModelError(
            "the UNet takes the guidance scale as an input (time_cond_proj_dim), which training does not give it",
            expected="the model before its distillation to a latent consistency model",
        )


def save_pipeline(
    pipeline: Any, target: Path, kind: str, *, precision: str = "fp32", force: bool = False, **manifest: Any
) -> None:
    """Save a pipeline as an ordinary diffusers folder with a manifest, by one rename.

    The pipeline itself stays unchanged.

    Args:
        pipeline: a diffusers pipeline.
        target: the folder to write.
        kind: the artifact's kind in the manifest.
        precision: fp32, or fp16 to save copies of the components in half precision.
        force: replace `target` if it exists.
        manifest: further arguments of `write_manifest`.
    """
    with staged(target, force) as out:
        if precision == "fp16":
            pipeline = with_unet(pipeline, copy.deepcopy(pipeline.unet).half())
            for name in ("vae", *TEXT_ENCODERS):
                if getattr(pipeline, name, None) is not None:
                    pipeline.register_modules(**{name: copy.deepcopy(getattr(pipeline, name)).half()})
        with quiet():
            pipeline.save_pretrained(out)
        _remove_source_paths(out)
        write_manifest(out, kind, **manifest)


def describe_training(
    model: LoadedPipeline, cache: LatentCache, config: LoopConfig, result: TrainResult, role: str = "model"
) -> dict[str, Any]:
    """Returns the manifest entries of everything that is trained: configuration, inputs, figures and seed.

    A student stays one when it is trained further, so its plan is among them.

    Args:
        model: what the training started from.
        cache: the data.
        config: the resolved configuration.
        result: how the run ended.
        role: the name of `model` in the entries: "teacher" or "model".
    """
    plan = {} if role != "model" or model.plan is None else {PLAN_ENTRY: model.plan.to_content()}
    return {
        "config": {
            "train": config.model_dump(mode="json"),
            f"{role}_name": model.name,
            "data": cache.describe_data(),
            **plan,
        },
        "inputs": {role: model.sha256, "data": cache.sha256},
        "figures": asdict(result),
        "seed": config.seed,
    }


def _remove_source_paths(folder: Path) -> None:
    """Remove from the JSON configs where each component was loaded from: diffusers writes a path of this machine."""
    for config in folder.rglob("*.json"):
        content = json.loads(config.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            write_atomically(config, json.dumps(content, indent=2) + "\n")


def make_sampler(
    make_pipeline: Callable[[nn.Module], Any], config: TrainConfig, output: Path, size_px: int
) -> Sampler | None:
    """Returns a function of (network, step) that draws the validation prompts into `output/samples`.

    Returns None where the configuration has no validation prompts.

    Args:
        make_pipeline: returns a pipeline around the network in training.
        config: holds the prompts.
        output: the training folder.
        size_px: side of the pictures.
    """
    if not config.validation_prompts:
        return None
    folder = output / SAMPLES

    def draw_samples(trained: nn.Module, step: int) -> None:
        from sdcompress.sampling import generate, grid

        was_training = trained.training
        trained.eval()
        # The other components move to the device on which the network trains.
        pipeline = make_pipeline(trained).to(next(trained.parameters()).device)
        prompts = list(config.validation_prompts)
        try:
            pictures = generate(pipeline, prompts, seeds=list(range(len(prompts))), size_px=size_px)
        except ModelError as error:  # the weights go on; only this look at them is missing
            warnings.warn(f"no validation pictures at step {step}: {error.what}", RuntimeWarning, stacklevel=2)
            return
        finally:
            trained.train(was_training)
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
            save_picture(grid(pictures), folder / f"step-{step:06d}.webp", quality=90)

    return draw_samples
