"""The process that quantizes one graph: see `sdcompress_engines.child_process`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sdcompress_engines.child_process import ignore_interrupts, receive_message, send_event
from sdcompress_engines.resources import peak_rss_mib

from sdcompress.export.quantize.nodes import choose_nodes


def _emit(**event: Any) -> None:
    if not send_event(**event):
        sys.exit(1)  # the parent is gone


def _child() -> None:
    ignore_interrupts()
    job = receive_message()
    if job is None:
        return
    try:
        _emit(done=_quantize(job))
    except Exception as error:
        _emit(
            error=(
                f"modelopt could not quantize the graph to {job['precision']} ({type(error).__name__}:"
                f" {' '.join(str(error).split())[:300]})"
            )
        )


def _quantize(job: Mapping[str, Any]) -> dict[str, Any]:
    import onnx

    work, precision = Path(job["work"]), job["precision"]
    _emit(note="reading the graph")
    model = onnx.load(job["source"])
    large = model.ByteSize() > job["one_file_bytes"]
    chosen, kept = choose_nodes(model.graph, job["keep"])
    if not chosen:
        raise ValueError("it has no convolution or linear layer to quantize")
    _mark_types(model.graph)
    _save(model, work / "source" / job["name"], large)
    batches = _batches(work / "calibration.npz", model.graph)
    del model
    _calibrate(work / "source" / job["name"], work / "quantized.onnx", precision, chosen, batches, large)
    _emit(note="writing the graph")
    made = onnx.load(work / "quantized.onnx")
    nodes = _finish(made.graph, set(chosen), precision)
    declined = len(chosen) - sum(nodes.values())
    _save(made, work / "made" / job["name"], made.ByteSize() > job["one_file_bytes"])
    return {
        "nodes": nodes,
        "kept": kept | ({"declined by modelopt": declined} if declined else {}),
        "peak_mib": peak_rss_mib(),
    }


def _save(model: Any, path: Path, external: bool) -> None:
    import onnx

    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path, **({"save_as_external_data": True, "location": f"{path.name}.data"} if external else {}))


_TYPED = ".typed"


def _mark_types(graph: Any) -> None:
    """A Cast to its own type behind each GroupNormalization.

    ONNX infers no type for that operator's output. modelopt forgets the types the file gives, knows none behind the
    first of these nodes, and then leaves every activation there unquantized with nothing but a warning in its log.
    """
    from onnx import helper

    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "GroupNormalization":
            name = node.output[0]
            node.output[0] = name + _TYPED
            nodes.append(helper.make_node("Cast", [name + _TYPED], [name], name=name + _TYPED, to=types[node.input[1]]))
    graph.ClearField("node")
    graph.node.extend(nodes)


def _batches(path: Path, graph: Any) -> list[dict[str, np.ndarray]]:
    """The calibration rows in the graph's dtypes, as many at once as 2,048 latent places are."""
    from onnx import helper

    with np.load(path) as arrays:
        dtypes = {
            value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in graph.input
        }
        rows = {name: arrays[name].astype(dtypes[name]) for name in dtypes}
    places = max(int(np.prod(values.shape[2:])) for values in rows.values() if values.ndim == 4)
    count, step = len(next(iter(rows.values()))), max(1, 2048 // places)
    return [{name: values[start : start + step] for name, values in rows.items()} for start in range(0, count, step)]


class _Reader:
    """What modelopt asks for batches, and our progress."""

    def __init__(self, batches: Sequence[dict[str, np.ndarray]]) -> None:
        self._batches = batches
        self.rewind()

    def get_first(self) -> dict[str, np.ndarray]:
        return self._batches[0]

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self._at == len(self._batches):
            return None
        self._at += 1
        _emit(note=f"calibrating, {self._at} of {len(self._batches)}")
        return self._batches[self._at - 1]

    def rewind(self) -> None:
        self._at = 0


def _calibrate(
    source: Path,
    target: Path,
    precision: str,
    nodes: Sequence[str],
    batches: Sequence[dict[str, np.ndarray]],
    large: bool,
) -> None:
    import re

    importlib.import_module("modelopt.onnx.quantization").quantize(
        str(source),
        quantize_mode=precision,
        calibration_data_reader=_Reader(batches),
        calibration_method="max",
        calibration_eps=["cpu"],
        nodes_to_quantize=[f"{re.escape(name)}$" for name in nodes],  # it takes patterns, and those by their beginning
        output_path=str(target),
        use_external_data_format=large,
        high_precision_dtype="fp32",  # converts nothing: what is not quantized stays in the precision the graph has
        # attention in its parts has no weights to quantize; looking for it would run the model once more
        disable_mha_qdq=True,
        enable_gemv_detection_for_trt=False,  # needs shapes that a graph of free sizes does not have
        passes=[],  # one scale for all that a Concat joins would widen each of them
        log_level="WARNING",
    )


def _finish(graph: Any, chosen: Collection[str], precision: str) -> dict[str, int]:
    """Clean modelopt's graph in place; operator → how many of the chosen nodes are quantized.

    It declines some of itself: fp8 with few channels.

    Raises:
        ValueError: a chosen node has only one of its two inputs quantized, or most have none.
    """
    _drop_casts(graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    done: Counter[str] = Counter()
    stored: dict[str, tuple[Any, Any, int]] = {}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        pairs = {}  # position → its Q and DQ node
        for at, name in enumerate(node.input):
            after = producer.get(name)
            if after is not None and after.op_type == "DequantizeLinear":
                pairs[at] = producer[after.input[0]], after
        if node.name in chosen and len(pairs) == 1:
            raise ValueError(f"node {node.name!r} has only one of its two inputs quantized")
        if node.name in chosen and len(pairs) == 2:
            done[node.op_type] += 1
            stored[pairs[1][1].name] = (*pairs[1], _output_axis(node))
            continue
        # modelopt gives the dequantized value to whoever reads the tensor. Norms and sums beside a chosen node get back
        # what was meant for them.
        for at, (quantize, _) in pairs.items():
            node.input[at] = quantize.input[0]
    if sum(done.values()) < len(chosen) / 2:
        raise ValueError(f"only {sum(done.values())} of {len(chosen)} layers were quantized")
    for quantize, dequantize, axis in stored.values():
        _store_weight(tensors, quantize, dequantize, axis, precision)
    _drop_unused(graph)
    graph.ClearField("value_info")  # shapes with names of modelopt's making; every runtime infers them again
    return dict(done)


def _output_axis(node: Any) -> int:
    """Which axis of a node's weight its output channels are."""
    transposed = any(each.name == "transB" and each.i for each in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def _drop_casts(graph: Any) -> None:
    own = {node.output[0]: node.input[0] for node in graph.node if node.name.endswith(_TYPED)}
    back = {before: after for after, before in own.items()}
    nodes = [node for node in graph.node if not node.name.endswith(_TYPED)]
    for node in nodes:
        node.input[:] = [back.get(name, name) for name in node.input]
        node.output[:] = [back.get(name, name) for name in node.output]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _store_weight(tensors: Mapping[str, Any], quantize: Any, dequantize: Any, axis: int, precision: str) -> None:
    """Put the quantized weight in the place of the weight and its Q node, which halves the file and what a build reads.

    Scaled anew, by output channel, over the whole range of the precision: modelopt's fp8 weights reach 36 of 448. Its
    activations do too, and keep that room: a value twelve times what was calibrated with does not saturate.
    """
    import ml_dtypes
    from onnx import helper, numpy_helper

    weight, scale, zero = (tensors[name] for name in quantize.input)
    values = numpy_helper.to_array(weight).astype(np.float32)
    dtype = numpy_helper.to_array(scale).dtype
    largest = np.float32(127 if precision == "int8" else 448)
    amax = np.abs(values).max(axis=tuple(at for at in range(values.ndim) if at != axis), keepdims=True)
    scales = np.maximum(amax / largest, np.finfo(dtype).smallest_subnormal).astype(dtype)
    scaled = np.clip(values / scales.astype(np.float32), -largest, largest)
    found: Any = np.rint(scaled).astype(np.int8) if precision == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn)
    weight.CopyFrom(numpy_helper.from_array(found, weight.name))
    scale.CopyFrom(numpy_helper.from_array(scales.reshape(-1), scale.name))
    zero.CopyFrom(numpy_helper.from_array(np.zeros(scales.size, found.dtype), zero.name))
    dequantize.input[0] = weight.name
    dequantize.ClearField("attribute")
    dequantize.attribute.append(helper.make_attribute("axis", axis))


def _drop_unused(graph: Any) -> None:
    """Drop nodes whose outputs nobody reads, from the end on, and then tensors nobody reads."""
    read = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            nodes.append(node)
            read.update(node.input)
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    graph.ClearField("node")
    graph.node.extend(reversed(nodes))
    graph.ClearField("initializer")
    graph.initializer.extend(tensors)


if __name__ == "__main__":
    _child()
