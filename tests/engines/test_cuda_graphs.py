"""Capture and replay over stand-ins of CUDA's streams and graphs; with a GPU, over the real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sdcompress_bench.stand_in import StandInEngine, expected
from sdcompress_engines.errors import EngineError, UsageError
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.runners import SharedMemory, TensorSpec, TorchRunner
from sdcompress_engines.runners.cuda_graphs import MAX_GRAPHS, GraphedCall, capture_graph
from sdcompress_engines.runners.execution import Execution

from .fake_cuda import FakeCuda, fake_cuda  # noqa: F401 (a fixture)

CPU = torch.device("cpu")
SPECS = (TensorSpec("total", ("batch", "n", "n"), torch.float32),)
IO = tuple(TensorSpec(name, ("batch", "n", "n"), torch.float32) for name in ("left", "right"))


class Log:
    """A stand-in for TensorRT's logger."""

    def last_errors(self) -> str:
        return "the stand-in gave no reason"


def make_feeds(batch: int, n: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, n, n, generator=generator) for name in ("left", "right")}


def shapes_of(feeds: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in feeds.items()}


def make_execution(
    cuda: FakeCuda, memory: SharedMemory | None = None, graphs: bool = True, fails: Callable[[], bool] = lambda: False
) -> tuple[Execution, StandInEngine]:
    engine = StandInEngine(CPU, stream_of=cuda.stream_of, fails=fails)
    memory = memory or SharedMemory(CPU)
    return Execution(engine, None, SPECS, CPU, memory, Log(), "unet.engine", graphs=graphs), engine


