"""A small graph with one of each layer of a UNet, and inputs for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 32


def write_small(path: Path, dtype: str = "fp16", opset: int = 23) -> Path:
    """Write a graph with one of each layer of a UNet.

    It has a first and a last convolution, a time embedding, a resnet with its shortcut, and a linear layer on the
    context.
    """
    rng = np.random.default_rng(0)
    kind, number = (np.float16, TensorProto.FLOAT16) if dtype == "fp16" else (np.float32, TensorProto.FLOAT)
    weights = {
        "time": rng.standard_normal((1, CHANNELS)) / 1000,
        "first": rng.standard_normal((CHANNELS, 4, 3, 3)) / 6,
        "body": rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) / 17,
        "shortcut": rng.standard_normal((CHANNELS, CHANNELS, 1, 1)) / 6,
        "context": rng.standard_normal((16, CHANNELS)) / 4,
        "last": rng.standard_normal((4, CHANNELS, 3, 3)) / 17,
        "scale": np.ones(CHANNELS),
        "shift": np.zeros(CHANNELS),
    }
    weights["body"][3] *= 0.01  # under what half precision's scales reach in normal numbers
    tensors = [
        numpy_helper.from_array(value.astype(np.float32 if name == "time" else kind), name)
        for name, value in weights.items()
    ]
    tensors += [
        numpy_helper.from_array(np.array(value, np.int64), name)
        for name, value in (("one", [1]), ("two_three", [2, 3]))
    ]
    nodes = [
        helper.make_node("Unsqueeze", ["timestep", "one"], ["t"]),
        helper.make_node("Gemm", ["t", "time"], ["t_embedded"], name="time"),
        helper.make_node("Cast", ["t_embedded"], ["t_cast"], to=number),
        helper.make_node("Unsqueeze", ["t_cast", "two_three"], ["t_wide"]),
        helper.make_node("Conv", ["sample", "first"], ["h0"], name="first", pads=[1] * 4),
        helper.make_node("Add", ["h0", "t_wide"], ["h"]),
        helper.make_node("GroupNormalization", ["h", "scale", "shift"], ["normed"], num_groups=4),
        helper.make_node("Sigmoid", ["normed"], ["gate"]),
        helper.make_node("Mul", ["normed", "gate"], ["active"]),
        helper.make_node("Conv", ["active", "body"], ["b"], name="body", pads=[1] * 4),
        helper.make_node("Conv", ["h", "shortcut"], ["s"], name="shortcut"),
        helper.make_node("Add", ["b", "s"], ["r"], name="sum"),
        helper.make_node("MatMul", ["encoder_hidden_states", "context"], ["k"], name="context"),
        helper.make_node("ReduceMean", ["k", "one"], ["k_mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["k_mean", "two_three"], ["k_wide"]),
        helper.make_node("Add", ["r", "k_wide"], ["with_context"]),
        helper.make_node("Conv", ["with_context", "last"], ["out_sample"], name="last", pads=[1] * 4),
    ]
    ports = [
        helper.make_tensor_value_info("sample", number, ["batch", 4, "height", "width"]),
        helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["batch"]),
        helper.make_tensor_value_info("encoder_hidden_states", number, ["batch", "tokens", 16]),
    ]
    out = helper.make_tensor_value_info("out_sample", number, ["batch", 4, "height", "width"])
    graph = helper.make_graph(nodes, "unet", ports, [out], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return path


def rows(count: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((count, 4, 8, 8)).astype(np.float32),
        "timestep": np.repeat(np.array([999, 700, 300, 1], np.float32), count // 4),
        "encoder_hidden_states": rng.standard_normal((count, 77, 16)).astype(np.float32),
    }


def dequantized(path: Path, node: str) -> np.ndarray:
    """Returns the weight that a node of a quantized graph computes with."""
    graph = onnx.load(path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor).astype(np.float32) for tensor in graph.initializer}
    producer = {name: each for each in graph.node for name in each.output}
    pair = producer[next(each for each in graph.node if each.name == node).input[1]]
    axis = pair.attribute[0].i
    values = tensors[pair.input[0]]
    return values * tensors[pair.input[1]].reshape([-1 if at == axis else 1 for at in range(values.ndim)])
