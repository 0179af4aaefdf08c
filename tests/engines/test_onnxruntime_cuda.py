"""ONNX Runtime on CUDA, as far as a CPU can prove it.

The real ONNX Runtime on the CPU stands in for its CUDA provider, and fakes for CUDA's streams. What the stand-in says
and refuses was recorded from onnxruntime-gpu 1.24.4, 1.25.1 and 1.31.1 over empty CUDA libraries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from sdcompress_engines.errors import BackendMissing, EngineError
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.runners import OnnxRuntimeRunner, onnxruntime_session, open_runner
from sdcompress_engines.runners.onnxruntime import MAX_SESSION_GRAPHS
from sdcompress_engines.runners.onnxruntime_install import missing
from sdcompress_engines.runners.onnxruntime_session import left_out, message_of, start_session

from .fake_cuda import FakeCuda, fake_cuda  # noqa: F401 (a fixture)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
REFUSAL = (
    "[ONNXRuntimeError] : 1 : FAIL : This session cannot use the graph capture feature as requested by the user "
    " as all compute graph nodes have not been partitioned to the CUDAExecutionProvider"
)
_TYPES = "[with ERRTYPE = cudaError; bool THRW = true; std::conditional_t<THRW, void, common::Status> = void]"
CAPTURE_ERROR = (
    "Error in execution: /onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW,"
    " void, onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*, const char*, SUCCTYPE, const"
    f" char*, const char*, int) {_TYPES} CUDA failure 900: operation not permitted when stream is capturing ; GPU=0 ;"
    " hostname=someones-machine ; file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_graph.cc ; line=61 ;"
    " expr=cudaStreamEndCapture(stream_, &graph); "
)


class StandIn:
    """ONNX Runtime whose CUDA provider computes on the CPU.

    Args:
        refuses: whether a session with a CUDA graph is refused.
        captures: whether a capture succeeds.
        on_cpu: operators that the CUDA provider leaves to the CPU.
    """

    def __init__(self, *, refuses: bool = False, captures: bool = True, on_cpu: Iterable[str] = ()) -> None:
        self.refuses, self.captures, self.on_cpu = refuses, captures, frozenset(on_cpu)
        self.asked: list[dict[str, str]] = []
        """Options of the CUDA provider, by session."""
        self.runs: list[str] = []
        """The number of the CUDA graph that each run asked for."""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put this in the place of ONNX Runtime's sessions."""
        stand_in, real = self, onnxruntime.InferenceSession

        class Session:
            def __init__(self, path: str, options: Any, providers: Any, enable_fallback: int) -> None:
                self._providers = [entry if isinstance(entry, str) else entry[0] for entry in providers]
                stand_in.asked.append(dict(providers[0][1]) if self._providers[0] == CUDA else {})
                if stand_in.asked[-1].get("enable_cuda_graph") == "1" and stand_in.refuses:
                    raise RuntimeError(REFUSAL)
                self._real = real(path, options, providers=[CPU], enable_fallback=enable_fallback)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._real, name)

            def get_providers(self) -> list[str]:
                return self._providers

            def get_provider_graph_assignment_info(self) -> list[Any]:
                nodes = [node for part in self._real.get_provider_graph_assignment_info() for node in part.get_nodes()]
                sides = {
                    CUDA: [n for n in nodes if n.op_type not in stand_in.on_cpu],
                    CPU: [n for n in nodes if n.op_type in stand_in.on_cpu],
                }
                return [
                    SimpleNamespace(ep_name=name, get_nodes=lambda held=held: held)
                    for name, held in sides.items()
                    if held
                ]

            def run_with_iobinding(self, binding: Any, options: Any) -> None:
                stand_in.runs.append(options.get_run_config_entry("gpu_graph_id"))
                if stand_in.runs[-1] != "-1" and not stand_in.captures:
                    raise RuntimeError(CAPTURE_ERROR)
                self._real.run_with_iobinding(binding, options)

        patch.setattr(onnxruntime, "InferenceSession", Session)
        patch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])


class RunnerOnCpu(OnnxRuntimeRunner):
    """The runner's way on a GPU, over tensors on the CPU."""

    def _load(self) -> None:
        super()._load()
        self.device = torch.device("cpu")

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._run_on_gpu(feeds)