def run(execution: Execution, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    return execution.run(0, shapes_of(feeds), feeds)["total"]


def test_a_captured_engine_is_replayed_and_gives_what_a_plain_run_gives(fake_cuda: FakeCuda) -> None:  # noqa: F811
    plain, _ = make_execution(fake_cuda, graphs=False)
    graphed, engine = make_execution(fake_cuda)
    for seed in range(4):
        feeds = make_feeds(2, seed=seed)
        assert torch.equal(run(graphed, feeds), run(plain, feeds))
        assert torch.allclose(run(graphed, feeds), expected(feeds), atol=1e-6)
    assert fake_cuda.replays == 8
    assert [context.launches for context in engine.contexts] == [2]  # once before the capture and once in it


def test_results_belong_to_the_caller_and_outlive_the_next_call(fake_cuda: FakeCuda) -> None:  # noqa: F811
    graphed, _ = make_execution(fake_cuda)
    first = run(graphed, make_feeds(2, seed=0))
    held = first.clone()
    run(graphed, make_feeds(2, seed=1))
    assert torch.equal(first, held)


def test_memory_that_grew_makes_a_graph_be_captured_again(fake_cuda: FakeCuda) -> None:  # noqa: F811
    memory = SharedMemory(CPU)
    unet, _ = make_execution(fake_cuda, memory)
    vae, _ = make_execution(fake_cuda, memory, graphs=False)
    feeds = make_feeds(2)
    run(unet, feeds)
    large = make_feeds(4, 32)
    assert torch.allclose(run(vae, large), expected(large), atol=1e-6)
    assert torch.allclose(run(unet, feeds), expected(feeds), atol=1e-6)
    assert len(fake_cuda.graphs) == 2
    assert fake_cuda.graphs[0].replays == 1
    run(unet, feeds)
    assert len(fake_cuda.graphs) == 2


def test_memory_reserved_before_the_first_capture_makes_one_capture_enough(fake_cuda: FakeCuda) -> None:  # noqa: F811
    memory = SharedMemory(CPU)
    unet, engine = make_execution(fake_cuda, memory)
    vae, _ = make_execution(fake_cuda, memory, graphs=False)
    feeds, large = make_feeds(2), make_feeds(4, 32)
    unet.reserve(0, shapes_of(feeds))
    vae.reserve(0, shapes_of(large))
    for _ in range(3):
        assert torch.allclose(run(unet, feeds), expected(feeds), atol=1e-6)
        run(vae, large)
    assert len(fake_cuda.graphs) == 1
    assert len(engine.contexts) == 1  # the reserved context is the one that was captured


def test_the_graph_used_longest_ago_goes_first(fake_cuda: FakeCuda) -> None:  # noqa: F811
    graphed, _ = make_execution(fake_cuda)
    graphed.reserve(0, shapes_of(make_feeds(MAX_GRAPHS + 1)))  # no graph is lost because memory grows
    for batch in range(1, MAX_GRAPHS + 1):
        run(graphed, make_feeds(batch))
    run(graphed, make_feeds(1))  # now shape 2 is the oldest
    run(graphed, make_feeds(MAX_GRAPHS + 1))
    captured = len(fake_cuda.graphs)
    run(graphed, make_feeds(1))
    assert len(fake_cuda.graphs) == captured
    run(graphed, make_feeds(2))
    assert len(fake_cuda.graphs) == captured + 1


def test_static_tensors_captured_in_inference_mode_serve_calls_outside_of_it(fake_cuda: FakeCuda) -> None:  # noqa: F811
    runner = TorchRunner(
        torch.nn.Linear(8, 8),
        (TensorSpec("x", ("batch", 8), torch.float32),),
        (TensorSpec("y", ("batch", 8), torch.float32),),
    )
    with runner:
        runner._graphed = GraphedCall(runner._compute, CPU)
        with torch.inference_mode():
            first = runner.infer({"x": torch.ones(2, 8)})["y"]
        again = runner.infer({"x": torch.ones(2, 8)})["y"]
        again.add_(1)  # a scheduler changes what it gets in place
        assert torch.allclose(first + 1, again)
        assert not first.is_inference()
    assert fake_cuda.replays == 2


def test_a_capture_that_fails_runs_without_a_graph_and_gives_the_reason_once(fake_cuda: FakeCuda) -> None:  # noqa: F811
    fake_cuda.capture_fails = True
    graphed, _ = make_execution(fake_cuda)
    feeds, caller = make_feeds(2), fake_cuda.current
    with pytest.warns(RuntimeWarning, match=r"unet.engine: no CUDA graph could be captured.*operation failed"):
        assert torch.allclose(run(graphed, feeds), expected(feeds), atol=1e-6)
    assert torch.allclose(run(graphed, feeds), expected(feeds), atol=1e-6)  # a second warning would be an error here
    assert fake_cuda.current is caller
    assert len(fake_cuda.graphs) == 1


def test_the_callers_stream_is_current_again_when_a_capture_ends_in_an_error(fake_cuda: FakeCuda) -> None:  # noqa: F811
    caller, other = fake_cuda.current, torch.cuda.Stream()
    fake_cuda.capture_fails = True
    with pytest.raises(RuntimeError, match="previous error"):
        capture_graph(lambda: torch.ones(2), other)
    assert fake_cuda.current is caller
    fake_cuda.capture_fails = False

    def broken() -> None:
        raise EngineError("the engine failed")

    with pytest.raises(EngineError, match="the engine failed"):
        capture_graph(broken, other)
    assert fake_cuda.current is caller
    assert not fake_cuda.capturing


def test_an_engine_that_fails_during_the_capture_is_run_without_one(fake_cuda: FakeCuda) -> None:  # noqa: F811
    graphed, _ = make_execution(fake_cuda, fails=lambda: fake_cuda.capturing)
    feeds = make_feeds(2)
    with pytest.warns(RuntimeWarning, match="the engine failed"):
        assert torch.allclose(run(graphed, feeds), expected(feeds), atol=1e-6)


def test_nothing_is_captured_inside_an_outer_capture(fake_cuda: FakeCuda) -> None:  # noqa: F811
    calls = []

    def double(feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(fake_cuda.current)
        return {"y": 2 * feeds["x"]}

    graphed, other = GraphedCall(double, CPU), torch.cuda.Stream()
    graph, out = capture_graph(lambda: graphed({"x": torch.ones(3)})["y"], other)
    graph.replay()
    assert torch.equal(out, torch.full((3,), 2.0))
    assert calls == [other]
    assert len(fake_cuda.graphs) == 1


def test_a_call_waits_for_the_one_before_it_on_another_stream(fake_cuda: FakeCuda) -> None:  # noqa: F811
    graphed, other = GraphedCall(lambda feeds: {"y": 2 * feeds["x"]}, CPU), torch.cuda.Stream()
    graphed({"x": torch.ones(3)})
    with torch.cuda.stream(other):
        graphed({"x": torch.ones(3)})
    [event] = other.waits  # type: ignore[attr-defined]
    assert event is graphed._order._last


def test_a_default_stream_forks_to_one_of_our_own_and_joins_it(fake_cuda: FakeCuda) -> None:  # noqa: F811
    execution, _ = make_execution(fake_cuda, graphs=False)
    default = fake_cuda.current
    run(execution, make_feeds(2))
    own: Any = execution._own_stream
    assert own.waits[0] is default
    assert own in default.waits


def test_a_graphed_module_replays_and_sees_weights_that_change_in_place(fake_cuda: FakeCuda) -> None:  # noqa: F811
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.GroupNorm(2, 4), torch.nn.SiLU())
    spec = TensorSpec("x", ("batch", 4, "height", "width"), torch.float32)
    with TorchRunner(module, (spec,), (spec,), "channels_last") as runner:
        runner._graphed = GraphedCall(runner._compute, CPU)
        for step, shape in enumerate([(2, 4, 8, 8), (2, 4, 8, 8), (1, 4, 8, 16), (2, 4, 8, 8)]):
            with torch.no_grad():
                module[0].weight.mul_(1.5)  # type: ignore[operator]
                x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
                want = module(x)
            assert torch.allclose(runner.infer({"x": x})["x"], want, atol=1e-5)
    assert len(fake_cuda.graphs) == 2
    assert fake_cuda.replays == 4


def test_a_cuda_graph_on_a_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="a CUDA graph on cpu; expected a CUDA device"):
        TorchRunner(torch.nn.Linear(2, 2), IO, SPECS, cuda_graph=True)


