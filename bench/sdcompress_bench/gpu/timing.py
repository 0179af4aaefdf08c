"""Times calls: in blocks between two CUDA events on a GPU, or between two readings of the clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..device_clock import DeviceClock

BLOCK_S = 0.03
"""Length of a block of calls. In a block this long, the first launch after an idle moment does not count."""
WARM_UP_S = 0.25
"""A GPU raises its clocks within this time."""
LEAST_BLOCKS = 7


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(call: Callable[[], Any], device: torch.device, budget_s: float = 1.0) -> dict[str, Any]:
    """Returns `step_ms` (time of a call, median of the blocks), its 10th and 90th percentile, and `host_ms`.

    It also returns the numbers of `blocks` and of `calls` in each.

    Args:
        call: enqueues the same work each time. It has run before, so it compiles and captures nothing.
        device: that the call runs on.
        budget_s: seconds for the blocks; warming up and `host_ms` take a little more.
    """
    each_s = _warm_up(call, device, min(WARM_UP_S, budget_s))
    calls = max(1, round(min(BLOCK_S, budget_s) / each_s))
    clock = DeviceClock(device)
    found: list[float] = []
    end = time.perf_counter() + budget_s
    while len(found) < LEAST_BLOCKS or time.perf_counter() < end:
        found.append(clock.time_call(call, calls))
        if len(found) >= 3 and time.perf_counter() > end + budget_s:  # calls of seconds
            break
    deciles = statistics.quantiles(found, n=10, method="inclusive")
    return {
        "step_ms": statistics.median(found),
        "step_low_ms": deciles[0],
        "step_high_ms": deciles[-1],
        "blocks": len(found),
        "calls": calls,
        "host_ms": _host_ms(call, device),
    }


def _warm_up(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Call for some seconds; returns the rough time of a call in seconds."""
    call()
    synchronize(device)
    count, began = 0, time.perf_counter()
    while count < 2 or time.perf_counter() - began < seconds:
        call()
        synchronize(device)
        count += 1
    return (time.perf_counter() - began) / count


def _host_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Returns how long a call occupies the host while the device is idle, ms.

    If that is as long as the step, the launches limit the step.
    """
    found = []
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - began))
    synchronize(device)
    return statistics.median(found)
