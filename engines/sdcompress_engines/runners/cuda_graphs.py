"""CUDA graphs: the work of a call, captured once for each input shape and replayed over tensors that stay in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

import torch

from ..errors import EngineError, UsageError, shorten
from .memory import StreamOrder

Tensors = dict[str, torch.Tensor]
Result = TypeVar("Result")

MAX_GRAPHS = 4
"""CUDA graphs, each of one shape, that a runner keeps; a new one replaces the one that was used longest ago."""
_WARM_UP_CALLS = 3
"""Calls before a capture. They compile, choose kernels and allocate workspaces, which a capture must not contain."""


def check_graph_device(wanted: bool, device: torch.device) -> None:
    """Refuse a CUDA graph on a device that has none.

    Raises:
        UsageError: one is wanted, and the device is no GPU.
    """
    if wanted and device.type != "cuda":
        raise UsageError(f"a CUDA graph on {device}", expected="a CUDA device", hint="cuda_graph=False")


def capture_graph(
    call: Callable[[], Result], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Returns the graph of what `call` enqueues, and what `call` returned.

    The caller's stream is current again, also after an error.

    Args:
        call: enqueues work; it must not wait for the device.
        stream: a stream other than the default one, idle; `call` runs with it as the current stream.
        pool: the memory pool of the tensors that `call` makes, from `torch.cuda.graph_pool_handle`.

    Raises:
        RuntimeError, EngineError: something in `call` cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = call()
        except BaseException:
            with suppress(RuntimeError):  # the capture is broken too; the first error is the one to report
                graph.capture_end()
            raise
        graph.capture_end()
    return graph, result


@dataclass
class StaticCall:
    """A call on tensors whose addresses stay: feeds are copied in, `launch` enqueues the work, results are copied out.

    Attributes:
        feeds, results: static tensors by name, on one CUDA device.
        launch: enqueues the work on the current stream; the replay of a graph, or a library's own launch.
    """

    feeds: Tensors
    results: Tensors
    launch: Callable[[], None]

    def __call__(self, feeds: Mapping[str, torch.Tensor], stream: torch.cuda.Stream) -> Tensors:
        """Returns fresh tensors that belong to the caller's current stream; the work runs on `stream`."""
        results = {name: torch.empty_like(tensor) for name, tensor in self.results.items()}
        with torch.cuda.stream(stream):
            for name, tensor in feeds.items():
                self.feeds[name].copy_(tensor)
            self.launch()
            for name, tensor in results.items():
                tensor.copy_(self.results[name])
        return results


class GraphedCall:
    """A function of named tensors that is captured once for each set of input shapes and replayed from then on.

    Where a capture fails, a warning gives the reason once, and every call runs without a graph.

    Args:
        function: input tensors by name → output tensors by name, all on `device`. It must not wait for the device.
        device: a CUDA device with its index.
        where: the file that runs, for the warning.
        limit: how many graphs are kept.
    """

    def __init__(
        self,
        function: Callable[[Tensors], Tensors],
        device: torch.device,
        where: str | PathLike[str] | None = None,
        limit: int = MAX_GRAPHS,
    ) -> None:
        self._function, self._device, self._where, self._limit = function, device, where, limit
        self._calls: dict[tuple[tuple[int, ...], ...], StaticCall] = {}  # the one used last comes last
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._order = StreamOrder()
        self.failure: str | None = None

    def __call__(self, feeds: Tensors) -> Tensors:
        """Returns the outputs, fresh tensors on torch's current stream."""
        if self.failure is not None or torch.cuda.is_current_stream_capturing():
            return self._function(feeds)
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            with self._order.lease(stream):
                call = self._static_call(feeds)
                return self._function(feeds) if call is None else call(feeds, stream)

    def _static_call(self, feeds: Tensors) -> StaticCall | None:
        key = tuple(tuple(tensor.shape) for tensor in feeds.values())
        call = self._calls.pop(key, None)
        if call is None:
            while len(self._calls) >= self._limit:
                torch.cuda.synchronize(self._device)  # the graph may still run
                del self._calls[next(iter(self._calls))]
            call = self._capture(feeds)
        if call is not None:
            self._calls[key] = call
        return call

    def _capture(self, feeds: Tensors) -> StaticCall | None:
        static = {name: tensor.clone() for name, tensor in feeds.items()}
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_CALLS):
                self._function(static)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # what the warm-up took is free for the graph's own pool
        try:
            graph, results = capture_graph(lambda: self._function(static), self._stream, self._pool)
        except (RuntimeError, EngineError) as error:
            self.failure = shorten(error)
            warn_without_graph(self._where, self.failure)
            return None
        return StaticCall(static, results, graph.replay)

    def clear(self) -> None:
        """Free every graph and its tensors."""
        torch.cuda.synchronize(self._device)
        self._calls.clear()


def warn_without_graph(where: str | PathLike[str] | None, reason: str) -> None:
    """Warn that a runner goes on without CUDA graphs, and why."""
    warnings.warn(
        f"{where or 'torch module'}: no CUDA graph could be captured, so it runs without ({reason})",
        RuntimeWarning,
        stacklevel=6,
    )
