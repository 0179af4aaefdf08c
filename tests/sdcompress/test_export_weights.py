"""An export keeps the weights that a LoRA changes beside its graph, by the names of torch and of the whole model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sdcompress_engines.build_options import BuildOptions
from sdcompress_engines.build_worker import mark_refittable
from sdcompress_engines.errors import ExportError
from sdcompress_engines.exactness import FP32_LIMIT, relative_l2
from sdcompress_engines.flavour import TENSORRT_RTX
from sdcompress_engines.graph import weights_path
from sdcompress_engines.graph_weights import GraphWeights
from sdcompress_engines.progress import Reporter
from sdcompress_engines.runners import open_runner
from sdcompress_engines.runners.tensorrt_library import create_log

from sdcompress.export import onnx_file, tensorrt
from sdcompress.export.components import component_graph, part_of, random_inputs, signature_of
from sdcompress.export.parity import default_cases
from sdcompress.export.weights import check_weights, lora_weights, name_weights, save_module_weights, unet_origins
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student

from .conftest import Exports

COMPONENTS = ("unet", "text_encoder")


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_weight_that_a_lora_changes_is_beside_the_graph_as_torch_has_it(
    small_exports: Exports, small_pipeline: Any, component: str
) -> None:
    weights = GraphWeights(weights_path(small_exports().folder / f"{component}.onnx"))
    part = part_of(small_pipeline, component)
    assert set(weights.specs) == set(lora_weights(part))
    for name in weights.specs:
        assert torch.equal(weights.read(name), part.get_parameter(name)), name


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_graph_with_exchanged_weights_computes_what_torch_computes_with_them(
    small_exports: Exports, small_pipeline: Any, component: str
) -> None:
    import copy

    part = copy.deepcopy(part_of(small_pipeline, component))
    torch.manual_seed(5)
    changes = {name: part.get_parameter(name) * (1 + torch.rand(()) / 4) for name in lora_weights(part)}
    with open_runner(small_exports().folder / f"{component}.onnx") as runner:
        wanted = signature_of(component, part, "fp32")
        feeds = random_inputs(wanted, part.config, default_cases(wanted, part.config)[0].sizes, timestep=300)
        before = runner.infer(feeds)
        runner.set_weights(changes)
        after = runner.infer(feeds)
    part.load_state_dict(part.state_dict() | changes)
    with torch.no_grad():
        truth = component_graph(component, part, torch.float32)(*feeds.values())
    for name, reference in zip(after, truth, strict=True):
        assert relative_l2(after[name], reference) < FP32_LIMIT, name
        assert relative_l2(before[name], reference) > 10 * FP32_LIMIT, name


def test_a_students_weights_have_the_names_of_the_whole_model(random_pipeline: Any) -> None:
    teacher = random_pipeline.unet
    plan = make_plan(dict(teacher.config), "bk-tiny")
    student, whole = build_student(teacher, plan), teacher.state_dict()
    ldm = unet_origins(teacher.config, None)
    origins = unet_origins(student.config, plan)
    own = student.state_dict()
    assert origins.keys() == own.keys()
    by_origin = {origin: name for name, origin in ldm.items()}
    assert all(torch.equal(own[name], whole[by_origin[origin]]) for name, origin in origins.items())


def test_of_a_student_without_a_plan_no_names_of_the_whole_model_are_known(random_pipeline: Any) -> None:
    plan = make_plan(dict(random_pipeline.unet.config), "bk-tiny")
    assert unet_origins(plan.student_config(), None) == {}


def trace(pipeline: Any) -> tuple[Any, Any, frozenset[str]]:
    """Returns the text encoder's module, its graph as an `onnx_ir.Model`, and the weights that it holds transposed."""
    part = part_of(pipeline, "text_encoder")
    graph = component_graph("text_encoder", part, torch.float32)
    model = onnx_file.trace_graph(graph, signature_of("text_encoder", part, "fp32"), onnx_file.OPSET).model
    return part, model, name_weights(model)


def test_a_weight_that_was_folded_away_is_an_error_at_export(small_pipeline: Any) -> None:
    part, model, transposed = trace(small_pipeline)
    check_weights(model, part, transposed)
    name = next(iter(sorted(transposed)))
    del model.graph.initializers[name]
    with pytest.raises(ExportError, match=f"the weight {name} is not in the graph"):
        check_weights(model, part, transposed)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")
def test_tensorrt_finds_every_weight_that_a_lora_changes(small_exports: Exports, precision: str) -> None:
    trt = TENSORRT_RTX.load()
    folder = small_exports(precision=precision).folder
    for component in COMPONENTS:
        builder = trt.Builder(create_log(trt))
        network, graph = builder.create_network(0), folder / f"{component}.onnx"
        assert trt.OnnxParser(network, create_log(trt)).parse_from_file(str(graph))
        names = sorted(GraphWeights(weights_path(graph)).specs)
        mark_refittable(trt, network, builder.create_builder_config(), names)
        assert len(names) > 10
        assert all(network.are_weights_marked_refittable(name) for name in names)


@pytest.mark.parametrize(
    ("wanted", "has_card", "options", "chosen"),
    [
        (None, True, BuildOptions(), True),
        (None, False, BuildOptions(), False),
        (False, True, BuildOptions(), False),
        (None, True, BuildOptions(strip_plan=True), False),
        (None, True, BuildOptions(refit="identical"), False),
    ],
)
def test_engines_take_loras_where_their_card_is_and_nothing_speaks_against_it(
    monkeypatch: pytest.MonkeyPatch, wanted: bool | None, has_card: bool, options: BuildOptions, chosen: bool
) -> None:
    monkeypatch.setattr(tensorrt, "builds_refittable", lambda library: has_card)
    manifest: Any = SimpleNamespace(files={"unet.onnx.safetensors": None}, config={"components": ["unet"]})
    report = Lines()
    assert tensorrt._choose_loras(wanted, TENSORRT_RTX, options, manifest, report) is chosen
    assert [line.startswith("these engines take no LoRA") for line in report.lines] == [True] * (not has_card)


def test_graphs_without_their_weights_beside_them_give_engines_without_loras() -> None:
    manifest: Any = SimpleNamespace(files={"unet.onnx": None}, config={"components": ["unet"]})
    assert not tensorrt._choose_loras(None, TENSORRT_RTX, BuildOptions(), manifest, Lines())


def test_equal_weights_give_equal_files(small_pipeline: Any, tmp_path: Path) -> None:
    part = part_of(small_pipeline, "text_encoder")
    graph = component_graph("text_encoder", part, torch.float32)
    for name in ("a", "b"):
        save_module_weights(graph, tmp_path / name, {})
    assert weights_path(tmp_path / "a").read_bytes() == weights_path(tmp_path / "b").read_bytes()


class Lines(Reporter):
    """Keeps the lines that it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def show_line(self, text: str) -> None:
        self.lines.append(text)
