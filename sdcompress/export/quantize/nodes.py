"""Which nodes of a UNet's graph are quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

KEPT = ("timestep only", "first and last", "shortcut")
"""Layers that stay in high precision.

They are: layers that depend on the timestep alone, which have little work to save; the first and the last convolution;
and the 1×1 shortcuts across resnets, whose input is the residual stream without a norm.
"""


def choose_nodes(graph: Any, keep: Collection[str] = KEPT) -> tuple[list[str], dict[str, int]]:
    """Returns the names of the nodes to quantize, and reason → how many other nodes with weights stay as they are.

    The choice depends on the structure of the graph, not on its names.

    Args:
        graph: an `onnx.GraphProto` of a UNet. Its inputs of more than two dimensions are the latents and the context.
        keep: which of the layers named in `KEPT` are not quantized.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    places = _find_places(graph)
    chosen: list[str] = []
    kept: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm") or node.input[1] not in weights:
            continue
        is_conv = node.op_type == "Conv"
        is_first_or_last = node.input[0] in places.inputs or node.output[0] in places.outputs
        kernel = set(weights[node.input[1]].dims[2:])
        applies = {
            "timestep only": node.input[0] not in places.large,
            "first and last": is_conv and is_first_or_last,
            "shortcut": is_conv and kernel == {1} and places.readers[node.input[0]] > 1,
        }
        reason = next((name for name in keep if applies[name]), None)
        if reason is None:
            chosen.append(node.name)
        else:
            kept[reason] += 1
    return chosen, dict(kept)


@dataclass(frozen=True)
class _Places:
    """Where the tensors of a graph are.

    Attributes:
        large: tensors that depend on the latents or the context.
        inputs: the latents and the context, and their casts.
        outputs: the outputs of the graph, and what is cast to them.
        readers: tensor → how many nodes read it.
    """

    large: set[str]
    inputs: set[str]
    outputs: set[str]
    readers: Counter[str]


def _find_places(graph: Any) -> _Places:
    first = {value.name for value in graph.input if len(value.type.tensor_type.shape.dim) > 2}
    places = _Places(set(first), set(first), {value.name for value in graph.output}, Counter())
    producer: dict[str, Any] = {}
    for node in graph.node:
        places.readers.update(node.input)
        producer |= dict.fromkeys(node.output, node)
        if node.op_type != "Shape" and places.large.intersection(node.input):
            places.large.update(node.output)
        if node.op_type == "Cast" and node.input[0] in places.inputs:
            places.inputs.update(node.output)
    casts = (producer[name] for name in tuple(places.outputs) if name in producer)
    places.outputs.update(node.input[0] for node in casts if node.op_type == "Cast")
    return places