@pytest.fixture
def make(
    tmp_path: Path,
    fake_cuda: FakeCuda,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[RunnerOnCpu, StandIn]]:
    """Makes a runner of `y = gelu(x · w)` with CUDA graphs, not open yet, and the ONNX Runtime that it will find."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def make(cuda_graph: bool = True, **how: Any) -> tuple[RunnerOnCpu, StandIn]:
        stand_in = StandIn(**how)
        stand_in.install(monkeypatch)
        return RunnerOnCpu(write_graph(tmp_path / "unet.onnx"), "cuda", cuda_graph=cuda_graph), stand_in

    return make


def write_graph(path: Path) -> Path:
    weights = onnx.numpy_helper.from_array(torch.eye(8).mul(2).numpy(), "w")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in ("x", "y")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Gelu", ["h"], ["y"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ports[:1], ports[1:], [weights]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, path)
    return path


def expected(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(2 * x)


# --- where the graph runs

# Operators on the CPU, as each version reports of nano's UNet at opset 23, and of one with instance norms.
SHAPES = ("Add", "Concat", "Div", "Mul", "Reshape", "Squeeze")
ASSIGNED = {
    "1.31.1": (SHAPES, {}),
    "1.25.1": ((*SHAPES, "Cos", "Sin"), {}),
    "1.24.4": ((*SHAPES, "Attention", "Cos", "Resize", "Sin"), {"Attention": CPU, "Resize": CPU}),
    "1.31.1, instance norms": ((*SHAPES, "InstanceNormalization"), {"InstanceNormalization": CPU}),
    "1.31.1, text encoder": (("ArgMax", "Concat", "Squeeze"), {}),
}


@pytest.mark.parametrize("version", ASSIGNED)
def test_shapes_may_be_computed_on_the_cpu_and_work_may_not(version: str) -> None:
    on_cpu, work = ASSIGNED[version]
    assigned = [(CUDA, ["Attention", "Conv", "LayerNormalization", "MatMul", "ReduceMean"]), (CPU, on_cpu)]
    assert left_out(assigned, {CUDA}) == work


def test_a_session_that_leaves_work_to_the_cpu_does_not_open_and_names_what_does(make: Callable[..., Any]) -> None:
    runner, _ = make(cuda_graph=False, on_cpu=["Gelu"])
    with pytest.raises(
        EngineError,
        match=r"does not take the whole graph: Gelu on CPUExecutionProvider\. Try: onnxruntime-gpu 1\.25 or newer",
    ):
        runner.open()


def test_a_graph_in_fp32_is_computed_without_tf32(make: Callable[..., Any]) -> None:
    runner, stand_in = make(cuda_graph=False)
    runner.open()
    assert stand_in.asked[0]["use_tf32"] == "0"


# --- CUDA graphs


def test_each_shape_is_captured_once_and_its_results_are_the_callers(make: Callable[..., Any]) -> None:
    runner, stand_in = make()
    with runner:
        inputs = [torch.randn(batch, 8) for batch in (1, 2, 1, 2)]
        found = [runner.infer({"x": x})["y"] for x in inputs]
    assert all(torch.allclose(y, expected(x), atol=1e-6) for x, y in zip(inputs, found, strict=True))
    assert stand_in.runs == ["-1", "1", "-1", "2", "1", "2"]
    assert runner.graph_failure is None


def test_shapes_over_the_limit_run_without_a_graph(make: Callable[..., Any]) -> None:
    runner, stand_in = make()
    with runner:
        for batch in range(1, MAX_SESSION_GRAPHS + 2):
            x = torch.randn(batch, 8)
            assert torch.allclose(runner.infer({"x": x})["y"], expected(x), atol=1e-6)
    assert [run for run in stand_in.runs if run != "-1"] == [str(graph + 1) for graph in range(MAX_SESSION_GRAPHS)]


def test_a_session_refused_with_a_graph_opens_without_and_warns_once_with_the_reason(make: Callable[..., Any]) -> None:
    runner, stand_in = make(refuses=True, on_cpu=["ArgMax"])
    with pytest.warns(
        RuntimeWarning,
        match=r"unet\.onnx: no CUDA graph could be captured, so it runs without \(This session cannot use",
    ):
        runner.open()
    assert [asked["enable_cuda_graph"] for asked in stand_in.asked] == ["1", "0"]
    x = torch.randn(3, 8)
    with runner, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(torch.allclose(runner.infer({"x": x})["y"], expected(x), atol=1e-6) for _ in range(2))
    assert stand_in.runs == ["-1", "-1"]
    assert "graph capture" in runner.graph_failure


def test_the_warning_names_operators_that_are_not_on_the_gpu(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = make(refuses=True, on_cpu=["Gelu"])
    monkeypatch.setattr(onnxruntime_session, "WORK", frozenset())
    with pytest.warns(RuntimeWarning, match="elsewhere: Gelu"):
        runner.open()


def test_a_capture_that_fails_leaves_the_call_its_result_and_later_calls_without_a_graph(
    make: Callable[..., Any],
) -> None:
    runner, stand_in = make(captures=False)
    x = torch.randn(2, 8)
    with runner:
        with pytest.warns(
            RuntimeWarning,
            match=r"CUDA failure 900: operation not permitted when stream is capturing in cudaStreamEndCapture",
        ):
            assert torch.allclose(runner.infer({"x": x})["y"], expected(x), atol=1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.allclose(runner.infer({"x": x})["y"], expected(x), atol=1e-6)
            assert torch.allclose(runner.infer({"x": x[:1]})["y"], expected(x[:1]), atol=1e-6)
    assert stand_in.runs == ["-1", "1", "-1", "-1", "-1"]


def test_a_replay_that_fails_after_its_capture_is_an_error(make: Callable[..., Any]) -> None:
    runner, stand_in = make()
    with runner:
        runner.infer({"x": torch.randn(2, 8)})
        stand_in.captures = False
        with pytest.raises(EngineError, match=r"ONNX Runtime failed \(CUDA failure 900: [^;]* in cudaStreamEndCapture"):
            runner.infer({"x": torch.randn(2, 8)})


def test_a_runner_that_opens_again_tries_again(make: Callable[..., Any]) -> None:
    runner, stand_in = make(refuses=True)
    with pytest.warns(RuntimeWarning), runner:
        pass
    stand_in.refuses = False
    with runner:
        assert runner.graph_failure is None
        runner.infer({"x": torch.randn(1, 8)})
    assert stand_in.runs == ["-1", "1"]


def test_what_fails_without_a_graph_too_is_the_error() -> None:
    def start(cuda_graph: bool) -> str:
        raise ValueError("with" if cuda_graph else "without")

    with pytest.raises(ValueError, match="without"):
        start_session(start, True)


def test_a_missing_device_is_not_taken_for_a_refused_graph() -> None:
    def start(cuda_graph: bool) -> str:
        if cuda_graph:
            raise BackendMissing("no GPU")
        return "a session"

    with pytest.raises(BackendMissing, match="no GPU"):
        start_session(start, True)


def test_messages_leave_out_types_files_and_host_names() -> None:
    said = message_of(RuntimeError(CAPTURE_ERROR))
    assert (
        said
        == "CUDA failure 900: operation not permitted when stream is capturing in cudaStreamEndCapture(stream_, &graph)"
    )
    assert message_of(RuntimeError(REFUSAL)).startswith("This session cannot use the graph capture feature")


# --- on a card


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_exported_unet_runs_on_cuda_as_on_the_cpu(random_pipeline: Any, tmp_path: Path, cuda_graph: bool) -> None:
    from sdcompress.export.onnx import export_onnx

    if (reason := missing("cuda")) is not None:
        pytest.skip(reason)
    folder = export_onnx(
        random_pipeline, tmp_path / "onnx", precision="fp32", components=("unet",), runtime="onnxruntime"
    ).folder
    generator = torch.Generator().manual_seed(0)
    with (
        OnnxRuntimeRunner(folder / "unet.onnx") as cpu,
        open_runner(folder / "unet.onnx", "cuda", cuda_graph=cuda_graph) as runner,
    ):
        for batch in (1, 2, 1):
            shapes = {"sample": (batch, 4, 16, 16), "timestep": (batch,), "encoder_hidden_states": (batch, 77, 96)}
            feeds = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            exact = cpu.infer(feeds)["out_sample"]
            found = runner.infer({name: value.cuda() for name, value in feeds.items()})["out_sample"].cpu()
            assert relative_l2(found, exact) < 1e-4  # TF32 would be off by about 1e-3
        if cuda_graph and int(onnxruntime.__version__.split(".")[1]) >= 27:
            assert runner.graph_failure is None


@pytest.mark.gpu
def test_a_graph_with_copies_to_the_host_runs_without_a_cuda_graph(tmp_path: Path) -> None:
    if (reason := missing("cuda")) is not None:
        pytest.skip(reason)
    ports = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 8]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8]),
    ]
    nodes = [  # `ArgMax` of integers has no CUDA kernel
        helper.make_node("ArgMax", ["ids"], ["place"], axis=-1, keepdims=1),
        helper.make_node("Add", ["ids", "place"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    path = tmp_path / "ids.onnx"
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "g", ports[:1], ports[1:]),
            opset_imports=[helper.make_opsetid("", 21)],
            ir_version=10,
        ),
        path,
    )
    ids = torch.arange(16).reshape(2, 8)
    with pytest.warns(RuntimeWarning, match=r"ids\.onnx: no CUDA graph could be captured.*elsewhere: ArgMax"):
        runner = open_runner(path, "cuda", cuda_graph=True)
    with runner:
        assert torch.equal(runner.infer({"ids": ids.cuda()})["y"].cpu(), ids.float() + 7)
