"""Prepares the models of a suite; those with random weights are created first."""

from __future__ import annotations

import dataclasses
from pathlib import Path

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
        StorageError: there is no room for it.
    """
    from sdcompress.models.locate import hash_pipeline, locate_pipeline

    if model.random is None:
        return model if model.sha256 else dataclasses.replace(model, sha256=hash_pipeline(locate_pipeline(model.path)))
    folder = random_folder(model.random)
    known = read_manifest(folder) if folder.is_dir() else None
    if known is None:
        import torch

        from sdcompress.models.random import random_pipeline

        with report.task(f"creating {model.name} with random weights"):
            pipeline = random_pipeline(model.random.family, model.random.plan, dtype=torch.float16)
            parts = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
            require_space(
                folder, sum(2 * p.numel() for part in parts for p in part.parameters()), f"a random {model.name}"
            )
            with unless_present(folder), staged(folder) as partial:
                pipeline.save_pretrained(partial)
                known = write_manifest(partial, "random model", config=dataclasses.asdict(model.random), inputs={})
    return dataclasses.replace(
        model, path=folder, sha256=known.files["unet/diffusion_pytorch_model.safetensors"].sha256
    )


def random_folder(random: Random) -> Path:
    """Returns the folder of a model with random weights."""
    return cache_folder() / "random" / slug(f"{random.family}-{random.plan or 'whole'}")
