"""A component's graph as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ExportError
from sdcompress_engines.signature import Signature

from sdcompress.export.components import ComponentGraph, Runtime, example_of, silence
from sdcompress.export.onnxruntime_ops import use_onnxruntime_ops

OPSET = 23
"""Keeps `Attention` and `GroupNormalization` as one node each.

ONNX Runtime ≥ 1.23 (on CUDA ≥ 1.25) and TensorRT ≥ 10.14 read it.
"""

OLDER_OPSET = 20
"""For TensorRT before 10.14: attention in its parts."""

_ONE_FILE_BYTES = int(1.9e9)  # protobuf ends at 2 GiB


def write_onnx(
    graph: ComponentGraph, wanted: Signature, path: Path, opset: int = OPSET, runtime: Runtime = "any"
) -> None:
    """Trace `graph` and write it with the names, order and free axes of `wanted`; weights over 2 GB go to
    `<path>.data`.

    Args:
        runtime: whose kernels it is written for.

    Raises:
        ExportError: torch could not export it.
    """
    example = example_of(wanted, graph.part.config)
    try:
        with silence():
            program = torch.onnx.export(
                graph,
                tuple(example.inputs.values()),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=tuple(example.dynamic_shapes.values()),
                input_names=[spec.name for spec in wanted.inputs],
                output_names=[spec.name for spec in wanted.outputs],
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"torch could not export the {wanted.component} at opset {opset} ({type(error).__name__}:"
            f" {_first_lines(error)})",
            hint="--opset 23, or another torch version",
        ) from error
    if program is None:
        raise ExportError(f"torch exported nothing for the {wanted.component}")
    if runtime == "onnxruntime":
        use_onnxruntime_ops(program.model)
    _tidy(program.model, wanted)
    large = sum(p.numel() * p.element_size() for p in graph.parameters()) > _ONE_FILE_BYTES
    program.save(str(path), external_data=large)


def _tidy(model: Any, wanted: Signature) -> None:
    """The signature's axis names, and none of the traces that the exporter leaves: paths of this machine, and half of a
    small file.
    """
    for value, spec in zip((*model.graph.inputs, *model.graph.outputs), (*wanted.inputs, *wanted.outputs), strict=True):
        value.shape = type(value.shape)(spec.shape)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    kept = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in kept:  # written in the axis names of the trace; every runtime infers them again
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _first_lines(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error.__cause__ or error).split())
    return text if len(text) <= limit else text[:limit] + " ..."


def upcast_onnx(path: Path, target: Path) -> None:
    """A bfloat16 graph with every bfloat16 made float32, values kept: ONNX Runtime's CPU computes no bfloat16, so this
    is what can be compared there.
    """
    import onnx
    from sdcompress_engines.graph import tensors

    model = onnx.load(path)
    half, single = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    for tensor in tensors(model.graph):
        if tensor.data_type == half:
            bits = (
                torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.bfloat16)
                if tensor.raw_data
                else torch.tensor(list(tensor.int32_data), dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
            )
            tensor.ClearField("int32_data")
            tensor.raw_data = bits.float().numpy().tobytes()
            tensor.data_type = single
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype", "softmax_precision") and attribute.i == half:
                attribute.i = single
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data")
