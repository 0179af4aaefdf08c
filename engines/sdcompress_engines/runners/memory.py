"""One block of GPU memory for the activations of every engine of a pipeline, and the order of the calls that use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import EngineError


class StreamOrder:
    """Keeps calls on shared buffers in order on the device, whichever streams they come on.

    They are enqueued from one thread at a time.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None

    @contextmanager
    def lease(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """What is enqueued on `stream` inside the block waits for the call before it, and the next call waits for it."""
        if (
            torch.cuda.is_current_stream_capturing()
        ):  # an outer graph takes no events from outside; its owner keeps the order
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
    """Activation memory of engines that run one after another: as large as the largest needs, instead of a block for
    each.

    A CUDA graph keeps the addresses it was captured with, so runners capture their graphs again after the memory has
    grown.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self._tensor: torch.Tensor | None = None

    @property
    def block(self) -> tuple[int, int]:
        """Address and size in bytes of what was reserved so far."""
        return (0, 0) if self._tensor is None else (self._tensor.data_ptr(), self._tensor.numel())

    def reserve(self, size: int) -> tuple[int, int]:
        """Returns `block`, of at least `size` bytes. It moves only to grow, and then waits for what runs on the device.

        Raises:
            EngineError: the device has no room for it.
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
