"""The error of a quantized UNet against fp32, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sdcompress_engines.errors import DataError, GateFailed, UsageError
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.runners import OnnxRuntimeRunner, Runner

CHECK_TIMESTEPS = 4
"""The least number of timesteps to check at. Fewer show little, because the error grows towards timestep 0."""


@dataclass(frozen=True)
class Limit:
    """The largest relative L2 of a quantized UNet's prediction: on average over the timesteps, and at the worst one."""

    mean: float
    worst: float


LIMITS: dict[str, Limit] = {"int8": Limit(0.035, 0.16), "fp8": Limit(0.06, 0.25)}
"""Twice the errors of nano (docs/quantization.md). int8 is over its limits if no layer stays in high precision."""

_ROWS = 4
"""Of one call."""


@dataclass(frozen=True)
class Accuracy:
    """The error of a quantized UNet's prediction against fp32.

    Attributes:
        precision: `int8` or `fp8`.
        relative_l2: timestep → ‖quantized − fp32‖ / ‖fp32‖ over all rows of that timestep.
        mean, worst: of these.
        rows: how many were compared.
    """

    precision: str
    relative_l2: dict[float, float]
    mean: float
    worst: float
    rows: int


def check_quantized(
    quantized: Path, reference: Runner | Path, feeds: Mapping[str, np.ndarray], *, report: Reporter = SILENT
) -> Accuracy:
    """Returns the error of a quantized graph against fp32, in ONNX Runtime on the CPU; `check_accuracy` judges it.

    Args:
        quantized: the graph's file.
        reference: a runner with the same input names in fp32, or the path of an fp32 `.onnx` graph. It runs all rows
            before the quantized graph is loaded.
        feeds: rows by input name, at four timesteps or more, of trajectories that were not calibrated with; see
            `collect_calibration`.
        report: gets the progress.

    Raises:
        DataError: fewer than four timesteps. UsageError: a graph that is not quantized. EngineError, EngineMismatch: as
            `Runner.infer`.
    """
    precision = _read_precision(Path(quantized))
    times = next(values for values in feeds.values() if values.ndim == 1)
    rows_by_timestep = {
        float(time): np.flatnonzero(times == time) for time in sorted(set(times.tolist()), reverse=True)
    }
    if len(rows_by_timestep) < CHECK_TIMESTEPS:
        raise DataError(f"{len(rows_by_timestep)} timesteps to check at", expected=f"at least {CHECK_TIMESTEPS}")

    def predict(runner: Runner) -> list[torch.Tensor]:
        with runner, report.task(f"checking {precision}: {runner.backend}", total=len(rows_by_timestep)) as advance:
            predictions = []
            for rows in rows_by_timestep.values():
                predictions.append(_predict(runner, feeds, rows))
                advance()
        return predictions

    references = predict(reference if isinstance(reference, Runner) else OnnxRuntimeRunner(reference))
    predictions = predict(OnnxRuntimeRunner(quantized))
    errors = [relative_l2(output, exact) for output, exact in zip(predictions, references, strict=True)]
    errors = [error if error == error else float("inf") for error in errors]
    by_time = dict(zip(rows_by_timestep, errors, strict=True))
    return Accuracy(precision, by_time, sum(errors) / len(errors), max(errors), len(times))


def _predict(runner: Runner, feeds: Mapping[str, np.ndarray], rows: np.ndarray) -> torch.Tensor:
    """Returns the prediction for some rows, (N, 4, H/8, W/8), float64, on the CPU.

    Args:
        runner: open.
        feeds: all rows by input name.
        rows: the indices of those to run.
    """
    parts = []
    for start in range(0, len(rows), _ROWS):
        chunk = {
            spec.name: torch.from_numpy(feeds[spec.name][rows[start : start + _ROWS]]).to(runner.device, spec.dtype)
            for spec in runner.inputs
        }
        parts.append(runner.infer(chunk)[runner.outputs[0].name].double().cpu())
    return torch.cat(parts)


def _read_precision(path: Path) -> str:
    from onnx import TensorProto
    from sdcompress_engines.graph import load_structure

    types = {tensor.data_type for tensor in load_structure(path).graph.initializer}
    if not types & {TensorProto.INT8, TensorProto.FLOAT8E4M3FN}:
        raise UsageError("is not quantized", where=path, expected="a graph written by quantize_graph")
    return "fp8" if TensorProto.FLOAT8E4M3FN in types else "int8"


def check_accuracy(accuracy: Accuracy) -> None:
    """Refuse a quantized UNet that is too far from fp32.

    Raises:
        GateFailed: the error is over a limit; the message has both.
    """
    limit = LIMITS[accuracy.precision]
    if not (accuracy.mean <= limit.mean and accuracy.worst <= limit.worst):
        timestep = max(accuracy.relative_l2, key=lambda time: accuracy.relative_l2[time])
        raise GateFailed(
            f"the {accuracy.precision} UNet is too far from fp32: relative L2 {accuracy.mean:.3f} on average,"
            f" {accuracy.worst:.3f} at timestep {timestep:g}",
            expected=f"at most {limit.mean:g} and {limit.worst:g}",
            hint="--calibration-prompts with prompts of the kind the model is used for, or --precision fp16",
        )
