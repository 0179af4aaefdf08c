"""How a call runs on an engine: on a context of its profile, in memory of ours, in the order of torch's stream, and as a CUDA graph where that is wanted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from ..errors import EngineError, EngineMismatch
from .base import TensorSpec
from .memory import SharedMemory
from .shapes import Shape

GRAPHS = 4
"""CUDA graphs, each of one shape, that an engine keeps; the one used longest ago makes place."""


@dataclass
class _Context:
    """An execution context on one profile, and what was last set on it."""

    native: Any
    profile: int
    shapes: Mapping[str, Shape] | None = None
    results: dict[str, Shape] = field(default_factory=dict)
    need: int = 0
    memory: tuple[int, int] | None = None


@dataclass
class _Static:
    """Tensors whose addresses stay, for one shape; and the CUDA graph over them, where it is ours and not the library's."""

    context: _Context
    feeds: dict[str, torch.Tensor]
    results: dict[str, torch.Tensor]
    graph: torch.cuda.CUDAGraph | None = None


class Execution:
    """The runs of one engine. One thread at a time.

    Args:
        native, how: the engine, and what its contexts are made with: a runtime configuration, or the strategy of who allocates memory (it is us).
        outputs: with their dtypes.
        device: a CUDA device with its index.
        memory: for activations; contexts of this engine share it, and other engines' may.
        graphs: whether shapes that come again are replayed; `itself`: whether the library captures them.
        log: the library's; `said()` is what it complained about last.
    """

    def __init__(
        self, native: Any, how: Any, outputs: Sequence[TensorSpec], device: torch.device, memory: SharedMemory, log: Any, where: str | PathLike[str] | None, *, graphs: bool = False, itself: bool = False
    ) -> None:
        self._engine, self._how, self._outputs, self._device = native, how, tuple(outputs), device
        self._memory, self._log, self._where = memory, log, where
        self._graphs, self._itself = graphs, itself
        self._contexts: dict[int, _Context] = {}
        self._statics: dict[tuple[int, tuple[Shape, ...]], _Static] = {}
        self._own_stream = torch.cuda.Stream(device)

    def run(self, profile: int, shapes: Mapping[str, Shape], feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs, fresh tensors of torch's current stream, for contiguous feeds whose shapes `profile` takes; the device is the current one.

        Raises:
            EngineError: no memory, or the engine failed. EngineMismatch: shapes it takes after all not.
        """
        with self._stream() as stream, self._memory.lease(stream):
            if self._graphs and not torch.cuda.is_current_stream_capturing() and (static := self._static(profile, shapes, feeds, stream)):
                return self._run_static(static, shapes, feeds, stream)
            context = self._context(profile, stream)
            self._prepare(context, shapes)
            results = self._fresh(context)
            self._execute(context, {**feeds, **results}, stream)
            return results

    @contextmanager
    def _stream(self) -> Iterator[torch.cuda.Stream]:
        """The stream to enqueue on: torch's current one; for the default one, where TensorRT would wait for the whole device, a stream of our own.

        That one forks from the current stream and joins it again, so tensors of the current stream can be freed and used as if they had never left it.
        """
        current = torch.cuda.current_stream(self._device)
        if current != torch.cuda.default_stream(self._device):
            yield current
            return
        self._own_stream.wait_stream(current)
        try:
            yield self._own_stream
        finally:
            current.wait_stream(self._own_stream)

    def _context(self, profile: int, stream: torch.cuda.Stream) -> _Context:
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile, stream)
        return self._contexts[profile]

    def _new_context(self, profile: int, stream: torch.cuda.Stream) -> _Context:
        native = self._engine.create_execution_context(self._how)
        if native is None:
            raise EngineError(f"no execution context, most often for lack of GPU memory ({self._log.said()})", where=self._where)
        with self._native_errors(f"profile {profile}"):
            native.set_optimization_profile_async(profile, stream.cuda_stream)
        return _Context(native, profile)

    def _prepare(self, context: _Context, shapes: Mapping[str, Shape]) -> None:
        """Set shapes and memory where they are not what they were."""
        native = context.native
        if context.shapes != shapes:
            context.shapes, context.memory = None, None
            for name, shape in shapes.items():
                if not native.set_input_shape(name, shape):
                    raise EngineMismatch(f"input {name} of shape {shape} was refused ({self._log.said()})", where=self._where)
            with self._native_errors(f"shapes {shapes}"):
                if lacking := native.infer_shapes():
                    raise EngineMismatch(f"the shape of {', '.join(lacking)} is not known from the inputs", where=self._where)
            context.results = {spec.name: tuple(native.get_tensor_shape(spec.name)) for spec in self._outputs}
            # What these shapes need; 0 is none, or no answer, so the profile's upper bound stands in for it.
            context.need = int(native.update_device_memory_size_for_shapes()) or int(self._engine.get_device_memory_size_for_profile_v2(context.profile))
            context.shapes = dict(shapes)
        memory = self._memory.reserve(context.need)
        if context.memory != memory:
            native.set_device_memory(*memory)
            context.memory = memory

    def _fresh(self, context: _Context) -> dict[str, torch.Tensor]:
        return {spec.name: torch.empty(context.results[spec.name], dtype=spec.dtype, device=self._device) for spec in self._outputs}

    def _execute(self, context: _Context, tensors: Mapping[str, torch.Tensor], stream: torch.cuda.Stream) -> None:
        for name, tensor in tensors.items():
            if not context.native.set_tensor_address(name, tensor.data_ptr()):
                raise EngineError(f"the address of {name} was refused ({self._log.said()})", where=self._where)
        if not context.native.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"the engine failed ({self._log.said()})", where=self._where)

    def _run_static(self, static: _Static, shapes: Mapping[str, Shape], feeds: Mapping[str, torch.Tensor], stream: torch.cuda.Stream) -> dict[str, torch.Tensor]:
        results = {name: torch.empty_like(tensor) for name, tensor in static.results.items()}  # on the caller's stream, whose they are
        with torch.cuda.stream(stream):
            for name, tensor in feeds.items():
                static.feeds[name].copy_(tensor)
            if static.graph is not None:
                static.graph.replay()
            else:
                self._prepare(static.context, shapes)
                self._execute(static.context, {**static.feeds, **static.results}, stream)
            for name, tensor in results.items():
                tensor.copy_(static.results[name])
        return results

    def _static(self, profile: int, shapes: Mapping[str, Shape], feeds: Mapping[str, torch.Tensor], stream: torch.cuda.Stream) -> _Static | None:
        """Buffers and graph for these shapes, captured now if they are not there; None where a capture has failed."""
        key = (profile, tuple(shapes.values()))
        static = self._statics.pop(key, None)
        if static is not None and static.graph is not None and static.context.memory != self._memory.block:
            torch.cuda.synchronize(self._device)  # it may still run; then it goes, with the addresses it was captured with
            static = None
        if static is None:
            static = self._capture(profile, shapes, feeds, stream)
        if static is not None:
            self._statics[key] = static
            if len(self._statics) > GRAPHS:
                torch.cuda.synchronize(self._device)
                del self._statics[next(iter(self._statics))]
        return static

    def _capture(self, profile: int, shapes: Mapping[str, Shape], feeds: Mapping[str, torch.Tensor], stream: torch.cuda.Stream) -> _Static | None:
        # A captured context keeps to its shape: what kernels read of sizes may lie in the context's memory, where another shape would change it.
        context = self._context(profile, stream) if self._itself else self._new_context(profile, stream)
        self._prepare(context, shapes)
        static = _Static(context, {name: tensor.clone() for name, tensor in feeds.items()}, self._fresh(context))
        if self._itself:
            return static
        tensors = {**static.feeds, **static.results}
        torch.cuda.synchronize(self._device)
        self._execute(context, tensors, self._own_stream)  # the first run of a shape sets up what a capture may not
        self._own_stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._own_stream, capture_error_mode="thread_local"):
                self._execute(context, tensors, self._own_stream)
        except (RuntimeError, EngineError) as error:
            self._graphs = False
            warnings.warn(f"{self._where}: no CUDA graph could be captured, so it runs without ({short(error)})", RuntimeWarning, stacklevel=6)
            return None
        static.graph = graph
        return static

    @contextmanager
    def _native_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise EngineError(f"the engine does not take {what} ({short(error)}; {self._log.said()})", where=self._where) from error


def short(error: object, length: int = 300) -> str:
    """One line of what a library said, cut where it goes on and on."""
    line = " ".join(str(error).split())
    return line if len(line) <= length else f"{line[:length]} ..."
