"""One block of GPU memory for the activations of all engines of a pipeline, and the order of the calls that use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import EngineError


class StreamOrder:
    """Keeps calls on shared buffers in order on the device, whichever streams they use.

    Only one thread at a time may enqueue them.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None

    @contextmanager
    def lease(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Let work that the block enqueues on `stream` wait for the call before, and the next call wait for it."""
        if torch.cuda.is_current_stream_capturing():
            # An outer graph takes no events from outside; its owner keeps the order.
            yield
            return
        if self._last is not None:
            stream.wait_event(self._last)
        try:
            yield
        finally:
            self._last = self._last or torch.cuda.Event()
            self._last.record(stream)


class SharedMemory(StreamOrder):
    """Activation memory of engines that run one after another: one block, as large as the largest engine needs.

    A CUDA graph keeps the addresses it was captured with, so runners capture their graphs again after the memory has
    grown.

    Args:
        device: where the memory is.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self._tensor: torch.Tensor | None = None

    @property
    def block(self) -> tuple[int, int]:
        """Address and size in bytes of what is reserved."""
        return (0, 0) if self._tensor is None else (self._tensor.data_ptr(), self._tensor.numel())

    def reserve(self, size: int) -> tuple[int, int]:
        """Returns `block`, of at least `size` bytes. It moves only to grow, and then waits for all work on the device.

        Raises:
            EngineError: the device has too little memory.
        """
        if size > self.block[1]:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._tensor = None
            try:
                self._tensor = torch.empty(size, dtype=torch.uint8, device=self.device)
            except RuntimeError as error:  # torch.OutOfMemoryError, and what the CPU's allocator raises
                what = f"no room on {self.device} for {size / 2**20:,.0f} MiB of activations"
                raise EngineError(
                    what, hint="fewer or smaller pictures at once, or close other programs on this GPU"
                ) from error
        return self.block
