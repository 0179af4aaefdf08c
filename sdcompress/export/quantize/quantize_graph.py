"""The ONNX graph of a UNet in int8 or fp8, quantized by nvidia-modelopt in a process of its own.

modelopt patches ONNX Runtime, prints a lot and holds several copies of the graph in memory. The process is
`sdcompress.export.quantize.worker`.
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
from sdcompress_engines.errors import BackendMissing, ExportError, UsageError, storage_errors
from sdcompress_engines.files import replace_file
from sdcompress_engines.graph import weights_path
from sdcompress_engines.output_folders import require_space
from sdcompress_engines.progress import SILENT, Advance, Reporter

from sdcompress.export.quantize.calibration_checks import check_calibration
from sdcompress.export.quantize.nodes import KEPT
from sdcompress.export.quantize.precisions import INSTALL, PRECISIONS, HighPrecision, Quantized, missing

ONE_FILE_BYTES = int(1.9e9)
"""Larger weights are stored in a file of their own, because protobuf ends at 2 GiB."""


@dataclass(frozen=True)
class QuantizeResult:
    """What was quantized.

    Attributes:
        nodes: operator → how many nodes compute in the quantized precision.
        kept: reason → how many nodes with weights stay in high precision for it.
        seconds: of wall clock.
        bytes: of the graph with its external data.
        peak_mib: highest resident memory of the process.
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
    """Write a graph with int8 or fp8 weights, and with Q/DQ pairs before its convolutions and linear layers.

    Inputs, outputs, norms, the softmax of attention and the sums of the residual stream keep their precision. Weights
    are scaled by output channel, activations by tensor. Weights over 2 GB go to `<target>.data`.

    Args:
        source: graph of a UNet, opset 19 or later, in `high_precision`. It is only read.
        target: the file to write.
        precision: of the quantized layers.
        calibration: rows by the graph's input names; see `collect_calibration` and `rename_for_host`.
        high_precision: of all other layers.
        keep: which of the layers named in `KEPT` are not quantized.
        report: gets the progress.

    Raises:
        UsageError: no such graph, precision or layers, or a graph in another precision. DataError: calibration that
            does not fit the inputs. BackendMissing: modelopt is not installed. StorageError: no space.
            ExportError: modelopt failed or its process died. Then nothing is written, and an older `target` stays.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    _check_request(precision, keep)
    check_calibration(source, calibration, high_precision)
    require_space(target.parent, 6 * _size_bytes(source) + 2**26, f"quantizing {source.name}")
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
                figures = _run_worker(job, source, advance)
            _move_graph(Path(work) / "output" / target.name, target)
    seconds = time.monotonic() - started
    return QuantizeResult(figures["nodes"], figures["kept"], seconds, _size_bytes(target), figures["peak_mib"])


def _check_request(precision: str, keep: Collection[str]) -> None:
    if precision not in PRECISIONS:
        raise UsageError(f"no quantized precision {precision!r}", expected=" or ".join(PRECISIONS))
    if unknown := set(keep) - set(KEPT):
        raise UsageError(f"no layers {', '.join(sorted(unknown))} to keep", expected=f"some of {', '.join(KEPT)}")
    if (reason := missing()) is not None:
        raise BackendMissing(reason, hint=INSTALL)


def _move_graph(written: Path, target: Path) -> None:
    """Move a finished graph and its external data into place, and remove the data of an older graph."""
    data = target.with_name(f"{target.name}.data")
    if (written_data := written.with_name(data.name)).is_file():
        replace_file(written_data, data)
    else:
        data.unlink(missing_ok=True)
    replace_file(written, target)


def _size_bytes(path: Path) -> int:
    """Returns the size of a graph with the weights beside it."""
    files = (path, path.with_name(f"{path.name}.data"), weights_path(path))
    return sum(file.stat().st_size for file in files if file.is_file())


def _run_worker(job: Mapping[str, Any], source: Path, advance: Advance) -> dict[str, Any]:
    """Run the quantization process. Returns its figures: `nodes`, `kept` and `peak_mib`."""
    answer: dict[str, Any] = {}

    def receive(event: Mapping[str, Any]) -> None:
        answer.update(event)
        if "note" in event:
            advance(note=event["note"])

    ending = run_job(
        "sdcompress.export.quantize.worker",
        job,
        receive,
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
            hint="run it on a machine with more memory",
        )
    done: dict[str, Any] = answer["done"]
    return done
