"""Every backend answers alike, and refuses alike what a graph does not take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from sdcompress_engines.errors import BackendMissing, EngineError, EngineMismatch, UsageError
from sdcompress_engines.runners import OnnxRuntimeRunner, TensorRTRunner, TensorSpec, TorchRunner, available, open_runner
from sdcompress_engines.runners import onnxruntime as ort_module
from sdcompress_engines.runners import tensorrt as trt_module

DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "int64": TensorProto.INT64}


def write_graph(path: Path, dtype: str = "float32", op: str = "Add") -> Path:
    """`total = left + right`, (batch, 3)."""
    ports = [helper.make_tensor_value_info(name, DTYPES[dtype], ["batch", 3]) for name in ("left", "right", "total")]
    nodes = [helper.make_node(op, ["left", "right"], ["total"], name="the_node")]
    if dtype == "bfloat16":  # ONNX Runtime adds no bfloat16 on the CPU; it casts it
        nodes = [
            helper.make_node("Cast", ["left"], ["l32"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["right"], ["r32"], to=TensorProto.FLOAT),
            helper.make_node(op, ["l32", "r32"], ["t32"], name="the_node"),
            helper.make_node("Cast", ["t32"], ["total"], to=TensorProto.BFLOAT16),
        ]
    graph = helper.make_graph(nodes, "sum", ports[:2], ports[2:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_onnxruntime_adds_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    left, right = torch.arange(6).reshape(2, 3).to(kind), torch.full((3, 2), 2).t().to(kind)  # the second is not contiguous
    with open_runner(write_graph(tmp_path / "sum.onnx", dtype)) as runner:
        assert runner.inputs == (TensorSpec("left", ("batch", 3), kind), TensorSpec("right", ("batch", 3), kind))
        total = runner.infer({"right": right, "left": left})["total"]
    assert total.dtype == kind
    assert torch.equal(total, left + right)


def test_outputs_belong_to_the_caller(tmp_path: Path) -> None:
    with open_runner(write_graph(tmp_path / "sum.onnx")) as runner:
        first = runner.infer({"left": torch.ones(1, 3), "right": torch.ones(1, 3)})["total"]
        runner.infer({"left": torch.full((1, 3), 9.0), "right": torch.ones(1, 3)})
    assert first.tolist() == [[2.0, 2.0, 2.0]]
    first += 1


@pytest.fixture(params=["onnxruntime", "torch"])
def adder(request: pytest.FixtureRequest, tmp_path: Path) -> OnnxRuntimeRunner | TorchRunner:
    if request.param == "onnxruntime":
        return OnnxRuntimeRunner(write_graph(tmp_path / "sum.onnx"))

    class Sum(torch.nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left + right

    ports = [TensorSpec(name, ("batch", 3), torch.float32) for name in ("left", "right", "total")]
    return TorchRunner(Sum(), ports[:2], ports[2:])


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ({"left": torch.ones(2, 3)}, "missing input right"),
        ({"left": torch.ones(2, 3), "right": torch.ones(2, 3), "middle": torch.ones(1)}, "unknown input middle"),
        ({"left": torch.ones(2, 3).half(), "right": torch.ones(2, 3)}, "left is float16"),
        ({"left": torch.ones(2, 4), "right": torch.ones(2, 4)}, r"left has shape \(2, 4\)"),
        ({"left": torch.ones(3), "right": torch.ones(2, 3)}, r"left has shape \(3,\)"),
        ({"left": torch.ones(2, 3), "right": torch.ones(1, 3)}, r"right has shape \(1, 3\)"),
    ],
)
def test_wrong_feeds_are_one_clear_line(adder: OnnxRuntimeRunner | TorchRunner, feeds: dict[str, torch.Tensor], said: str) -> None:
    with adder as runner, pytest.raises(EngineMismatch, match=said) as caught:
        runner.infer(feeds)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_closed_runner_says_so_and_opens_again(adder: OnnxRuntimeRunner | TorchRunner) -> None:
    feeds = {"left": torch.ones(2, 3), "right": torch.ones(2, 3)}
    with pytest.raises(EngineError, match="not open"):
        adder.infer(feeds)
    with adder:
        pass
    with pytest.raises(EngineError, match="not open"):
        adder.infer(feeds)
    with adder as runner:
        assert runner.infer(feeds)["total"].sum() == 12


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_a_corrupt_graph_is_an_engine_error(tmp_path: Path, damage: str) -> None:
    path = write_graph(tmp_path / "sum.onnx")
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "noise": np.random.default_rng(0).bytes(500), "empty": b""}[damage])
    with pytest.raises(EngineError, match=r"sum\.onnx"):
        open_runner(path)


def test_open_runner_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.onnx or \.engine"):
        open_runner(tmp_path / "unet.safetensors")
    with pytest.raises(UsageError, match="no such file"):
        open_runner(tmp_path / "unet.onnx")


def test_missing_onnxruntime_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendMissing, match=r"pip install 'sdcompress\[cpu\]'"):
        open_runner(write_graph(tmp_path / "sum.onnx"))
    assert "sdcompress[cpu]" in str(ort_module.missing())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what a machine without a GPU says")
def test_without_a_gpu_an_engine_says_so(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "unet.engine").write_bytes(b"x")
    with pytest.raises(BackendMissing, match="NVIDIA GPU"):
        open_runner(tmp_path / "unet.engine")
    assert available()["tensorrt-rtx"] == "no CUDA device"
    assert available()["torch"] is None


def test_the_installed_library_has_every_name_the_runner_uses() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert [f"{kind}.{name}" for kind, names in trt_module.USED_API.items() for name in names if not hasattr(getattr(trt, kind), name)] == []


@pytest.mark.gpu
def test_a_damaged_engine_is_a_mismatch(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "unet.engine").write_bytes(b"not an engine" * 1000)
    with pytest.raises(EngineMismatch, match="does not load"):
        TensorRTRunner(tmp_path / "unet.engine").open()


def test_the_package_imports_without_diffusers_onnx_or_tensorrt() -> None:
    blocked = ("diffusers", "transformers", "onnx", "onnxscript", "polygraphy", "tensorrt", "tensorrt_rtx", "sdcompress", "pydantic", "click")
    code = (
        "import sys\n"
        "class Block:\n"
        f"    def find_spec(self, name, path=None, target=None):\n        if name.split('.')[0] in {blocked!r}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import sdcompress_engines.unet, sdcompress_engines.builder, sdcompress_engines.signature, sdcompress_engines.runners\n"
        "print(sdcompress_engines.runners.available())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
