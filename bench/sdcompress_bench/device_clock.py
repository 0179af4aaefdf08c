"""The time of work on a device: CUDA events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Mark = Any
"""A moment on a device: a CUDA event that may not have happened yet, or a reading of the wall clock in seconds."""


class DeviceClock:
    """Marks moments between pieces of work without waiting for the device.

    Args:
        device: `cpu`, or `cuda`: the current CUDA device.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.is_cuda = torch.device(device).type == "cuda"

    def mark(self) -> Mark:
        """Returns the moment at which the work that was given to the device so far is done."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start: Mark, end: Mark) -> float:
        """Returns the milliseconds between two marks, after waiting for the later one."""
        if not self.is_cuda:
            return 1000 * float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end))

    def time_call(self, call: Callable[[], Any], calls: int = 1) -> float:
        """Returns the milliseconds of a call.

        Args:
            call: gives the device its work.
            calls: how many run in a row. On a GPU, several hide the time of the first launch.
        """
        start = self.mark()
        for _ in range(calls):
            call()
        return self.elapsed_ms(start, self.mark()) / calls
