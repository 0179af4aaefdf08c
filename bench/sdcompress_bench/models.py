"""Models of a suite that have to be made first: those with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sdcompress_engines.manifest import cache_folder, read_manifest, require_space, staged, write_manifest
from sdcompress_engines.progress import SILENT, Reporter

from .scenario import ModelUnderTest, Random, slug


def made(model: ModelUnderTest, report: Reporter = SILENT) -> ModelUnderTest:
    """The model with a path that is there and its sha256; one with random weights is made in the cache folder, in half
    precision, where it is not there yet.

    Raises:
        UsageError, ModelError: no such model. PlanError: a plan its family does not allow. StorageError: no room.
    """
    from sdcompress.models.locate import resolve, sha256_of

    if model.random is None:
        return model if model.sha256 else dataclasses.replace(model, sha256=sha256_of(resolve(model.path)))
    folder = random_folder(model.random)
    if (known := read_manifest(folder) if folder.is_dir() else None) is None:
        import torch

        from sdcompress.models.random import random_pipeline

        with report.task(f"making {model.name} with random weights"):
            pipeline = random_pipeline(model.random.family, model.random.plan, dtype=torch.float16)
            parts = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
            require_space(
                folder, sum(2 * p.numel() for part in parts for p in part.parameters()), f"a random {model.name}"
            )
            with staged(folder) as partial:
                pipeline.save_pretrained(partial)
                known = write_manifest(partial, "random model", config=dataclasses.asdict(model.random), inputs={})
    return dataclasses.replace(
        model, path=folder, sha256=known.files["unet/diffusion_pytorch_model.safetensors"].sha256
    )


def random_folder(random: Random) -> Path:
    """Where a model with random weights is kept."""
    return cache_folder() / "random" / slug(f"{random.family}-{random.plan or 'whole'}")
