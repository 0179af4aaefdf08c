"""LoRA files → a changed pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sdcompress.lora.files import read_lora
from sdcompress.lora.fuse import fuse_lora
from sdcompress.lora.names import unet_modules
from sdcompress.lora.sampling import apply_sampling
from sdcompress.support.pipeline import TextToImagePipeline


def apply_loras(pipeline: TextToImagePipeline, weighted_loras: Iterable[tuple[Path, float]]) -> None:
    """Add LoRAs to a pipeline's weights in place, and take over how a few-step LoRA draws.

    Args:
        pipeline: in torch.
        weighted_loras: files with their weights, as `parse_lora` returns them.

    Raises:
        UsageError, ModelError: as `read_lora`, `fuse_lora` and `apply_sampling`.
    """
    for file, weight in weighted_loras:
        fuse_lora(pipeline, read_lora(file, unet_modules(pipeline.unet)), weight)
        apply_sampling(pipeline, file)
