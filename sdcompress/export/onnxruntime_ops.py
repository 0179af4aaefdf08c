"""Replacement of operators that ONNX Runtime has no CUDA kernel for.

`GroupNormalization` has no kernel in ONNX Runtime, which computes it as 22 operators. They are about eight passes over
the tensor in fp32. Their variance is the mean of the squares minus the square of the mean, which loses digits if the
mean is large. `InstanceNormalization` has a CUDA kernel up to opset 21 only, but attention is one operator from opset
23 on. `LayerNormalization` has a CUDA kernel in every precision.

`ArgMax` has no CUDA kernel for integers. `Resize` has no kernel for bfloat16, on CUDA or on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_WITHOUT_KERNEL = {"ArgMax": ("INT32", "INT64"), "Resize": ("BFLOAT16",)}
"""Operator → types of its first input for which it is computed in fp32."""


def use_onnxruntime_ops(model: Any) -> None:
    """Replace in place what ONNX Runtime's CUDA provider would compute in many small operators, or on the CPU.

    Other runtimes can run the result too, but TensorRT then does not use its kernel for group norms.

    Args:
        model: an `onnx_ir.Model` with the shapes and types of its values.
    """
    graph = model.graph
    for node in list(graph):
        x = node.inputs[0] if node.inputs else None
        if x is None or x.dtype is None:
            continue
        if node.op_type == "GroupNormalization" and x.shape is not None:
            _split_group_norm(graph, node)
        elif x.dtype.name in _WITHOUT_KERNEL.get(node.op_type, ()):
            _compute_in_fp32(graph, node)


def _split_group_norm(graph: Any, node: Any) -> None:
    """Replace a group norm by a layer norm over each group, followed by the scale and bias of each channel.

    The group norm is `y = scale · (x - mean) / sqrt(variance + epsilon) + bias`, with the mean and variance of a group
    (Wu and He 2018, arXiv 1803.08494).
    """
    x, scale, bias = node.inputs
    parts = _Parts(graph, node)
    channelwise = _constant(graph, f"channelwise_{len(x.shape)}", np.array([-1] + [1] * (len(x.shape) - 2), np.int64))
    groups = node.attributes["num_groups"].as_int()
    grouped = parts.add("Reshape", [x, _constant(graph, f"groups_{groups}", np.array([0, groups, -1], np.int64))])
    length = parts.add("Shape", [grouped], {"start": 2})
    ones = parts.add("Expand", [_one(graph, x.dtype), length])
    normed = parts.add(
        "LayerNormalization", [grouped, ones], {"axis": -1, "epsilon": node.attributes["epsilon"].as_float()}
    )
    whole = parts.add("Reshape", [normed, parts.add("Shape", [x])])
    scaled = parts.add("Mul", [whole, parts.add("Reshape", [scale, channelwise])])
    parts.replace_node(parts.add("Add", [scaled, parts.add("Reshape", [bias, channelwise])]))


def _compute_in_fp32(graph: Any, node: Any) -> None:
    """Put an operator between two casts. fp32 holds every bfloat16, and integers up to 2²⁴: flags and token ids."""
    import onnx_ir as ir

    x, *others = node.inputs
    parts = _Parts(graph, node)
    result = parts.add(node.op_type, [parts.add("Cast", [x], {"to": int(ir.DataType.FLOAT)}), *others], node.attributes)
    if node.outputs[0].dtype == x.dtype and node.op_type != "ArgMax":
        result = parts.add("Cast", [result], {"to": int(x.dtype)})
    parts.replace_node(result)


class _Parts:
    """New nodes that replace a node; their names begin with its name."""

    def __init__(self, graph: Any, node: Any) -> None:
        self._graph, self._node = graph, node
        self._nodes: list[Any] = []

    def add(self, operator: str, inputs: list[Any], attributes: Mapping[str, Any] | None = None) -> Any:
        """Returns the output of a new node."""
        import onnx_ir as ir

        name = f"{self._node.outputs[0].name}_{len(self._nodes)}_{operator.lower()}"
        node = ir.node(operator, inputs, attributes, outputs=[ir.Value(name=name)], name=f"node_{name}")
        self._nodes.append(node)
        return node.outputs[0]

    def replace_node(self, output: Any) -> None:
        """Put the new nodes into the graph. `output` takes the place, name and type of the old node's output."""
        import onnx_ir as ir

        old = self._node.outputs
        ir.convenience.replace_nodes_and_values(self._graph, self._node, [self._node], self._nodes, old, [output])


def _constant(graph: Any, name: str, array: np.ndarray[Any, Any]) -> Any:
    """Returns the initializer of that name, which all nodes of a graph share."""
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor: Any = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]


def _one(graph: Any, dtype: Any) -> Any:
    return _constant(graph, f"one_{dtype.name.lower()}", np.ones(1, dtype.numpy()))
