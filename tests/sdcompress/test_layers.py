"""Two graphs of one component are compared layer by layer, and the first layer that differs is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from sdcompress.export.layers import first_differing_layers

from .conftest import Exports

FEEDS = {
    "sample": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([500.0]),
    "encoder_hidden_states": torch.randn(1, 77, 96, generator=torch.Generator().manual_seed(1)),
}


def spoil_weight(source: Path, target: Path, operator: str, *, external: bool) -> str:
    """Write a graph with one weight of the fourth node of an operator changed; returns the name of that node."""
    model = onnx.load(source)
    node = [each for each in model.graph.node if each.op_type == operator][3]
    tensor = next(each for each in model.graph.initializer if each.name == node.input[1])
    values = numpy_helper.to_array(tensor).copy()
    values[0] *= 2
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, target, save_as_external_data=external, location=f"{target.name}.data", size_threshold=1024)
    return str(node.name)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("operator", ["Conv", "GroupNormalization", "MatMul"])
def test_the_first_layer_that_differs_is_the_one_with_the_spoiled_weight(
    small_exports: Exports, tmp_path: Path, operator: str, external: bool
) -> None:
    reference, graph = small_exports().folder / "unet.onnx", tmp_path / "unet.onnx"
    spoiled = spoil_weight(reference, graph, operator, external=external)
    files = sorted(tmp_path.iterdir())
    layers = first_differing_layers(graph, reference, FEEDS, 1e-4)
    assert (layers[0].node, layers[0].operator) == (spoiled, operator)
    assert len(layers) == 3
    assert all(layer.relative_l2 > 1e-4 for layer in layers)
    assert sorted(tmp_path.iterdir()) == files


def test_a_layer_with_values_that_are_not_finite_differs(small_exports: Exports, tmp_path: Path) -> None:
    reference, graph = small_exports().folder / "unet.onnx", tmp_path / "unet.onnx"
    model = onnx.load(reference)
    node = next(each for each in model.graph.node if each.op_type == "Conv")
    bias = next(each for each in model.graph.initializer if each.name == node.input[2])
    bias.CopyFrom(numpy_helper.from_array(np.full(bias.dims, np.nan, np.float32), bias.name))
    onnx.save(model, graph)
    assert first_differing_layers(graph, reference, FEEDS, 1e-4, count=1)[0].node == node.name


@pytest.mark.slow
def test_graphs_of_two_precisions_have_no_layer_over_their_noise(small_exports: Exports) -> None:
    """torch's exporter numbers some tensors differently in them; tensors of one name that are not one are left out."""
    exact, half = small_exports(), small_exports(precision="fp16")
    parity = half.parity["unet"]
    assert parity is not None
    graph, reference = half.folder / "unet.onnx", exact.folder / "unet.onnx"
    assert first_differing_layers(graph, reference, FEEDS, parity.limit) == []
    assert first_differing_layers(graph, reference, FEEDS, 1e-6) != []
