"""Whether a graph can be quantized, and whether calibration rows fit its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sdcompress_engines.errors import DataError, UsageError

from sdcompress.export.quantize.precisions import PRECISIONS

LEAST_OPSET = 19
"""The first with Q/DQ nodes for fp16 and fp8."""


def check_calibration(source: Path, calibration: Mapping[str, np.ndarray], high_precision: str) -> None:
    """Refuse a graph that cannot be quantized, and calibration that does not fit its inputs.

    Args:
        source: ONNX file of a UNet.
        calibration: rows by input name, (N, ...), float32.
        high_precision: `fp16` or `fp32`, the precision of the graph.

    Raises:
        UsageError: the graph is not there, too old or in another precision. DataError: the rows.
    """
    from sdcompress_engines.graph import load_structure

    model = load_structure(source)
    _check_graph(model, source, high_precision)
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    if set(calibration) != set(inputs):
        raise DataError(
            f"calibration of {', '.join(calibration) or 'nothing'}",
            where=source,
            expected=f"an array for each input: {', '.join(inputs)}",
        )
    counts = {name: len(values) for name, values in calibration.items()}
    if len(set(counts.values())) != 1 or not all(counts.values()):
        raise DataError(
            f"calibration rows {counts}", where=source, expected="the same number for each input, at least one"
        )
    for name, values in calibration.items():
        _check_values(source, name, values, [size.dim_value or None for size in inputs[name].shape.dim])


def _check_graph(model: Any, source: Path, high_precision: str) -> None:
    """Refuse an old graph, or one in another precision.

    Args:
        model: the `onnx.ModelProto`.
        source: its file, for the message.
        high_precision: expected of its output.
    """
    import onnx

    types: dict[str, Any] = {"fp16": onnx.TensorProto.FLOAT16, "fp32": onnx.TensorProto.FLOAT}
    if high_precision not in types:
        raise UsageError(
            f"no precision {high_precision!r} around {' or '.join(PRECISIONS)}", expected=" or ".join(types)
        )
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    if opset < LEAST_OPSET:
        raise UsageError(
            f"a graph of opset {opset}",
            where=source,
            expected=f"at least {LEAST_OPSET}",
            hint="--opset 20 or --opset 23",
        )
    output = model.graph.output[0].type.tensor_type.elem_type
    if output != types[high_precision]:
        raise UsageError(
            f"a graph in {onnx.TensorProto.DataType.Name(output).lower()}", where=source, expected=high_precision
        )


def _check_values(source: Path, name: str, values: np.ndarray, shape: list[int | None]) -> None:
    """Refuse rows of another shape, or with values that are not finite.

    Args:
        source: the graph's file, for the message.
        name: of the input.
        values: its rows.
        shape: of the input; None for a free size.
    """
    fits = len(shape) == values.ndim and all(
        size in (None, given) for size, given in zip(shape, values.shape, strict=True)
    )
    if not fits:
        raise DataError(
            f"calibration of {name} with shape {values.shape}",
            where=source,
            expected=f"({', '.join(str(size or 'any') for size in shape)})",
        )
    if not np.isfinite(values).all():
        raise DataError(
            f"calibration of {name} with values that are not finite",
            where=source,
            hint="calibrate with the pipeline in fp32",
        )
