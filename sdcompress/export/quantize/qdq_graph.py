"""Edits of a graph before and after modelopt quantizes it. All of them change an `onnx.GraphProto` in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

_TYPED = ".typed"
_LARGEST = {"int8": np.float32(127), "fp8": np.float32(448)}
"""The largest value of a quantized precision."""


def mark_types(graph: Any) -> None:
    """Add a Cast to the same type behind each GroupNormalization.

    ONNX infers no type for the output of that operator. modelopt forgets the types in the file and knows none behind
    the first of these nodes. It then quantizes no activation there, and only its log has a warning.
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
    _replace(graph, "node", nodes)


def clean_quantized(graph: Any, chosen: Collection[str], precision: str) -> dict[str, int]:
    """Clean up the graph that modelopt wrote. Returns operator → how many of the chosen nodes are quantized.

    modelopt does not quantize all of them: in fp8 it leaves out layers of few channels.

    Args:
        graph: as modelopt wrote it.
        chosen: names of the nodes to quantize.
        precision: `int8` or `fp8`.

    Raises:
        ValueError: a chosen node has only one of its two inputs quantized, or most chosen nodes are not quantized.
    """
    _drop_type_marks(graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    counts: Counter[str] = Counter()
    weights: dict[str, tuple[Any, Any, int]] = {}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        pairs = _find_pairs(node, producer)
        if node.name in chosen and len(pairs) == 1:
            raise ValueError(f"node {node.name!r} has only one of its two inputs quantized")
        if node.name in chosen and len(pairs) == 2:
            counts[node.op_type] += 1
            weights[pairs[1][1].name] = (*pairs[1], _output_axis(node))
            continue
        # modelopt gives the dequantized value to every reader of a tensor. Norms and sums get the original value back.
        for at, (quantize, _) in pairs.items():
            node.input[at] = quantize.input[0]
    if sum(counts.values()) < len(chosen) / 2:
        raise ValueError(f"only {sum(counts.values())} of {len(chosen)} layers were quantized")
    for quantize, dequantize, axis in weights.values():
        _store_weight(tensors, quantize, dequantize, axis, precision)
    _drop_unused(graph)
    graph.ClearField("value_info")  # shapes in modelopt's own names; every runtime infers them again
    return dict(counts)


def _find_pairs(node: Any, producer: Mapping[str, Any]) -> dict[int, tuple[Any, Any]]:
    """Returns the position of each quantized input of a node → its Q and its DQ node."""
    before = {at: producer.get(name) for at, name in enumerate(node.input)}
    return {
        at: (producer[source.input[0]], source)
        for at, source in before.items()
        if source is not None and source.op_type == "DequantizeLinear"
    }


def _output_axis(node: Any) -> int:
    """Returns which axis of a node's weight is the output channels."""
    transposed = any(each.name == "transB" and each.i for each in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def _drop_type_marks(graph: Any) -> None:
    """Remove the Casts that `mark_types` added."""
    inputs = {node.output[0]: node.input[0] for node in graph.node if node.name.endswith(_TYPED)}
    names = {before: after for after, before in inputs.items()}
    nodes = [node for node in graph.node if not node.name.endswith(_TYPED)]
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    _replace(graph, "node", nodes)


def _store_weight(tensors: Mapping[str, Any], quantize: Any, dequantize: Any, axis: int, precision: str) -> None:
    """Store a quantized weight in place of the weight and its Q node, which halves the file and what a build reads.

    It is scaled again, by output channel, over the whole range of the precision, because modelopt's fp8 weights reach
    36 of 448. So do its activations, which keep that scale: a value twelve times the calibrated one does not saturate.

    Args:
        tensors: the initializers of the graph, by name.
        quantize, dequantize: the nodes of the weight.
        axis: of the weight's output channels.
        precision: `int8` or `fp8`.
    """
    import ml_dtypes
    from onnx import helper, numpy_helper

    weight, scale, zero = (tensors[name] for name in quantize.input)
    values = numpy_helper.to_array(weight).astype(np.float32)
    dtype = numpy_helper.to_array(scale).dtype
    largest = _LARGEST[precision]
    amax = np.abs(values).max(axis=tuple(at for at in range(values.ndim) if at != axis), keepdims=True)
    scales = np.maximum(amax / largest, np.finfo(dtype).smallest_subnormal).astype(dtype)
    scaled = np.clip(values / scales.astype(np.float32), -largest, largest)
    quantized: Any = np.rint(scaled).astype(np.int8) if precision == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn)
    weight.CopyFrom(numpy_helper.from_array(quantized, weight.name))
    scale.CopyFrom(numpy_helper.from_array(scales.reshape(-1), scale.name))
    zero.CopyFrom(numpy_helper.from_array(np.zeros(scales.size, quantized.dtype), zero.name))
    dequantize.input[0] = weight.name
    dequantize.ClearField("attribute")
    dequantize.attribute.append(helper.make_attribute("axis", axis))


def _drop_unused(graph: Any) -> None:
    """Remove nodes whose outputs no node reads, from the end on, and then tensors that no node reads."""
    read = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            nodes.append(node)
            read.update(node.input)
    _replace(graph, "node", nodes[::-1])
    _replace(graph, "initializer", [tensor for tensor in graph.initializer if tensor.name in read])


def _replace(graph: Any, field: str, values: list[Any]) -> None:
    """Put these messages in the place of all in a repeated field."""
    graph.ClearField(field)
    getattr(graph, field).extend(values)
