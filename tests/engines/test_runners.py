"""Every backend answers alike, and refuses alike what a graph does not take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from sdcompress_engines.errors import BackendMissing, EngineError, EngineMismatch, UsageError
from sdcompress_engines.runners import (
    OnnxRuntimeRunner,
    TensorRTRunner,
    TensorSpec,
    TorchRunner,
    available,
    open_runner,
)
from sdcompress_engines.runners.onnxruntime_install import missing as onnxruntime_missing
from sdcompress_engines.runners.onnxruntime_session import SessionRequest, check_provider, left_out, profile_options

DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}


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
    left, right = (
        torch.arange(6).reshape(2, 3).to(kind),
        torch.full((3, 2), 2).t().to(kind),
    )  # the second is not contiguous
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
def test_wrong_feeds_are_one_clear_line(
    adder: OnnxRuntimeRunner | TorchRunner, feeds: dict[str, torch.Tensor], said: str
) -> None:
    with adder as runner, pytest.raises(EngineMismatch, match=said) as caught:
        runner.infer(feeds)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_closed_runner_is_an_error_and_opens_again(adder: OnnxRuntimeRunner | TorchRunner) -> None:
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
    path.write_bytes(
        {"cut": content[: len(content) // 2], "noise": np.random.default_rng(0).bytes(500), "empty": b""}[damage]
    )
    with pytest.raises(EngineError, match=r"sum\.onnx"):
        open_runner(path)


def write_split(folder: Path) -> Path:
    """`y = x · w`, with `w` in a file beside the graph."""
    weights = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [weights]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    onnx.save(model, folder / "unet.onnx", save_as_external_data=True, location="unet.onnx.data", size_threshold=0)
    return folder / "unet.onnx"


def test_missing_and_cut_weights_have_messages_of_their_own(tmp_path: Path) -> None:
    path, weights = write_split(tmp_path), tmp_path / "unet.onnx.data"
    with open_runner(path) as runner:
        assert runner.infer({"x": torch.ones(2, 64)})["y"].unique().tolist() == [64.0]
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EngineError, match=r"weights are cut: unet\.onnx\.data has 1,000 bytes; expected 16,384"):
        open_runner(path)
    weights.unlink()
    with pytest.raises(EngineError, match=r"weights are missing: unet\.onnx\.data is not beside it"):
        open_runner(path)


def test_an_operator_nobody_knows_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no operator NoSuch of opset 21.*newer onnxruntime"):
        open_runner(write_graph(tmp_path / "sum.onnx", op="NoSuch"))


def test_without_onnx_installed_the_message_is_onnxruntimes_in_one_short_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_graph(tmp_path / "sum.onnx")
    path.write_bytes(path.read_bytes()[:30])
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EngineError, match="not a graph that ONNX Runtime loads") as caught:
        open_runner(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_failing_graph_leaves_nothing_on_the_streams(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineError):
        open_runner(write_graph(tmp_path / "sum.onnx", op="NoSuch"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"provider": "openvino"}, "one of cpu, cuda, tensorrt, nvtensorrtrtx"),
        ({"provider": "cpu", "device": "cuda"}, "provider 'cpu' on cuda"),
        ({"provider": "tensorrt", "device": "cpu"}, "provider 'tensorrt' on cpu"),
        ({"cuda_graph": True}, "expected provider 'cuda'"),
        ({"threads": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        OnnxRuntimeRunner(tmp_path / "unet.onnx", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what a machine without a GPU says")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "nvtensorrtrtx"])
def test_a_provider_for_gpus_never_falls_back_to_the_cpu(tmp_path: Path, provider: str) -> None:
    with pytest.raises(BackendMissing, match=f"no GPU here for provider '{provider}'"):
        open_runner(write_graph(tmp_path / "sum.onnx"), provider=provider)


def test_work_left_to_another_provider_is_found_in_what_onnxruntime_reports(tmp_path: Path) -> None:
    import onnxruntime

    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime does not report it")
    with OnnxRuntimeRunner(write_split(tmp_path)) as runner:
        assigned = [
            (part.ep_name, [node.op_type for node in part.get_nodes()])
            for part in runner._session.native.get_provider_graph_assignment_info()
        ]
    assert assigned == [("CPUExecutionProvider", ["MatMul"])]
    assert left_out(assigned, {"CPUExecutionProvider"}) == {}
    assert left_out(assigned, {"CUDAExecutionProvider"}) == {"MatMul": "CPUExecutionProvider"}
    assert left_out([("CPUExecutionProvider", ["Shape", "Gather"])], {"CUDAExecutionProvider"}) == {}
    request = SessionRequest(tmp_path / "unet.onnx", "cpu")
    with pytest.raises(EngineError, match="does not take the whole graph: MatMul on CPUExecutionProvider"):
        check_provider(request, {"CPUExecutionProvider"}, ["CPUExecutionProvider"], {"MatMul": "CPUExecutionProvider"})
    with pytest.raises(BackendMissing, match="would have used CPUExecutionProvider"):
        check_provider(request, {"CUDAExecutionProvider"}, ["CPUExecutionProvider"], {})


def test_shapes_to_build_for_are_given_in_the_form_that_the_providers_read(tmp_path: Path) -> None:
    profile = {"sample": ((1, 4, 32, 32), (2, 4, 64, 64), (8, 4, 96, 96)), "timestep": ((1,), (2,), (8,))}
    request = SessionRequest(tmp_path / "unet.onnx", "tensorrt", profile=profile)
    assert profile_options(request, "trt") == {
        "trt_profile_min_shapes": "sample:1x4x32x32,timestep:1",
        "trt_profile_opt_shapes": "sample:2x4x64x64,timestep:2",
        "trt_profile_max_shapes": "sample:8x4x96x96,timestep:8",
    }


def test_threads_and_session_entries_reach_onnxruntime(tmp_path: Path) -> None:
    with OnnxRuntimeRunner(
        write_graph(tmp_path / "sum.onnx"), threads=1, config={"session.intra_op.allow_spinning": "0"}
    ) as runner:
        options = runner._session.native.get_session_options()
        assert options.intra_op_num_threads == 1
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, picture: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.nn.functional.silu(self.into(picture)) * scale[:, None, None, None]
        return self.out(hidden), hidden.mean((2, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its compiler imports what it deprecates
@pytest.mark.parametrize("mode", ["eager", "channels_last", pytest.param("compile", marks=pytest.mark.slow)])
def test_every_torch_mode_gives_the_modules_values(mode: str) -> None:
    module = Layers()
    inputs = [
        TensorSpec("picture", ("batch", 3, "height", "width"), torch.float32),
        TensorSpec("scale", ("batch",), torch.float32),
    ]
    outputs = [
        TensorSpec("out", ("batch", 3, "height", "width"), torch.float32),
        TensorSpec("mean", ("batch", 8), torch.float32),
    ]
    with TorchRunner(module, inputs, outputs, mode) as runner:
        for batch, side in ((1, 16), (2, 24)):
            feeds = {"picture": torch.randn(batch, 3, side, side), "scale": torch.rand(batch)}
            with torch.no_grad():
                truth = module(*feeds.values())
            found = runner.infer(feeds)
            assert list(found) == ["out", "mean"]
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found.values(), truth, strict=True))


def test_an_unknown_torch_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="eager or channels_last or compile"):
        TorchRunner(Layers(), [], [], "fast")


def test_open_runner_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.onnx, \.engine or \.pt2"):
        open_runner(tmp_path / "unet.safetensors")
    with pytest.raises(UsageError, match="no such file"):
        open_runner(tmp_path / "unet.onnx")
    with pytest.raises(UsageError, match=r"onnxruntime takes no kernels; expected provider, threads"):
        open_runner(tmp_path / "unet.onnx", kernels="eager")
    with pytest.raises(UsageError, match=r"TensorRT engine takes no threads"):
        open_runner(tmp_path / "unet.engine", threads=2)


def test_missing_onnxruntime_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendMissing, match=r'pip install "sdcompress\[cpu\]"'):
        open_runner(write_graph(tmp_path / "sum.onnx"))
    assert "sdcompress[cpu]" in str(onnxruntime_missing())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what a machine without a GPU says")
def test_without_a_gpu_an_engine_does_not_open(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "unet.engine").write_bytes(b"x")
    with pytest.raises(BackendMissing, match="NVIDIA GPU"):
        open_runner(tmp_path / "unet.engine")
    assert available()["tensorrt-rtx"] == "no CUDA device"
    assert available()["torch"] is None


@pytest.mark.gpu
def test_a_damaged_engine_is_a_mismatch(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "unet.engine").write_bytes(b"not an engine" * 1000)
    with pytest.raises(EngineMismatch, match="does not load"):
        TensorRTRunner(tmp_path / "unet.engine").open()


def test_the_package_imports_without_diffusers_onnx_or_tensorrt() -> None:
    blocked = (
        "diffusers",
        "transformers",
        "onnx",
        "onnxscript",
        "polygraphy",
        "tensorrt",
        "tensorrt_rtx",
        "sdcompress",
        "pydantic",
        "click",
    )
    code = (
        "import sys\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n        if"
        f" name.split('.')[0] in {blocked!r}: raise ImportError(name)\nsys.meta_path.insert(0, Block())\nimport"
        " sdcompress_engines.unet, sdcompress_engines.builder, sdcompress_engines.signature,"
        " sdcompress_engines.runners\nprint(sdcompress_engines.runners.available())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "nvtensorrtrtx"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_every_gpu_provider_agrees_with_the_cpu_on_any_stream(tmp_path: Path, provider: str, cuda_graph: bool) -> None:
    if cuda_graph and provider != "cuda":
        pytest.skip("the runner refuses it")
    path = write_split(tmp_path)
    try:
        runner = open_runner(path, provider=provider, cuda_graph=cuda_graph)
    except BackendMissing as error:
        pytest.skip(str(error))
    with OnnxRuntimeRunner(path) as cpu, runner:
        for index, batch in enumerate((1, 2, 3, 1, 4, 5, 6, 2)):  # six shapes, two more than graphs are captured
            with torch.cuda.stream(torch.cuda.Stream() if index % 2 else torch.cuda.default_stream()):
                given = torch.randn(batch, 64)
                found = runner.infer({"x": given.cuda()})["y"]
                assert torch.allclose(found.cpu(), cpu.infer({"x": given})["y"], atol=1e-3)
