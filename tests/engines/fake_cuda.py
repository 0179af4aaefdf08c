"""Stand-ins for CUDA's streams, events and graphs on a CPU, so that the order of calls can be tested where no GPU is.

Work runs at once, whatever stream it is enqueued on. A capture records torch's operators; as on a GPU, the tensors it
makes hold no result until the graph is replayed, and a replay runs the same operators on the same addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeStream:
    """A stream with a handle; `waits` lists the streams and events that it has waited for."""

    def __init__(self, cuda: FakeCuda, device: Any = None) -> None:
        self.cuda_stream = len(cuda.streams)
        self.waits: list[Any] = []
        cuda.streams.append(self)

    def wait_stream(self, other: FakeStream) -> None:
        self.waits.append(other)

    def wait_event(self, event: FakeEvent) -> None:
        self.waits.append(event)

    def synchronize(self) -> None:
        pass


class FakeEvent:
    """An event that remembers the stream it was recorded on."""

    def __init__(self, **_: Any) -> None:
        self.recorded_on: FakeStream | None = None

    def record(self, stream: FakeStream) -> None:
        self.recorded_on = stream


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class FakeGraph:
    """A CUDA graph of torch's operators."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._recorder = _Recorder()
        self.replays = 0
        cuda.graphs.append(self)

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert self._cuda.current is not self._cuda.streams[0], "a capture on the default stream"
        self._cuda.capturing = True
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)
        self._cuda.capturing = False
        if self._cuda.capture_fails:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        given = {id(leaf) for _, args, kwargs, _ in self._recorder.calls for leaf in tree_leaves((args, kwargs))}
        for _, _, _, out in self._recorder.calls:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and id(leaf) not in given:
                    leaf.fill_(torch.nan)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self._recorder.calls:
            again = func(*args, **kwargs)
            for new, held in zip(tree_leaves(again), tree_leaves(out), strict=True):
                if isinstance(held, torch.Tensor) and new.data_ptr() != held.data_ptr():
                    held.copy_(new)


class FakeCuda:
    """The part of `torch.cuda` that runners use. `capture_fails` makes the end of every capture raise."""

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self.graphs: list[FakeGraph] = []
        self.capturing = self.capture_fails = False
        self.current = FakeStream(self)

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in self.graphs)

    def stream_of(self, handle: int) -> FakeStream:
        return self.streams[handle]

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def device(self, _device: Any) -> Iterator[None]:
        yield

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put this in the place of `torch.cuda`'s functions."""
        replaced = {
            "Stream": lambda device=None: FakeStream(self, device),
            "Event": FakeEvent,
            "CUDAGraph": lambda: FakeGraph(self),
            "current_stream": lambda device=None: self.current,
            "default_stream": lambda device=None: self.streams[0],
            "stream": self.stream,
            "device": self.device,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "graph_pool_handle": lambda: (0, 1),
            "is_current_stream_capturing": lambda: self.capturing,
        }
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Fakes of CUDA's streams and graphs for one test."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    return cuda
