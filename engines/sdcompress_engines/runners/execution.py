"""Calls on a TensorRT engine: one context for each profile, activations in memory of the runner's, in the order of
torch's stream, as CUDA graphs if wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from ..errors import EngineError, EngineMismatch, shorten
from .base import TensorSpec
from .cuda_graphs import MAX_GRAPHS, StaticCall, capture_graph, warn_without_graph
from .memory import SharedMemory
from .shapes import Shape


@dataclass
class _Context:
    """An execution context on one profile, and what was set on it last."""

    native: Any
    profile: int
    shapes: Mapping[str, Shape] | None = None
    results: dict[str, Shape] = field(default_factory=dict)
    need: int = 0
    memory: tuple[int, int] | None = None


@dataclass
class _Captured:
    """A static call.

    Attributes:
        context: that it runs on.
        holds_addresses: whether a CUDA graph of this module holds the addresses of that context's memory.
    """

    context: _Context
    call: StaticCall
    holds_addresses: bool


class Execution:
    """The runs of one engine. Only one thread at a time may use it.

    Args:
        native: the engine.
        context_argument: of `create_execution_context`: a runtime configuration, or the allocation strategy
            `USER_MANAGED`.
        outputs: with their dtypes.
        device: a CUDA device with its index.
        memory: for activations; contexts of this engine share it, and other engines' may.
        log: the library's; `last_errors()` returns its last errors.
        where: the engine's path, for messages.
        graphs: whether repeated shapes are replayed as CUDA graphs.
        library_captures: whether the library captures and replays the graphs.
    """

    def __init__(
        self,
        native: Any,
        context_argument: Any,
        outputs: Sequence[TensorSpec],
        device: torch.device,
        memory: SharedMemory,
        log: Any,
        where: str | PathLike[str] | None,
        *,
        graphs: bool = False,
        library_captures: bool = False,
    ) -> None:
        self._engine, self._context_argument, self._outputs, self._device = (
            native,
            context_argument,
            tuple(outputs),
            device,
        )
        self._memory, self._log, self._where = memory, log, where
        self._graphs, self._library_captures = graphs, library_captures
        self._contexts: dict[int, _Context] = {}
        self._captured: dict[tuple[int, tuple[Shape, ...]], _Captured] = {}  # the one used last comes last
        self._own_stream = torch.cuda.Stream(device)

    def run(
        self, profile: int, shapes: Mapping[str, Shape], feeds: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns the outputs, fresh tensors of torch's current stream.

        Args:
            profile: index of an optimization profile that fits `shapes`.
            shapes: of the inputs, by name.
            feeds: contiguous tensors on the device, which is the current one.

        Raises:
            EngineError: no memory, or the engine failed. EngineMismatch: the engine refuses the shapes.
        """
        with self._stream() as stream, self._memory.lease(stream):
            if self._graphs and not torch.cuda.is_current_stream_capturing():
                captured = self._find_or_capture(profile, shapes, feeds, stream)
                if captured is not None:
                    return captured.call(feeds, stream)
            context = self._context(profile, stream)
            self._prepare(context, shapes)
            results = self._fresh(context)
            self._execute(context, {**feeds, **results}, stream)
            return results

    def reserve(self, profile: int, shapes: Mapping[str, Shape]) -> None:
        """Make the activation memory large enough for these shapes now.

        Otherwise it would grow later, and graphs would be captured again.

        Args:
            profile: index of an optimization profile.
            shapes: of the inputs, by name.

        Raises:
            EngineError: no memory. EngineMismatch: the profile does not take these shapes.
        """
        with self._stream() as stream:
            self._prepare(self._context(profile, stream), shapes)

    def drop_graphs(self) -> None:
        """Forget every captured graph; the next call of a shape captures it anew. The device must be idle."""
        self._captured.clear()

    @contextmanager
    def _stream(self) -> Iterator[torch.cuda.Stream]:
        """Yield the stream to enqueue on: torch's current one, or instead of the default one a stream of our own.

        On the default stream TensorRT would wait for the whole device. The own stream forks from the current one and
        joins it again, so tensors of the current stream can be freed and used as usual.
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

    def _separate_context(self, profile: int, shapes: Mapping[str, Shape], stream: torch.cuda.Stream) -> _Context:
        """Returns a context for these shapes alone: the one that `reserve` prepared for them, else a new one."""
        held = self._contexts.get(profile)
        if held is not None and held.shapes == shapes:
            return self._contexts.pop(profile)
        return self._new_context(profile, stream)

    def _new_context(self, profile: int, stream: torch.cuda.Stream) -> _Context:
        native = self._engine.create_execution_context(self._context_argument)
        if native is None:
            raise EngineError(
                f"no execution context, most often for lack of GPU memory ({self._log.last_errors()})",
                where=self._where,
            )
        with self._native_errors(f"profile {profile}"):
            native.set_optimization_profile_async(profile, stream.cuda_stream)
        return _Context(native, profile)

    def _prepare(self, context: _Context, shapes: Mapping[str, Shape]) -> None:
        """Set shapes and memory where they differ from those set before."""
        native = context.native
        if context.shapes != shapes:
            context.shapes, context.memory = None, None
            for name, shape in shapes.items():
                if not native.set_input_shape(name, shape):
                    raise EngineMismatch(
                        f"input {name} of shape {shape} was refused ({self._log.last_errors()})", where=self._where
                    )
            with self._native_errors(f"shapes {shapes}"):
                if lacking := native.infer_shapes():
                    raise EngineMismatch(
                        f"the shape of {', '.join(lacking)} is not known from the inputs", where=self._where
                    )
            context.results = {spec.name: tuple(native.get_tensor_shape(spec.name)) for spec in self._outputs}
            # What these shapes need. 0 is none or unknown, and the profile's upper bound is used instead.
            context.need = int(native.update_device_memory_size_for_shapes()) or int(
                self._engine.get_device_memory_size_for_profile_v2(context.profile)
            )
            context.shapes = dict(shapes)
        memory = self._memory.reserve(context.need)
        if context.memory != memory:
            native.set_device_memory(*memory)
            context.memory = memory

    def _fresh(self, context: _Context) -> dict[str, torch.Tensor]:
        return {
            spec.name: torch.empty(context.results[spec.name], dtype=spec.dtype, device=self._device)
            for spec in self._outputs
        }

    def _execute(self, context: _Context, tensors: Mapping[str, torch.Tensor], stream: torch.cuda.Stream) -> None:
        for name, tensor in tensors.items():
            if not context.native.set_tensor_address(name, tensor.data_ptr()):
                raise EngineError(f"the address of {name} was refused ({self._log.last_errors()})", where=self._where)
        if not context.native.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"the engine failed ({self._log.last_errors()})", where=self._where)

    def _find_or_capture(
        self, profile: int, shapes: Mapping[str, Shape], feeds: Mapping[str, torch.Tensor], stream: torch.cuda.Stream
    ) -> _Captured | None:
        """Returns the static call for these shapes; None where a capture has failed.

        It is captured now if it is new or its memory has moved.
        """
        key = (profile, tuple(shapes.values()))
        captured = self._captured.pop(key, None)
        if captured is not None and captured.holds_addresses and captured.context.memory != self._memory.block:
            torch.cuda.synchronize(self._device)  # the graph may still run
            captured = None
        captured = captured or self._capture(profile, shapes, feeds, stream)
        if captured is not None:
            self._captured[key] = captured
            if len(self._captured) > MAX_GRAPHS:
                torch.cuda.synchronize(self._device)
                del self._captured[next(iter(self._captured))]
        return captured

    def _capture(
        self, profile: int, shapes: Mapping[str, Shape], feeds: Mapping[str, torch.Tensor], stream: torch.cuda.Stream
    ) -> _Captured | None:
        # A captured context keeps its shape: kernels may read sizes from the context's memory, where another shape
        # would change them.
        context = (
            self._context(profile, stream)
            if self._library_captures
            else self._separate_context(profile, shapes, stream)
        )
        self._prepare(context, shapes)
        inputs, results = {name: tensor.clone() for name, tensor in feeds.items()}, self._fresh(context)
        tensors = {**inputs, **results}
        if self._library_captures:  # the library captures and replays inside its own launch

            def launch() -> None:
                self._prepare(context, shapes)
                self._execute(context, tensors, torch.cuda.current_stream(self._device))

            return _Captured(context, StaticCall(inputs, results, launch), holds_addresses=False)
        torch.cuda.synchronize(self._device)
        # The first run of a shape sets up what a capture must not contain.
        self._execute(context, tensors, self._own_stream)
        self._own_stream.synchronize()
        try:
            graph, _ = capture_graph(lambda: self._execute(context, tensors, self._own_stream), self._own_stream)
        except (RuntimeError, EngineError) as error:
            self._graphs = False
            warn_without_graph(self._where, shorten(error))
            return None
        return _Captured(context, StaticCall(inputs, results, graph.replay), holds_addresses=True)

    @contextmanager
    def _native_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise EngineError(
                f"the engine does not take {what} ({shorten(error)}; {self._log.last_errors()})", where=self._where
            ) from error
