"""The UNet of a pipeline in int8 or fp8: calibrated, quantized and compared with fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.runners import TorchRunner

from sdcompress.export.components import component_graph, signature_of
from sdcompress.export.quantize.calibrate import (
    calibration_steps,
    collect_calibration,
    default_prompts,
    rename_for_host,
)
from sdcompress.export.quantize.check import Accuracy, check_quantized
from sdcompress.export.quantize.precisions import Quantized
from sdcompress.export.quantize.quantize_graph import QuantizeResult, quantize_graph
from sdcompress.families.sampling_defaults import sampling_defaults
from sdcompress.support.pipeline import TextToImagePipeline

_HELD_OUT_SEED = 1000
"""The noise of the prompts to check with differs from that of the calibration."""


@dataclass(frozen=True)
class QuantizedUNet:
    """What was quantized, and how far the result is from fp32 on trajectories of other prompts."""

    quantized: QuantizeResult
    accuracy: Accuracy

    def to_figures(self) -> dict[str, Any]:
        """Returns it as an export's manifest holds it."""
        return asdict(self)


def quantize_unet(
    pipeline: TextToImagePipeline,
    precision: Quantized,
    source: Path,
    target: Path,
    *,
    host: str = "diffusers",
    prompts: Sequence[str] | None = None,
    report: Reporter = SILENT,
) -> QuantizedUNet:
    """Quantize the fp16 graph of a pipeline's UNet.

    Args:
        pipeline: in torch; it draws the calibration, on the GPU where there is one.
        precision: of the quantized layers.
        source: the graph of its UNet in fp16.
        target: the file to write.
        host: whose input names the graph has.
        prompts: to calibrate with; None takes `default_prompts`.
        report: gets the progress.

    Raises:
        DataError, ExportError, StorageError: as `quantize_graph` and `collect_calibration`.
    """
    calibration_prompts, held_out = default_prompts(pipeline)
    device = pipeline.unet.device
    if torch.cuda.is_available():
        pipeline.to("cuda")
    rows = collect_calibration(pipeline, prompts or calibration_prompts, report=report)
    samples = min(4, calibration_steps(sampling_defaults(pipeline))) * len(held_out)
    feeds = collect_calibration(pipeline, held_out, samples=samples, seed=_HELD_OUT_SEED, report=report)
    pipeline.to(device)
    exact = signature_of("unet", pipeline.unet, "fp32", host)
    calibration = rename_for_host(rows, exact.names, pipeline.unet)
    result = quantize_graph(source, target, precision, calibration, high_precision="fp16", report=report)
    reference = TorchRunner(component_graph("unet", pipeline.unet, torch.float32), exact.inputs, exact.outputs)
    held_out_rows = rename_for_host(feeds, exact.names, pipeline.unet)
    return QuantizedUNet(result, check_quantized(target, reference, held_out_rows, report=report))
