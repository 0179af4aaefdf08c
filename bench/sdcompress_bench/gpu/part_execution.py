"""Part 2: `Execution`, `SharedMemory` and `GraphedCall` on the device, with an engine whose kernels are torch's.

Each row's `relative_l2` is the worst of its calls against double precision. A stale address, a race between streams or
a result that a later call overwrites makes it large.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from sdcompress_engines.exactness import relative_l2, use_ieee_fp32
from sdcompress_engines.runners import SharedMemory, TensorSpec, TorchRunner
from sdcompress_engines.runners.cuda_graphs import MAX_GRAPHS, GraphedCall
from sdcompress_engines.runners.execution import Execution

from ..stand_in import INPUTS, OUTPUT, StandInEngine, expected
from .child import PartRun
from .timing import time_call

LIMIT = 1e-5
"""Limit of the relative L2 of three fp32 kernels; a wrong operand gives about 1."""
SMALL, LARGE = (2, 64), (8, 256)
"""(batch, side) of the calls."""
NEEDS_CUDA = "needs CUDA's streams and graphs"
Feeds = dict[str, torch.Tensor]


class _Log:
    """The part of TensorRT's logger that `Execution` uses."""

    def last_errors(self) -> str:
        return "the stand-in gives no reasons"


class _Bench:
    """Executions that share memory, and the checks of their results."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = SharedMemory(device)
        self.engines: list[StandInEngine] = []
        self._checks: list[tuple[torch.Tensor, Feeds]] = []

    def execution(self, graphs: bool, fails: Callable[[], bool] = lambda: False) -> Execution:
        self.engines.append(StandInEngine(self.device, fails=fails))
        specs = (TensorSpec(OUTPUT, ("batch", "n", "n"), torch.float32),)
        return Execution(
            self.engines[-1], None, specs, self.device, self.memory, _Log(), "stand-in.engine", graphs=graphs
        )

    def feeds(self, batch: int, side: int) -> Feeds:
        """Returns fresh random inputs, (B, N, N), whose product has a variance of 1."""
        return {name: torch.randn(batch, side, side, device=self.device) / side**0.25 for name in INPUTS}

    def call(self, execution: Execution, batch: int, side: int) -> torch.Tensor:
        """Returns a result. `worst` checks it later, so that nothing waits for the device here.

        Args:
            execution: runs the call.
            batch: B of the inputs.
            side: N of the inputs, (B, N, N).
        """
        feeds = self.feeds(batch, side)
        output = execution.run(0, {name: tuple(tensor.shape) for name, tensor in feeds.items()}, feeds)[OUTPUT]
        self._checks.append((output, feeds))
        return output

    def worst(self) -> float:
        """Returns the largest relative L2 of all results so far."""
        errors = []
        for output, feeds in self._checks:
            truth = expected({name: tensor.double() for name, tensor in feeds.items()})
            errors.append(relative_l2(output, truth))
        return max(errors, key=lambda error: float("inf") if error != error else error)

    def captures(self) -> int:
        """Returns how many contexts were launched twice; here only a capture does that."""
        return sum(context.launches >= 2 for engine in self.engines for context in engine.contexts)


def execution(run: PartRun) -> None:
    """Write a row for each promise. Captures that fail come last, because they could disturb later rows."""
    use_ieee_fp32()
    run.measure("shared memory grows and moves", lambda: judged(grow(run.device)))
    rows: dict[str, Callable[[torch.device], dict[str, Any]]] = {
        "capture and replay": replay,
        "a graph is captured again after memory has moved": move,
        "memory reserved before: one capture": reserve,
        "captured in inference mode, called outside": inference_mode,
        "streams take turns": take_turns,
        "more shapes than graphs are kept": evict,
        "a call inside an outer capture": outer_capture,
        "a launch of three kernels": partial(launch, graphs=False),
        "a launch of three kernels, replayed": partial(launch, graphs=True),
        "an engine that fails in a capture": fail_in_capture,
        "a module that waits in a capture": wait_in_module,
        "a wait for the device in a capture": wait_in_capture,
    }
    for name, function in rows.items():
        if run.is_cuda:
            run.measure(name, partial(measure, function, run.device))
        else:
            run.skip(name, NEEDS_CUDA)


def measure(function: Callable[[torch.device], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    return judged(function(device))


def judged(figures: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures with the limit, and `failed` if the error is over it."""
    figures["limit_relative_l2"] = LIMIT
    if not figures["relative_l2"] <= LIMIT:
        figures["failed"] = f"off by {figures['relative_l2']:.2e}, over {LIMIT:g}"
    return figures


