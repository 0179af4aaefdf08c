"""Prepares the models of a suite; those with random weights are created first."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.manifest import cache_folder, read_manifest, write_manifest
from sdcompress_engines.output_folders import require_space, staged, unless_present
from sdcompress_engines.progress import SILENT, Reporter

from .scenario import ModelUnderTest, Random, slug


def prepare_model(model: ModelUnderTest, report: Reporter = SILENT) -> ModelUnderTest:
    """Returns the model with an existing path and its sha256.

    A model with random weights is created in the cache folder, in half precision, if it is not there yet.

    Raises:
        UsageError, ModelError: there is no such model.
        PlanError: its family does not allow the plan.
        ArtifactError: something else has its place in the cache folder.
        StorageError: there is no room for it.
    """
    from sdcompress.models.locate import hash_pipeline, locate_pipeline

    random = model.random
    if random is None:
        return model if model.sha256 else dataclasses.replace(model, sha256=hash_pipeline(locate_pipeline(model.path)))
    folder = random_folder(random)
    if not folder.is_dir():
        with report.task(f"creating {model.name} with random weights"):
            _create_pipeline(random, folder)
    known = read_manifest(folder)
    if known is None:
        raise ArtifactError("is no model with random weights: it has no manifest", where=folder, hint="delete it")
    model = dataclasses.replace(
        model, path=folder, sha256=known.files["unet/diffusion_pytorch_model.safetensors"].sha256
    )
    return _with_random_decoder(model) if random.decoder else model


def _create_pipeline(random: Random, folder: Path) -> None:
    import torch

    from sdcompress.models.random import random_pipeline
    from sdcompress.support.quiet import quiet

    pipeline = step_by_step(random_pipeline(random.family, random.plan, dtype=torch.float16))
    parts = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
    size = sum(2 * p.numel() for part in parts for p in part.parameters())
    require_space(folder, size, f"{folder.name} with random weights")
    with unless_present(folder), staged(folder) as partial, quiet():
        pipeline.save_pretrained(partial)
        write_manifest(partial, "random model", config={"family": random.family, "plan": random.plan}, inputs={})


def _with_random_decoder(model: ModelUnderTest) -> ModelUnderTest:
    """Returns the model with the random decoder of its VAE's latents, which is created if it is not there yet."""
    import torch

    from sdcompress.models.decoder import hash_decoder
    from sdcompress.models.locate import DECODER, read_component_config
    from sdcompress.models.random import random_decoder
    from sdcompress.support.quiet import quiet

    vae = read_component_config(model.path, "vae")
    folder = Path(f"{model.path}-{DECODER}")
    if not folder.is_dir():
        decoder = random_decoder(vae, dtype=torch.float16)
        with unless_present(folder), staged(folder) as partial, quiet():
            decoder.save_pretrained(partial)
    return dataclasses.replace(model, decoder=folder, decoder_sha256=hash_decoder(folder))


def step_by_step(pipeline: Any) -> Any:
    """Returns a pipeline after it got DDIM, for which a step is one call of the UNet.

    SD1.5's own scheduler, PNDM, calls it once more: for a picture in four steps that is a quarter of the time.
    """
    from diffusers import DDIMScheduler, PNDMScheduler

    if not isinstance(pipeline.scheduler, PNDMScheduler):
        return pipeline
    config = {**pipeline.scheduler.config, "timestep_spacing": "trailing", "clip_sample": False}
    pipeline.register_modules(scheduler=DDIMScheduler.from_config(config))
    return pipeline


def random_folder(random: Random) -> Path:
    """Returns the folder of a model with random weights."""
    return cache_folder() / "random" / slug(f"{random.family}-{random.plan or 'whole'}-step-by-step")
