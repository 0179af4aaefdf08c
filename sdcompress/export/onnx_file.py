"""Writing the graph of a component to an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ExportError, shorten
from sdcompress_engines.signature import Signature

from sdcompress.export.components import ComponentGraph, Runtime, example_of, silence
from sdcompress.export.onnxruntime_ops import use_onnxruntime_ops
from sdcompress.export.weights import move_weights_out, name_weights
from sdcompress.lora.model_lora import LORA_COMPONENTS

OPSET = 23
"""The default opset. `Attention` and `GroupNormalization` are one node each in it.

ONNX Runtime ≥ 1.23 (on CUDA ≥ 1.25) and TensorRT ≥ 10.14 read it. Older ones need opset 20, in which attention is
several nodes.
"""

_ONE_FILE_BYTES = int(1.9e9)  # protobuf ends at 2 GiB


def write_onnx(
    graph: ComponentGraph,
    wanted: Signature,
    path: Path,
    opset: int = OPSET,
    runtime: Runtime = "any",
    origins: Mapping[str, str] | None = None,
) -> None:
    """Trace a component and write its graph.

    The parameters of a component that a LoRA can change go to `<path>.safetensors`, from where `Runner.set_weights`
    reads the original ones. Those of others go to `<path>.data` if they are over 2 GB.

    Args:
        graph: the component.
        wanted: names, order and free axes of the inputs and outputs.
        path: the file to write.
        opset: of the standard operators.
        runtime: the one that the graph is written for.
        origins: the names of a UNet's weights in the whole model, see `weights.unet_origins`.

    Raises:
        ExportError: torch could not export it, or folded a weight into a constant.
    """
    import onnx_ir as ir

    program = trace_graph(graph, wanted, opset)
    transposed = name_weights(program.model)
    program.optimize()
    if runtime == "onnxruntime":
        use_onnxruntime_ops(program.model)
    _name_ports(program.model, wanted)
    _remove_traces(program.model)
    if wanted.component in LORA_COMPONENTS:
        move_weights_out(program.model, path, graph.part, transposed, origins or {})
        ir.save(program.model, path)
        return
    large = sum(weight.numel() * weight.element_size() for weight in graph.parameters()) > _ONE_FILE_BYTES
    program.save(str(path), external_data=large)


def trace_graph(graph: ComponentGraph, wanted: Signature, opset: int) -> torch.onnx.ONNXProgram:
    """Returns a component as torch exports it, not optimized, with names of torch's own.

    Args:
        graph: the component.
        wanted: its signature, for the shapes and dtypes of the inputs.
        opset: of the standard operators.

    Raises:
        ExportError: torch could not export it.
    """
    example = example_of(wanted, graph.part.config)
    try:
        with silence(), torch.no_grad():  # without gradients the trace is faster
            program = torch.onnx.export(
                graph,
                tuple(example.inputs.values()),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=tuple(example.dynamic_shapes.values()),
                verbose=False,
                optimize=False,
            )
    except Exception as error:  # torch's exporter raises errors of many classes
        raise ExportError(
            f"torch could not export the {wanted.component} at opset {opset} ({type(error).__name__}:"
            f" {shorten(error.__cause__ or error)})",
            hint="another torch version" if opset == OPSET else f"--opset {OPSET}, or another torch version",
        ) from error
    if program is None:
        raise ExportError(f"torch exported nothing for the {wanted.component}")
    return program


def _name_ports(model: Any, wanted: Signature) -> None:
    """Give the inputs and outputs the names and axis names of a signature.

    Args:
        model: an `onnx_ir.Model`.
        wanted: the signature.
    """
    for value, spec in zip((*model.graph.inputs, *model.graph.outputs), (*wanted.inputs, *wanted.outputs), strict=True):
        value.name = spec.name
        value.shape = type(value.shape)(spec.shape)


def _remove_traces(model: Any) -> None:
    """Remove what the exporter adds to an `onnx_ir.Model`.

    These are paths of this machine, and metadata that can be half of a small file.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    ports = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in ports:  # shapes with the axis names of the trace; every runtime infers them again
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def upcast_onnx(path: Path, target: Path) -> None:
    """Write a bfloat16 graph with float32 in the place of bfloat16 and equal values.

    ONNX Runtime computes no bfloat16 on a CPU, so this graph is compared there instead.

    Args:
        path: of the bfloat16 graph.
        target: the file to write; its weights go to `<target>.data`.
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
