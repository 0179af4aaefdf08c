"""A UNet's ONNX graph → the same graph in int8 or fp8, by nvidia-modelopt in a process of its own.

modelopt patches ONNX Runtime, prints a great deal and holds the graph several times over.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sdcompress_engines.errors as engines_errors
from sdcompress_engines.child_process import describe_exit, run_job
from sdcompress_engines.errors import BackendMissing, DataError, ExportError, UsageError, storage_errors
from sdcompress_engines.files import replace_file
from sdcompress_engines.manifest import require_space
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.export.quantize.nodes import KEPT
from sdcompress.export.quantize.precisions import INSTALL, PRECISIONS, HighPrecision, Quantized, missing

LEAST_OPSET = 19
"""The first with Q/DQ nodes for fp16 and fp8."""

ONE_FILE_BYTES = int(1.9e9)
"""Weights over this lie in a file of their own: protobuf ends at 2 GiB."""


# Quantization


@dataclass(frozen=True)
class QuantizeResult:
    """What was quantized.

    Attributes:
        nodes: operator → how many nodes compute in the quantized precision.
        kept: why a node with weights stays in high precision → how many do.
        seconds: wall clock. bytes: of the graph with its external data. peak_mib: highest memory of the process that
            did it.
    """

    nodes: dict[str, int]
    kept: dict[str, int]
    seconds: float
    bytes: int
    peak_mib: float


def quantize_graph(
    source: Path,
    target: Path,
    precision: Quantized,
    calibration: Mapping[str, np.ndarray],
    *,
    high_precision: HighPrecision,
    keep: Collection[str] = KEPT,
    report: Reporter = SILENT,
) -> QuantizeResult:
    """Write `target`: `source` with int8 or fp8 weights, and Q/DQ pairs before its convolutions and linear layers;
    weights over 2 GB go to `<target>.data`.

    Inputs, outputs, norms, attention's softmax and the sums of the residual stream stay as they are. Weights are scaled
    by output channel, activations by tensor.

    Args:
        source: a UNet's graph of opset 19 or later, in `high_precision`. It is only read.
        calibration: rows by the graph's input names, as `collect_calibration` gives them and `named_for` names them.
        keep: which of the layers named in `KEPT` are not quantized.

    Raises:
        UsageError: no such graph, precision or layers, or a graph in another precision. DataError: calibration that
            does not fit the inputs. BackendMissing: no modelopt.
        StorageError: no space. ExportError: modelopt failed or its process died. In every case nothing is left, and an
            older `target` stays.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    if precision not in PRECISIONS:
        raise UsageError(f"no quantized precision {precision!r}", expected=" or ".join(PRECISIONS))
    if unknown := set(keep) - set(KEPT):
        raise UsageError(f"no layers {', '.join(sorted(unknown))} to keep", expected=f"some of {', '.join(KEPT)}")
    if (reason := missing()) is not None:
        raise BackendMissing(reason, hint=INSTALL)
    _check_calibration(source, calibration, high_precision)
    size = _bytes(source)
    require_space(target.parent, 6 * size + 2**26, f"quantizing {source.name}")
    started = time.monotonic()
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as work:
            np.savez(Path(work) / "calibration.npz", **calibration)  # type: ignore[arg-type]
            job = {
                "source": str(source),
                "work": work,
                "name": target.name,
                "precision": precision,
                "keep": list(keep),
                "one_file_bytes": ONE_FILE_BYTES,
            }
            with report.task(f"quantizing {source.name} to {precision}") as advance:
                done = _run_child(job, source, advance)
            made = Path(work) / "made" / target.name
            data = target.with_name(f"{target.name}.data")
            if (held := made.with_name(data.name)).is_file():
                replace_file(held, data)
            else:
                data.unlink(missing_ok=True)
            replace_file(made, target)
    return QuantizeResult(done["nodes"], done["kept"], time.monotonic() - started, _bytes(target), done["peak_mib"])


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.is_file())


def _check_calibration(source: Path, calibration: Mapping[str, np.ndarray], high_precision: str) -> None:
    import onnx
    from sdcompress_engines.graph import load_structure

    names = {"fp16": onnx.TensorProto.FLOAT16, "fp32": onnx.TensorProto.FLOAT}
    if high_precision not in names:
        raise UsageError(
            f"no precision {high_precision!r} around {' or '.join(PRECISIONS)}", expected=" or ".join(names)
        )
    model = load_structure(source)
    graph = model.graph
    if (
        opset := next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    ) < LEAST_OPSET:
        raise UsageError(
            f"a graph of opset {opset}",
            where=source,
            expected=f"at least {LEAST_OPSET}",
            hint="--opset 20 or --opset 23",
        )
    inputs = {value.name: value.type.tensor_type for value in graph.input}
    found = graph.output[0].type.tensor_type.elem_type
    if found != names[high_precision]:
        raise UsageError(
            f"a graph in {onnx.TensorProto.DataType.Name(found).lower()}", where=source, expected=high_precision
        )
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
        wanted = [size.dim_value or None for size in inputs[name].shape.dim]
        if len(wanted) != values.ndim or any(
            size not in (None, have) for size, have in zip(wanted, values.shape, strict=True)
        ):
            raise DataError(
                f"calibration of {name} with shape {values.shape}",
                where=source,
                expected=f"({', '.join(str(size or 'any') for size in wanted)})",
            )
        if not np.isfinite(values).all():
            raise DataError(
                f"calibration of {name} with values that are not finite",
                where=source,
                hint="calibrate with the pipeline in fp32",
            )


def _run_child(job: Mapping[str, Any], source: Path, advance: Any) -> dict[str, Any]:
    """Run the quantization process. Returns its figures: `nodes`, `kept` and `peak_mib`."""
    answer: dict[str, Any] = {}

    def take(event: Mapping[str, Any]) -> None:
        answer.update(event)
        if "note" in event:
            advance(note=event["note"])

    ending = run_job(
        "sdcompress.export.quantize.worker",
        job,
        take,
        paths=(Path(__file__).parents[3], Path(engines_errors.__file__).parents[1]),
        environment={"TMPDIR": job["work"]},
        folder=Path(job["work"]),
    )
    if "error" in answer:
        raise ExportError(
            answer["error"], where=source, hint="another version of nvidia-modelopt; 0.47 is the one that was tested"
        )
    if ending.status or "done" not in answer:
        raise ExportError(
            f"{describe_exit(ending.status, 'the quantization process')}: {' '.join(ending.output) or 'no output'}",
            where=source,
            hint="a machine with more memory, or fewer calibration samples",
        )
    done: dict[str, Any] = answer["done"]
    return done
