"""How far a quantized UNet is from fp32, and how far it may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sdcompress_engines.errors import DataError, GateFailed, UsageError
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.progress import SILENT, Reporter

CHECK_TIMESTEPS = 4
"""A check over fewer moments of a trajectory says little: the error grows towards the clean end."""


@dataclass(frozen=True)
class Limit:
    """How far a quantized UNet may be from fp32, relative L2 of its prediction: on average over the timesteps, and at
    the worst of them.
    """

    mean: float
    worst: float


LIMITS: dict[str, Limit] = {"int8": Limit(0.035, 0.16), "fp8": Limit(0.06, 0.25)}
"""Twice what was measured on nano (docs/quantization.md). int8 is over it where nothing with weights is left in high
precision.
"""


# Check


@dataclass(frozen=True)
class Accuracy:
    """How far a quantized UNet's prediction is from fp32's.

    Attributes:
        precision: `int8` or `fp8`.
        relative_l2: timestep → ‖quantized − fp32‖ / ‖fp32‖ over all rows of that timestep.
        mean, worst: of those. rows: how many there were in all.
    """

    precision: str
    relative_l2: dict[float, float]
    mean: float
    worst: float
    rows: int


def check_quantized(
    quantized: Path, reference: Any, feeds: Mapping[str, np.ndarray], *, report: Reporter = SILENT
) -> Accuracy:
    """Run a quantized graph in ONNX Runtime on the CPU beside its fp32 original; the figures, which `check_accuracy`
    judges.

    Args:
        reference: a `Runner` with the same input names in fp32, or the path of an fp32 `.onnx` graph. It answers all
            rows before the quantized graph is loaded.
        feeds: rows by input name of trajectories that were not calibrated with, of at least four timesteps, as
            `collect_calibration` gives them.

    Raises:
        DataError: fewer than four timesteps. UsageError: a graph that is not quantized. EngineError, EngineMismatch: as
            `Runner.infer`.
    """
    import torch
    from sdcompress_engines.runners import OnnxRuntimeRunner, Runner

    precision = _precision_of(Path(quantized))
    times = next(values for values in feeds.values() if values.ndim == 1)
    moments = {float(time): np.flatnonzero(times == time) for time in sorted(set(times.tolist()), reverse=True)}
    if len(moments) < CHECK_TIMESTEPS:
        raise DataError(f"{len(moments)} timesteps to check at", expected=f"at least {CHECK_TIMESTEPS}")

    def answers(runner: Runner) -> list[torch.Tensor]:
        found = []
        with runner, report.task(f"checking {precision}: {runner.backend}", total=len(moments)) as advance:
            for rows in moments.values():
                chunks = [
                    {
                        spec.name: torch.from_numpy(feeds[spec.name][rows[at : at + 4]]).to(runner.device, spec.dtype)
                        for spec in runner.inputs
                    }
                    for at in range(0, len(rows), 4)
                ]
                found.append(
                    torch.cat([runner.infer(chunk)[runner.outputs[0].name].double().cpu() for chunk in chunks])
                )
                advance()
        return found

    truths = answers(reference if isinstance(reference, Runner) else OnnxRuntimeRunner(reference))
    found = answers(OnnxRuntimeRunner(quantized))
    errors = [relative_l2(a, b) for a, b in zip(found, truths, strict=True)]
    errors = [error if error == error else float("inf") for error in errors]
    return Accuracy(
        precision, dict(zip(moments, errors, strict=True)), sum(errors) / len(errors), max(errors), len(times)
    )


def _precision_of(path: Path) -> str:
    from onnx import TensorProto
    from sdcompress_engines.graph import load_structure

    held = {tensor.data_type for tensor in load_structure(path).graph.initializer}
    if not held & {TensorProto.INT8, TensorProto.FLOAT8E4M3FN}:
        raise UsageError("is not quantized", where=path, expected="a graph written by quantize_graph")
    return "fp8" if TensorProto.FLOAT8E4M3FN in held else "int8"


def check_accuracy(accuracy: Accuracy) -> None:
    """Refuse a quantized UNet that is too far from fp32.

    Raises:
        GateFailed: by how much, and the limit.
    """
    limit = LIMITS[accuracy.precision]
    if not (accuracy.mean <= limit.mean and accuracy.worst <= limit.worst):
        moment = max(accuracy.relative_l2, key=lambda time: accuracy.relative_l2[time])
        raise GateFailed(
            f"the {accuracy.precision} UNet is too far from fp32: relative L2 {accuracy.mean:.3f} on average,"
            f" {accuracy.worst:.3f} at timestep {moment:g}",
            expected=f"at most {limit.mean:g} and {limit.worst:g}",
            hint="--calibration-prompts with prompts of the kind the model is used for, or --precision fp16",
        )