def check(promise: bool, otherwise: str) -> None:
    """Fail the row unless the promise holds.

    Raises:
        RuntimeError: it does not hold.
    """
    if not promise:
        raise RuntimeError(otherwise)


def grow(device: torch.device) -> dict[str, Any]:
    """Contexts compute correctly in a block that grows between calls. `Execution` is not used, so it runs on a CPU."""
    engine, memory = StandInEngine(device, stream_of=lambda _: None), SharedMemory(device)
    errors, sizes = [], []
    for batch, side in ((1, 16), (4, 32), (1, 16), (8, 64)):
        context = engine.create_execution_context(None)
        feeds = {name: torch.randn(batch, side, side, device=device) / side**0.25 for name in INPUTS}
        total = torch.full_like(feeds["left"], float("nan"))
        for name, tensor in feeds.items():
            context.set_input_shape(name, tuple(tensor.shape))
        context.set_device_memory(*memory.reserve(context.update_device_memory_size_for_shapes()))
        for name, tensor in {**feeds, OUTPUT: total}.items():
            context.set_tensor_address(name, tensor.data_ptr())
        check(context.execute_async_v3(0), "the launch failed")
        truth = expected({name: tensor.double() for name, tensor in feeds.items()})
        errors.append(relative_l2(total, truth))
        sizes.append(memory.block[1])
    check(sizes == sorted(sizes) and sizes[-1] == 4 * 8 * 64 * 64, f"blocks of {sizes} bytes")
    return {"relative_l2": max(errors)}


def replay(device: torch.device) -> dict[str, Any]:
    """Replays use the new inputs, and the next call does not overwrite results."""
    bench = _Bench(device)
    graphed = bench.execution(graphs=True)
    for _ in range(20):
        bench.call(graphed, *LARGE)
    check(bench.captures() == 1, f"{bench.captures()} captures instead of 1")
    return {"relative_l2": bench.worst(), "captures": bench.captures()}


def move(device: torch.device) -> dict[str, Any]:
    """No graph writes to the old address of a block that has moved: what is there now does not change."""
    bench = _Bench(device)
    unet, vae = bench.execution(graphs=True), bench.execution(graphs=False)
    placed, hits = [], 0
    for batch in (2, 4, 6, 8):
        for _ in range(3):
            bench.call(unet, *SMALL)
        torch.cuda.synchronize(device)
        address, size = bench.memory.block
        bench.call(vae, batch, 128)
        put = [torch.full((size,), 7, dtype=torch.uint8, device=device) for _ in range(8)]
        hits += any(tensor.data_ptr() == address for tensor in put)
        placed += put
    bench.call(unet, *SMALL)
    check(all(bool((tensor == 7).all()) for tensor in placed), "memory that is no longer the block's was written to")
    return {"relative_l2": bench.worst(), "memory_mib": bench.memory.block[1] / 2**20, "old_addresses_taken": hits}


def reserve(device: torch.device) -> dict[str, Any]:
    bench = _Bench(device)
    unet, vae = bench.execution(graphs=True), bench.execution(graphs=False)
    vae.reserve(0, dict.fromkeys(INPUTS, (LARGE[0], LARGE[1], LARGE[1])))
    for _ in range(3):
        bench.call(unet, *SMALL)
        bench.call(vae, *LARGE)
    captures = sum(context.launches >= 2 for context in bench.engines[0].contexts)
    check(captures == 1, f"{captures} captures instead of 1")
    return {"relative_l2": bench.worst(), "captures": captures}


def inference_mode(device: torch.device) -> dict[str, Any]:
    """Results can be changed in place, as schedulers do, in whatever mode the graph was captured."""
    linear = torch.nn.Linear(64, 64, bias=False, device=device)
    weight = linear.weight.detach().double()
    spec = (TensorSpec("x", ("batch", 64), torch.float32), TensorSpec("y", ("batch", 64), torch.float32))
    errors = []
    with TorchRunner(linear, spec[:1], spec[1:], cuda_graph=True) as runner:
        for inside in (True, False, True, False):
            x = torch.randn(8, 64, device=device)
            with torch.inference_mode(inside):
                found = runner.infer({"x": x})["y"]
            truth = x.double() @ weight.T
            errors.append(relative_l2(found, truth))
            found.add_(1)  # an inference tensor would refuse
    return {"relative_l2": max(errors)}


