"""LoRA files → a changed pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.lora.fuse import fuse_lora, shapes_of
from sdcompress.lora.model_lora import LORA_COMPONENTS, read_model_lora
from sdcompress.lora.sampling import apply_sampling
from sdcompress.prune.plan import BlockPlan
from sdcompress.support.pipeline import TextToImagePipeline


def apply_loras(
    pipeline: TextToImagePipeline,
    weighted_loras: Iterable[tuple[Path, float]],
    plan: BlockPlan | None = None,
    report: Reporter = SILENT,
) -> None:
    """Add LoRAs to a pipeline's weights in place, and take over how a few-step LoRA draws.

    Args:
        pipeline: in torch.
        weighted_loras: files with their weights, as `parse_lora` returns them.
        plan: from the whole model to a student, for LoRAs of the whole model.
        report: gets a line about each LoRA that was carried over to a student.

    Raises:
        UsageError, ModelError: as `read_model_lora`, `fuse_lora` and `apply_sampling`.
    """
    networks = {name: shapes_of(getattr(pipeline, name, None)) for name in LORA_COMPONENTS}
    for file, weight in weighted_loras:
        lora = read_model_lora(file, networks, plan)
        if (line := lora.describe(file, plan)) is not None:
            report.show_line(line)
        fuse_lora(pipeline, lora.layers, weight)
        apply_sampling(pipeline, file)
