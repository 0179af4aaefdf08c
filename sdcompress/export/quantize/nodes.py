"""Which nodes of a UNet's graph are quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

KEPT = ("timestep only", "first and last", "shortcut")
"""Layers that stay in high precision: those that see only the timestep, which have no work worth quantizing; the first
and the last convolution; the
1×1 shortcuts across resnets, which take the residual stream as it is, without a norm before them."""


def choose_nodes(graph: Any, keep: Collection[str] = KEPT) -> tuple[list[str], dict[str, int]]:
    """The names of the nodes to quantize, and why how many others with weights are not; told from the graph's
    structure, whatever its names are.

    Args:
        graph: an `onnx.GraphProto` of a UNet: its picture and its context are the inputs of more than two dimensions.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    large = {value.name for value in graph.input if len(value.type.tensor_type.shape.dim) > 2}
    depends, plain = set(large), set(large)  # what the picture or the context decides; what is an input, at most cast
    readers: Counter[str] = Counter()
    producer: dict[str, Any] = {}
    for node in graph.node:
        readers.update(node.input)
        producer |= dict.fromkeys(node.output, node)
        if node.op_type != "Shape" and depends.intersection(node.input):
            depends.update(node.output)
        if node.op_type == "Cast" and node.input[0] in plain:
            plain.update(node.output)
    last = {value.name for value in graph.output}
    last |= {producer[name].input[0] for name in last if name in producer and producer[name].op_type == "Cast"}
    chosen: list[str] = []
    kept: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm") or node.input[1] not in weights:
            continue
        is_conv = node.op_type == "Conv"
        found = {
            "timestep only": node.input[0] not in depends,
            "first and last": is_conv and (node.input[0] in plain or node.output[0] in last),
            "shortcut": is_conv and set(weights[node.input[1]].dims[2:]) == {1} and readers[node.input[0]] > 1,
        }
        if (reason := next((name for name in keep if found[name]), None)) is None:
            chosen.append(node.name)
        else:
            kept[reason] += 1
    return chosen, dict(kept)