def take_turns(device: torch.device) -> dict[str, Any]:
    """Calls on the default stream and on other streams, without a wait on the host between them."""
    bench = _Bench(device)
    graphed, plain = bench.execution(graphs=True), bench.execution(graphs=False)
    plain.reserve(0, dict.fromkeys(INPUTS, (LARGE[0], LARGE[1], LARGE[1])))
    others: list[Any] = [torch.cuda.Stream(device) for _ in range(3)]
    for turn in range(60):
        stream = others[turn % 4] if turn % 4 < 3 else None
        with torch.cuda.stream(stream) if stream else nullcontext():
            bench.call(graphed if turn % 3 else plain, *LARGE)
    torch.cuda.synchronize(device)
    return {"relative_l2": bench.worst()}


def evict(device: torch.device) -> dict[str, Any]:
    bench = _Bench(device)
    graphed = bench.execution(graphs=True)
    for _ in range(3):
        for batch in range(1, MAX_GRAPHS + 3):
            bench.call(graphed, batch, 64)
    return {"relative_l2": bench.worst()}


def fail_in_capture(device: torch.device) -> dict[str, Any]:
    """The launch fails during capture: every call runs without a graph, after one warning."""
    return _without_graph(device, torch.cuda.is_current_stream_capturing)


def wait_in_capture(device: torch.device) -> dict[str, Any]:
    """The launch waits for the device during capture. CUDA does not allow that, and the capture breaks."""

    def wait() -> bool:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(device)
        return False

    return _without_graph(device, wait)


def _without_graph(device: torch.device, fails: Callable[[], bool]) -> dict[str, Any]:
    bench, before = _Bench(device), torch.cuda.current_stream(device)
    graphed, other = bench.execution(graphs=True, fails=fails), bench.execution(graphs=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            bench.call(graphed, *SMALL)
    check(torch.cuda.current_stream(device) == before, "another stream is current after the failed capture")
    reasons = _reasons(caught)
    check(len(reasons) == 1, f"{len(reasons)} warnings instead of 1")
    for _ in range(3):  # later executions are not affected
        bench.call(other, *SMALL)
    check(
        sum(context.launches >= 2 for context in bench.engines[1].contexts) == 1, "nothing can be captured afterwards"
    )
    check(_gives_memory_back(device), "torch's allocator gives no memory back afterwards")
    return {"relative_l2": bench.worst(), "value": reasons[0][:120]}


def _gives_memory_back(device: torch.device) -> bool:
    """Returns whether freed memory goes back to the driver; an allocator that is still in a capture keeps it."""
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    reserved = torch.cuda.memory_reserved(device)
    del held
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) <= reserved - 2**28


def _reasons(caught: Iterable[Any]) -> list[str]:
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "no CUDA graph could be captured" in text]


def wait_in_module(device: torch.device) -> dict[str, Any]:
    class Waits(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (2.0 if x.abs().sum().item() > 0 else 1.0)

    spec = TensorSpec("x", ("batch", 64), torch.float32)
    module = torch.nn.Sequential(torch.nn.Linear(64, 64, device=device), Waits())
    with (
        TorchRunner(module, (spec,), (spec,), cuda_graph=True) as runner,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        errors = []
        for _ in range(3):
            x = torch.randn(8, 64, device=device)
            found = runner.infer({"x": x})["x"]
            with torch.no_grad():
                truth = module(x).double()
            errors.append(relative_l2(found, truth))
    reasons = _reasons(caught)
    check(len(reasons) == 1, f"{len(reasons)} warnings instead of 1")
    return {"relative_l2": max(errors), "value": reasons[0][:120]}


def outer_capture(device: torch.device) -> dict[str, Any]:
    """During an outer capture the work becomes part of the outer graph."""
    graphed = GraphedCall(lambda feeds: {"y": feeds["x"] @ feeds["x"]}, device)
    static, stream = torch.randn(64, 64, device=device), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        graphed({"x": static})
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = graphed({"x": static})["y"]
    errors = []
    for _ in range(3):
        static.copy_(torch.randn(64, 64, device=device))
        graph.replay()
        truth = static.double() @ static.double()
        errors.append(relative_l2(out, truth))
    return {"relative_l2": max(errors)}


def launch(device: torch.device, graphs: bool) -> dict[str, Any]:
    """The cost of a call besides its kernels, which take almost no time here."""
    bench = _Bench(device)
    runs, feeds = bench.execution(graphs), bench.feeds(*SMALL)
    shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
    runs.run(0, shapes, feeds)
    figures = time_call(lambda: runs.run(0, shapes, feeds), device, 0.2)
    bench.call(runs, *SMALL)
    return figures | {"relative_l2": bench.worst()}