# What follows runs on a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "channels_last", "compile"])
def test_a_graphed_module_agrees_with_the_module_on_a_gpu(mode: str) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(4, 32, 3, padding=1), torch.nn.GroupNorm(8, 32), torch.nn.SiLU(), torch.nn.Conv2d(32, 4, 1)
    )
    module = module.cuda().half()
    spec = TensorSpec("x", ("batch", 4, "height", "width"), torch.float16)
    held = []
    with TorchRunner(module, (spec,), (spec,), mode, cuda_graph=True) as runner:
        for step, shape in enumerate([(2, 4, 32, 32), (2, 4, 32, 32), (1, 4, 32, 64), (2, 4, 32, 32)]):
            with torch.no_grad():
                module[0].weight.mul_(1.1)  # type: ignore[operator]
                x = torch.randn(shape, generator=torch.Generator().manual_seed(step)).cuda().half()
                want = module(x)
            with torch.inference_mode(step == 0):
                held.append((runner.infer({"x": x})["x"], want))
        assert runner._graphed is not None
        assert runner._graphed.failure is None
        for found, want in held:
            assert relative_l2(found, want) < 5e-3


@pytest.mark.gpu
def test_a_module_that_waits_for_the_device_runs_without_a_graph_and_gives_the_reason() -> None:
    class Waits(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (2.0 if x.sum().item() > 0 else 1.0)

    spec = TensorSpec("x", ("n",), torch.float32)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), Waits()).cuda()
    with TorchRunner(module, (spec,), (spec,), cuda_graph=True) as runner:
        x, caller = torch.ones(4, device="cuda"), torch.cuda.current_stream()
        with pytest.warns(RuntimeWarning, match="no CUDA graph could be captured"):
            first = runner.infer({"x": x})["x"]
        assert torch.equal(runner.infer({"x": x})["x"], first)
        assert torch.cuda.current_stream() == caller
        assert torch.equal(torch.ones(3, device="cuda") + 1, torch.full((3,), 2.0, device="cuda"))


@pytest.mark.gpu
def test_the_stand_in_engine_is_captured_and_stays_right_while_shared_memory_grows() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    memory = SharedMemory(device)
    unet = Execution(StandInEngine(device), None, SPECS, device, memory, Log(), "unet.engine", graphs=True)
    vae = Execution(StandInEngine(device), None, SPECS, device, memory, Log(), "vae.engine")
    for step, (execution, batch, n) in enumerate(
        [(unet, 2, 8), (vae, 4, 32), (unet, 2, 8), (vae, 4, 64), (unet, 2, 8), (unet, 3, 8)]
    ):
        feeds = {name: tensor.to(device) for name, tensor in make_feeds(batch, n, seed=step).items()}
        stream = torch.cuda.Stream() if step % 2 else torch.cuda.default_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = run(execution, feeds)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.allclose(found, expected(feeds), atol=1e-3), step
