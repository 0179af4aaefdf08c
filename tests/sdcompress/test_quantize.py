"""A UNet is quantized in the chosen layers only, and refused where it is too far from fp32."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sdcompress_engines.builder import build_engine
from sdcompress_engines.errors import BackendMissing, DataError, ExportError, GateFailed, UsageError
from sdcompress_engines.flavour import TENSORRT_RTX
from sdcompress_engines.graph import read_graph
from sdcompress_engines.profiles import Profile
from sdcompress_engines.progress import Reporter
from sdcompress_engines.runners import OnnxRuntimeRunner, TorchRunner

from sdcompress.export.quantize import quantize_graph as quantize_module
from sdcompress.export.quantize.calibrate import collect_calibration, default_prompts
from sdcompress.export.quantize.check import LIMITS, Accuracy, check_accuracy, check_quantized
from sdcompress.export.quantize.nodes import KEPT, choose_nodes
from sdcompress.export.quantize.precisions import PRECISIONS, missing, unsupported
from sdcompress.export.quantize.quantize_graph import QuantizeResult, quantize_graph

from .quantize_graphs import CHANNELS, dequantized, rows, write_small

needs_modelopt = pytest.mark.skipif(missing() is not None, reason="nvidia-modelopt is not installed")
needs_rtx = pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")


def test_fp8_needs_a_card_that_computes_it() -> None:
    assert "int8" in str(unsupported("fp8", (8, 6)))
    assert [
        unsupported("fp8", (8, 9)),
        unsupported("fp8", (12, 0)),
        unsupported("int8", (7, 5)),
        unsupported("fp16", (7, 5)),
    ] == [None] * 4


def test_without_modelopt_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(BackendMissing, match=r'modelopt.*pip install "sdcompress\[quantize\]"'):
        quantize_graph(
            write_small(tmp_path / "unet.onnx"), tmp_path / "out.onnx", "int8", rows(), high_precision="fp16"
        )


@needs_modelopt
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"precision": "int4"}, UsageError, "int8 or fp8"),
        ({"keep": ["norms"]}, UsageError, "norms.*shortcut"),
        ({"source": Path("nowhere.onnx")}, UsageError, "no such file"),
        ({"high_precision": "fp32"}, UsageError, "graph in float16.*expected fp32"),
        ({"high_precision": "bf16"}, UsageError, "fp16 or fp32"),
        ({"calibration": {"sample": rows()["sample"]}}, DataError, "an array for each input.*timestep"),
        ({"calibration": rows() | {"timestep": np.zeros(3, np.float32)}}, DataError, "same number"),
        ({"calibration": {name: value[:0] for name, value in rows().items()}}, DataError, "at least one"),
        ({"calibration": rows() | {"sample": np.zeros((8, 3, 8, 8), np.float32)}}, DataError, r"\(any, 4, any, any\)"),
        ({"calibration": rows() | {"timestep": np.full(8, np.nan, np.float32)}}, DataError, "not finite"),
    ],
)
def test_what_cannot_be_quantized_is_refused_at_once(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {
        "source": write_small(tmp_path / "unet.onnx"),
        "precision": "int8",
        "calibration": rows(),
        "high_precision": "fp16",
        **change,
    }
    with pytest.raises(error, match=message):
        quantize_graph(
            given.pop("source"), tmp_path / "out.onnx", given.pop("precision"), given.pop("calibration"), **given
        )
    assert [file.name for file in tmp_path.iterdir()] == ["unet.onnx"]


@needs_modelopt
def test_a_graph_too_old_for_fp8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"opset 18.*--opset"):
        quantize_graph(
            write_small(tmp_path / "unet.onnx", opset=18), tmp_path / "out.onnx", "fp8", rows(), high_precision="fp16"
        )


def test_layers_are_recognized_by_their_place_in_the_graph(tmp_path: Path) -> None:
    graph = onnx.load(write_small(tmp_path / "unet.onnx")).graph
    assert choose_nodes(graph) == (["body", "context"], {"timestep only": 1, "first and last": 2, "shortcut": 1})
    assert choose_nodes(graph, keep=()) == (["time", "first", "body", "shortcut", "context", "last"], {})


@dataclass(frozen=True)
class Run:
    """One quantization of the small graph: its folder with `unet.onnx` and `out/unet.onnx`, and what it returned."""

    folder: Path
    result: QuantizeResult

    @property
    def source(self) -> Path:
        return self.folder / "unet.onnx"

    @property
    def target(self) -> Path:
        return self.folder / "out" / "unet.onnx"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, Any], Run]:
    """Quantizations of the small graph by precision and by the precision of the graph; each is done once."""
    runs: dict[tuple[str, str], Run] = {}

    def quantize(precision: Any, around: Any) -> Run:
        if (precision, around) not in runs:
            folder = tmp_path_factory.mktemp("quantized")
            source = write_small(folder / "unet.onnx", around)
            result = quantize_graph(source, folder / "out" / "unet.onnx", precision, rows(), high_precision=around)
            runs[precision, around] = Run(folder, result)
        return runs[precision, around]

    return quantize


@needs_modelopt
@pytest.mark.parametrize(
    ("precision", "stored", "limit"), [("int8", TensorProto.INT8, 0.025), ("fp8", TensorProto.FLOAT8E4M3FN, 0.05)]
)
@pytest.mark.parametrize("around", ["fp16", "fp32"])
def test_a_quantized_graph_is_near_fp32_and_complete(
    quantized: Callable[[Any, Any], Run],
    tmp_path: Path,
    precision: Any,
    stored: int,
    limit: float,
    around: Any,
) -> None:
    run = quantized(precision, around)
    result, target = run.result, run.target
    assert (result.nodes, result.kept, result.bytes) == (
        {"Conv": 1, "MatMul": 1},
        {"timestep only": 1, "first and last": 2, "shortcut": 1},
        target.stat().st_size,
    )
    assert [file.name for file in target.parent.iterdir()] == ["unet.onnx"]
    assert {file.name for file in run.folder.iterdir()} == {"unet.onnx", "out"}
    assert run.source.read_bytes() == write_small(tmp_path / "unet.onnx", around).read_bytes()
    model = onnx.load(target)
    onnx.checker.check_model(model)
    graph = model.graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {
        name
        for name, kind in kinds.items()
        if kind == stored and name in ("first", "body", "shortcut", "context", "last")
    } == {"body", "context"}
    nodes = {node.name: node for node in graph.node}
    norm = next(node for node in graph.node if node.op_type == "GroupNormalization")
    assert [norm.input[0], nodes["shortcut"].input[0], nodes["last"].input[0]] == ["h", "h", "with_context"]
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 2
    reference = write_small(tmp_path / "exact.onnx", "fp32")
    accuracy = check_quantized(target, reference, rows(seed=1))
    assert (accuracy.precision, accuracy.rows, list(accuracy.relative_l2)) == (precision, 8, [999, 700, 300, 1])
    assert 0 < accuracy.mean <= accuracy.worst < limit


@needs_modelopt
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_small_weights_are_not_rounded_away(quantized: Callable[[Any, Any], Run], precision: Any) -> None:
    run = quantized(precision, "fp16")
    weight = next(
        numpy_helper.to_array(tensor).astype(np.float32)
        for tensor in onnx.load(run.source).graph.initializer
        if tensor.name == "body"
    )
    assert np.abs(weight[3]).max() < 127 * np.finfo(np.float16).tiny
    stored = dequantized(run.target, "body")
    errors, sizes = (np.linalg.norm(each.reshape(CHANNELS, -1), axis=1) for each in (stored - weight, weight))
    assert (errors / sizes).max() < (0.02 if precision == "int8" else 0.05)


@needs_modelopt
def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_small(tmp_path / "unet.onnx")
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="unet.onnx.data", size_threshold=0)
    monkeypatch.setattr(quantize_module, "ONE_FILE_BYTES", 4_000)
    target = tmp_path / "out" / "unet.onnx"
    result = quantize_graph(source, target, "int8", rows(), high_precision="fp16")
    assert {file.name for file in target.parent.iterdir()} == {"unet.onnx", "unet.onnx.data"}
    assert result.bytes == sum(file.stat().st_size for file in target.parent.iterdir())
    source.unlink()
    source.with_name("unet.onnx.data").unlink()
    assert check_quantized(target, write_small(tmp_path / "exact.onnx", "fp32"), rows(seed=1)).worst < 0.02
    monkeypatch.undo()
    quantize_graph(write_small(tmp_path / "unet.onnx"), target, "int8", rows(), high_precision="fp16")
    assert {file.name for file in target.parent.iterdir()} == {"unet.onnx"}


@needs_modelopt
def test_only_what_is_asked_for_is_kept(tmp_path: Path) -> None:
    result = quantize_graph(
        write_small(tmp_path / "unet.onnx"),
        tmp_path / "out.onnx",
        "int8",
        rows(),
        high_precision="fp16",
        keep=["timestep only"],
    )
    assert (result.nodes, result.kept) == ({"Conv": 4, "MatMul": 1}, {"timestep only": 1})


@needs_modelopt
def test_a_graph_with_nothing_to_quantize_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, "height", "width"])
        for name in ("sample", "out_sample")
    ]
    graph = helper.make_graph([helper.make_node("Relu", ["sample"], ["out_sample"])], "unet", ports[:1], ports[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), tmp_path / "unet.onnx"
    )
    with pytest.raises(ExportError, match="no convolution"):
        quantize_graph(
            tmp_path / "unet.onnx", tmp_path / "out.onnx", "int8", {"sample": rows()["sample"]}, high_precision="fp32"
        )
    assert [file.name for file in tmp_path.iterdir()] == ["unet.onnx"]


@needs_modelopt
def test_a_process_that_dies_is_an_error_and_leaves_the_old_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = tmp_path / "killer.sh"
    killer.write_text("#!/bin/sh\necho 'native code says goodbye'\nkill -SEGV $$\n")
    killer.chmod(0o755)
    source, target = write_small(tmp_path / "unet.onnx"), tmp_path / "out" / "unet.onnx"
    target.parent.mkdir()
    target.write_bytes(b"old")
    monkeypatch.setattr(sys, "executable", str(killer))
    with pytest.raises(ExportError, match=r"SIGSEGV.*goodbye"):
        quantize_graph(source, target, "int8", rows(), high_precision="fp16")
    assert target.read_bytes() == b"old"
    assert [file.name for file in target.parent.iterdir()] == ["unet.onnx"]


@needs_modelopt
def test_a_cancel_ends_the_process_and_leaves_nothing(tmp_path: Path) -> None:
    class Cancel(Reporter):
        @contextmanager
        def task(self, label: str, total: int | None = None) -> Iterator[Any]:
            def stop(n: int = 1, note: str = "") -> None:
                raise KeyboardInterrupt

            yield stop

    with pytest.raises(KeyboardInterrupt):
        quantize_graph(
            write_small(tmp_path / "unet.onnx"),
            tmp_path / "out.onnx",
            "int8",
            rows(),
            high_precision="fp16",
            report=Cancel(),
        )
    assert [file.name for file in tmp_path.iterdir()] == ["unet.onnx"]
    assert not [path for path in Path("/proc").glob("[0-9]*/cwd") if str(tmp_path) in _target(path)]


def _target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def test_a_check_needs_several_timesteps_and_a_quantized_graph(tmp_path: Path) -> None:
    graph = write_small(tmp_path / "unet.onnx")
    with pytest.raises(UsageError, match="not quantized"):
        check_quantized(graph, graph, rows())
    other = onnx.load(graph)
    other.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int8), "unread"))
    onnx.save(other, graph)
    with pytest.raises(DataError, match="at least 4"):
        check_quantized(graph, graph, {name: value[:6] for name, value in rows().items()})


def test_a_graph_too_far_from_fp32_is_refused_with_its_figures() -> None:
    for precision, limit in LIMITS.items():
        check_accuracy(Accuracy(precision, {1.0: limit.worst}, limit.mean, limit.worst, 8))
        for mean, worst in (
            (limit.mean * 1.01, limit.worst),
            (limit.mean, limit.worst * 1.01),
            (float("inf"), float("inf")),
        ):
            with pytest.raises(GateFailed, match=f"{precision} UNet.*timestep 501.*at most {limit.mean:g}") as caught:
                check_accuracy(Accuracy(precision, {901.0: 0.0, 501.0: worst}, mean, worst, 8))
            assert caught.value.exit_code == 3


@needs_modelopt
@needs_rtx
@pytest.mark.slow
def test_nano_is_quantized_within_its_limits_and_builds(tmp_path: Path) -> None:
    from sdcompress.export.components import component_graph, signature_of
    from sdcompress.export.onnx import export_onnx
    from sdcompress.models.load import load_pipeline

    pipeline: Any = load_pipeline("nano").pipeline
    export_onnx(pipeline, tmp_path / "onnx", precision="fp16", components=("unet",))
    source = tmp_path / "onnx" / "unet.onnx"
    prompts, held_out = default_prompts(pipeline)
    calibration = collect_calibration(pipeline, prompts)
    feeds = collect_calibration(pipeline, held_out, steps=8, samples=36, seed=1000)
    exact = signature_of("unet", pipeline.unet, "fp32")
    reference = TorchRunner(component_graph("unet", pipeline.unet, torch.float32), exact.inputs, exact.outputs)
    profile = Profile(
        {
            "sample": ((1, 4, 16, 16), (2, 4, 16, 16), (2, 4, 16, 16)),
            "timestep": ((1,), (2,), (2,)),
            "encoder_hidden_states": ((1, 77, 96), (2, 77, 96), (2, 77, 96)),
        }
    )
    for precision in PRECISIONS:
        target = tmp_path / f"{precision}.onnx"
        result = quantize_graph(source, target, precision, calibration, high_precision="fp16")
        assert result.nodes == {"Conv": 82, "MatMul": 160}
        assert result.kept == {"timestep only": 24, "first and last": 2, "shortcut": 14}
        assert result.bytes < 0.6 * read_graph(source).bytes
        with OnnxRuntimeRunner(source) as before, OnnxRuntimeRunner(target) as after:
            assert (before.inputs, before.outputs) == (after.inputs, after.outputs)
        check_accuracy(check_quantized(target, reference, feeds))
        assert build_engine(target, tmp_path / f"{precision}.engine", profile, TENSORRT_RTX, [(8, 9)]).bytes > 5_000_000
    everything = tmp_path / "everything.onnx"
    quantize_graph(source, everything, "int8", calibration, high_precision="fp16", keep=())
    with pytest.raises(GateFailed, match="too far from fp32"):
        check_accuracy(check_quantized(everything, reference, feeds))
    assert KEPT == ("timestep only", "first and last", "shortcut")
