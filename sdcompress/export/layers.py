"""The layers at which two graphs of one component begin to differ, found with Polygraphy.

A parity gate compares the outputs of a graph only. Where it fails, this shows in which layer the error begins.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.graph import load_structure
from sdcompress_engines.runners.onnxruntime_install import missing as onnxruntime_missing

from sdcompress.export.components import Precision, component_graph, random_inputs, signature_of
from sdcompress.export.onnx_file import upcast_onnx, write_onnx
from sdcompress.export.parity import default_cases
from sdcompress.export.settings import ExportSettings


@dataclass(frozen=True)
class LayerDifference:
    """A layer whose output differs between two graphs.

    Attributes:
        tensor: name of its output.
        node: name of the node. operator: its type.
        relative_l2: of its output.
    """

    tensor: str
    node: str
    operator: str
    relative_l2: float

    def __str__(self) -> str:
        return f"{self.operator} {self.node} (relative L2 {self.relative_l2:.1e})"


def find_first_layer(
    component: str, part: torch.nn.Module, settings: ExportSettings, graph: Path, limit: float
) -> LayerDifference | None:
    """Export a component again in fp32, and return the first layer at which a graph of it differs from that one.

    None is returned where no layer differs, or where Polygraphy or ONNX Runtime is not installed.

    Args:
        component: a key of `PARTS`.
        part: the module that it is a part of.
        settings: of the export that wrote the graph.
        graph: its file.
        limit: largest relative L2 of an equal layer.
    """
    if importlib.util.find_spec("polygraphy") is None or onnxruntime_missing() is not None:
        return None
    precision = settings.precisions[component]
    exact = signature_of(component, part, "fp32", settings.host)
    with tempfile.TemporaryDirectory(prefix=f".{graph.name}.", dir=graph.parent) as folder:
        reference = Path(folder) / "reference.onnx"
        write_onnx(component_graph(component, part, torch.float32), exact, reference, settings.opset, settings.runtime)
        graph = _readable_graph(graph, precision, Path(folder))
        for case in default_cases(exact, part.config):
            feeds = random_inputs(exact, part.config, case.sizes, case.timestep)
            if layers := first_differing_layers(graph, reference, feeds, limit, count=1):
                return layers[0]
    return None


def _readable_graph(graph: Path, precision: Precision, folder: Path) -> Path:
    """Returns the graph, or one of equal values that ONNX Runtime computes on a CPU."""
    if precision != "bf16":
        return graph
    upcast_onnx(graph, folder / "upcast.onnx")
    return folder / "upcast.onnx"


def first_differing_layers(
    graph: Path, reference: Path, feeds: Mapping[str, torch.Tensor], limit: float, count: int = 3
) -> list[LayerDifference]:
    """Returns the first layers of a graph, in its order, whose outputs differ from those of a reference graph.

    Both graphs run in ONNX Runtime on the CPU. The outputs that both graphs have under the same name, from the same
    operator on the same first input, are compared: torch's exporter numbers some outputs, so in a graph of another
    precision an equal name alone can mean another tensor.

    Args:
        graph: ONNX file to examine.
        reference: ONNX file of the same component, as in fp32.
        feeds: inputs by name, on the CPU; they are converted to the dtypes of each graph.
        limit: largest relative L2 of an equal output.
        count: the most layers to return.
    """
    graph_model, reference_model = load_structure(graph), load_structure(reference)
    sources = _layer_sources(reference_model)
    exact = _run_all_layers(reference, reference_model, feeds)
    outputs = _run_all_layers(graph, graph_model, feeds)
    own_sources = _layer_sources(graph_model)
    differing: list[LayerDifference] = []
    for node in graph_model.graph.node:
        for name in filter(None, node.output):
            if sources.get(name) != own_sources[name] or not _comparable(outputs.get(name), exact.get(name)):
                continue
            error = relative_l2(outputs[name], exact[name])
            if not error <= limit:  # also where it is not a number
                differing.append(LayerDifference(name, node.name, node.op_type, error))
                if len(differing) == count:
                    return differing
    return differing


def _layer_sources(model: Any) -> dict[str, tuple[str, str]]:
    """Returns output → its operator and the name of its first input, without the casts before it."""
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}

    def before_casts(name: str) -> str:
        while name in casts:
            name = casts[name]
        return name

    return {
        name: (node.op_type, before_casts(node.input[0]) if node.input else "")
        for node in model.graph.node
        for name in node.output
    }


def _comparable(output: torch.Tensor | None, reference: torch.Tensor | None) -> bool:
    return (
        output is not None
        and reference is not None
        and output.shape == reference.shape
        and output.is_floating_point()
        and reference.is_floating_point()
    )


def _run_all_layers(path: Path, model: Any, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the outputs of every node of a graph by name.

    Args:
        path: of the graph.
        model: its `onnx.ModelProto` without external data.
        feeds: inputs by name.
    """
    from onnx import helper
    from polygraphy import constants
    from polygraphy.backend.onnx import ModifyOutputs
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.logger import G_LOGGER

    dtypes = {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in model.graph.input
    }
    arrays = {name: value.numpy().astype(dtypes[name]) for name, value in feeds.items()}
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        marked = ModifyOutputs(model, outputs=constants.MARK_ALL, copy=True)()
        with _saved_beside(path, marked) as file, OnnxrtRunner(SessionFromOnnx(str(file))) as runner:
            outputs = runner.infer(arrays)
    return {name: torch.as_tensor(value) for name, value in outputs.items()}


@contextmanager
def _saved_beside(path: Path, model: Any) -> Iterator[Path]:
    """Save a model for the block beside the graph whose external data it reads."""
    file = path.with_name(f".{path.name}.layers.onnx")
    file.write_bytes(model.SerializeToString())
    try:
        yield file
    finally:
        file.unlink()
