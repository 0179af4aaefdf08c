"""The process that quantizes one graph with modelopt; `quantize_graph` starts it."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sdcompress_engines.child_process import ignore_interrupts, receive_message, send_event
from sdcompress_engines.errors import shorten
from sdcompress_engines.resources import peak_rss_mib

from sdcompress.export.quantize.nodes import choose_nodes
from sdcompress.export.quantize.qdq_graph import clean_quantized, mark_types

_LATENT_PIXELS = 2048
"""Of one calibration batch."""


def _emit(**event: Any) -> None:
    if not send_event(**event):
        sys.exit(1)  # the parent is gone


def _serve() -> None:
    """Read the job, quantize the graph, and report the figures or the error."""
    ignore_interrupts()
    job = receive_message()
    if job is None:
        return
    try:
        _emit(done=_quantize(job))
    except Exception as error:  # modelopt's errors share no base class
        reason = f"{type(error).__name__}: {shorten(error)}"
        _emit(error=f"modelopt could not quantize the graph to {job['precision']} ({reason})")


def _quantize(job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures of a job: `nodes`, `kept` and `peak_mib`; see `QuantizeResult`."""
    import onnx

    work, precision = Path(job["work"]), job["precision"]
    _emit(note="reading the graph")
    model = onnx.load(job["source"])
    large = model.ByteSize() > job["one_file_bytes"]
    chosen, kept = choose_nodes(model.graph, job["keep"])
    if not chosen:
        raise ValueError("it has no convolution or linear layer to quantize")
    mark_types(model.graph)
    _save(model, work / "source" / job["name"], large)
    batches = _read_batches(work / "calibration.npz", model.graph)
    del model
    _run_modelopt(work / "source" / job["name"], work / "quantized.onnx", precision, chosen, batches, large)
    _emit(note="writing the graph")
    quantized = onnx.load(work / "quantized.onnx")
    nodes = clean_quantized(quantized.graph, set(chosen), precision)
    declined = len(chosen) - sum(nodes.values())
    _save(quantized, work / "output" / job["name"], quantized.ByteSize() > job["one_file_bytes"])
    return {
        "nodes": nodes,
        "kept": kept | ({"declined by modelopt": declined} if declined else {}),
        "peak_mib": peak_rss_mib(),
    }


def _save(model: Any, path: Path, external: bool) -> None:
    import onnx

    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path, **({"save_as_external_data": True, "location": f"{path.name}.data"} if external else {}))


def _read_batches(path: Path, graph: Any) -> list[dict[str, np.ndarray]]:
    """Returns the calibration rows in the graph's dtypes, in batches of about 2,048 latent pixels.

    Args:
        path: of the `.npz` file with an array for each input.
        graph: the `onnx.GraphProto`.
    """
    from onnx import helper

    with np.load(path) as arrays:
        dtypes = {
            value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in graph.input
        }
        rows = {name: arrays[name].astype(dtypes[name]) for name in dtypes}
    pixels = max(int(np.prod(values.shape[2:])) for values in rows.values() if values.ndim == 4)
    count, step = len(next(iter(rows.values()))), max(1, _LATENT_PIXELS // pixels)
    return [{name: values[start : start + step] for name, values in rows.items()} for start in range(0, count, step)]


class _CalibrationReader:
    """The batches as modelopt reads them; it reports the progress too."""

    def __init__(self, batches: Sequence[dict[str, np.ndarray]]) -> None:
        self._batches = batches
        self.rewind()

    def get_first(self) -> dict[str, np.ndarray]:
        return self._batches[0]

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self._next == len(self._batches):
            return None
        self._next += 1
        _emit(note=f"calibrating, {self._next} of {len(self._batches)}")
        return self._batches[self._next - 1]

    def rewind(self) -> None:
        self._next = 0


def _run_modelopt(
    source: Path,
    target: Path,
    precision: str,
    nodes: Sequence[str],
    batches: Sequence[dict[str, np.ndarray]],
    large: bool,
) -> None:
    """Quantize a graph with modelopt.

    Args:
        source, target: ONNX files.
        precision: `int8` or `fp8`.
        nodes: names of the nodes to quantize.
        batches: calibration, input → rows in the graph's dtype.
        large: whether the weights are in a file of their own.
    """
    importlib.import_module("modelopt.onnx.quantization").quantize(
        str(source),
        quantize_mode=precision,
        calibration_data_reader=_CalibrationReader(batches),
        calibration_method="max",
        calibration_eps=["cpu"],
        nodes_to_quantize=[f"{re.escape(name)}$" for name in nodes],  # patterns, matched from the start of a name
        output_path=str(target),
        use_external_data_format=large,
        high_precision_dtype="fp32",  # converts nothing: what is not quantized keeps the precision of the graph
        # Attention in separate operators has no weights to quantize. Looking for it would run the model once more.
        disable_mha_qdq=True,
        enable_gemv_detection_for_trt=False,  # needs shapes that a graph of free sizes does not have
        passes=[],  # one scale for all inputs of a Concat would widen each of them
        log_level="WARNING",
    )


if __name__ == "__main__":
    _serve()
