"""A stand-in for a TensorRT engine: torch's kernels behind TensorRT's names, for machines where TensorRT cannot run.

It tests `Execution` and `SharedMemory` on a card that TensorRT does not support, and on a CPU with fakes of CUDA's
streams and graphs: the order of calls, capture and replay, memory that moves, streams. It computes
softmax(left · right) · right and keeps the intermediate result in the activation memory that it was given, so a wrong
or stale address gives a wrong result.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

Shape = tuple[int, ...]
INPUTS, OUTPUT = ("left", "right"), "total"
_TYPE_NAMES = {torch.float32: "<f4", torch.float16: "<f2", torch.uint8: "|u1"}


class StandInEngine:
    """The part of an engine that `Execution` uses: contexts, and the memory they need.

    Args:
        device: `cpu` or a CUDA device with its index.
        dtype: of inputs, output and intermediate result.
        stream_of: CUDA stream handle → torch stream; by default a `torch.cuda.ExternalStream`.
        fails: called at each launch. The launch fails if it raises or returns True.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        stream_of: Callable[[int], Any] | None = None,
        fails: Callable[[], bool] = lambda: False,
    ) -> None:
        self.device, self.dtype, self.fails = device, dtype, fails
        self.stream_of = stream_of or (lambda handle: torch.cuda.ExternalStream(handle, device))
        self.contexts: list[StandInContext] = []

    def create_execution_context(self, _how: Any) -> StandInContext:
        self.contexts.append(StandInContext(self))
        return self.contexts[-1]

    def get_device_memory_size_for_profile_v2(self, _profile: int) -> int:
        """Returns the bytes of the largest shape, (64, 64, 64)."""
        return 64**3 * self.dtype.itemsize


class StandInContext:
    """An execution context: shapes and addresses are set, then it is launched on a stream. `launches` counts them."""

    def __init__(self, engine: StandInEngine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.launches = 0

    def set_optimization_profile_async(self, profile: int, _stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self.shapes[name] = tuple(shape)
        return len(shape) == 3 and shape[1] == shape[2]

    def infer_shapes(self) -> list[str]:
        return [name for name in INPUTS if name not in self.shapes]

    def get_tensor_shape(self, _name: str) -> Shape:
        return self.shapes["left"]

    def update_device_memory_size_for_shapes(self) -> int:
        return math.prod(self.shapes["left"]) * self.engine.dtype.itemsize

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        """Enqueue three kernels on the stream; returns False if the engine is to fail or its memory is too small."""
        self.launches += 1
        if self.engine.fails() or self.memory[1] < self.update_device_memory_size_for_shapes():
            return False
        with torch.cuda.stream(self.engine.stream_of(handle)):
            left, right, total = (self._tensor(self.addresses[name]) for name in (*INPUTS, OUTPUT))
            scratch = self._tensor(self.memory[0])
            torch.bmm(left, right, out=scratch)
            scratch.copy_(torch.softmax(scratch, -1))
            torch.bmm(scratch, right, out=total)
        return True

    def _tensor(self, address: int) -> torch.Tensor:
        return tensor_at(address, self.shapes["left"], self.engine.dtype, self.engine.device)


def tensor_at(address: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns a tensor over memory that it does not own.

    Args:
        address: of the first byte.
        shape: of the tensor.
        dtype: of the values.
        device: on which the memory is.
    """
    if device.type == "cpu":
        raw = (ctypes.c_byte * (math.prod(shape) * dtype.itemsize)).from_address(address)
        return torch.frombuffer(raw, dtype=dtype).reshape(shape)
    interface = {"data": (address, False), "shape": shape, "typestr": _TYPE_NAMES[dtype], "version": 3}
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=device)


def expected(feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns what the stand-in computes, (B, N, N), from `left` and `right`, (B, N, N)."""
    left, right = (feeds[name] for name in INPUTS)
    return torch.bmm(torch.softmax(torch.bmm(left, right), -1), right)
