"""What a device can do at best, measured: matrix products and copies; and how near a measured time is to that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from sdcompress_engines.errors import BackendMissing, UsageError

from sdcompress.export.components import DTYPES

from .device_clock import DeviceClock
from .work import Work

_MATMUL_SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192, 16384)}
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Source and target do not share a CPU's last cache, which has up to a few hundred MiB."""
_BUDGET_S = {"cpu": 1.5, "cuda": 0.3}


@dataclass(frozen=True)
class Peaks:
    """The measured limits of a device.

    Attributes:
        matmul_flops_per_s: in a square matrix product of `precision`; a multiply-add counts as two operations.
        bandwidth_bytes_per_s: of copying memory; read and written bytes both count.
    """

    matmul_flops_per_s: float
    bandwidth_bytes_per_s: float
    precision: str


class Roofline(TypedDict):
    """A measured time against the device's limits.

    Attributes:
        share_of_matmul_peak, share_of_bandwidth: 1 is the measured limit; a backend that multiplies less (Winograd) can
            exceed it.
        least_ms: the longer of the times that the matrix product peak and the bandwidth allow.
        bound: which of the two that is, `compute` or `memory`.
    """

    share_of_matmul_peak: float
    share_of_bandwidth: float
    least_ms: float
    bound: str


def measure_peaks(
    device: str, precision: str, *, budget_s: float | None = None, copy_bytes: int | None = None
) -> Peaks:
    """Returns the best of many calls: square matrix products of several sizes, and a copy larger than the caches.

    The operands are laid out as those of a linear layer. It takes 5 to 10 s on a small CPU, under 3 s on a GPU, and
    1 GiB of memory (2 GiB on a GPU).

    Args:
        device: `cpu` or a CUDA device.
        precision: fp32, fp16 or bf16.
        budget_s: seconds for the copy and for each size of a product; None is what a steady figure needs.
        copy_bytes: how much is copied; None is far more than the device's caches hold.

    Raises:
        UsageError: another precision.
        BackendMissing: there is no such device.
    """
    if precision not in DTYPES:
        raise UsageError(f"no peak is measured in {precision!r}", expected=" or ".join(DTYPES))
    kind = device.partition(":")[0]
    if kind not in _MATMUL_SIDES or (kind == "cuda" and not torch.cuda.is_available()):
        raise BackendMissing(
            f"no device {device!r}", expected="cpu" if not torch.cuda.is_available() else "cpu or cuda"
        )
    dtype: torch.dtype = DTYPES[precision]
    flops, seconds, budget_s = 0.0, 0.0, budget_s or _BUDGET_S[kind]
    for side in _MATMUL_SIDES[kind]:
        if 8 * seconds > budget_s:  # the next size takes 8 times as long: fp16 on a CPU without instructions for it
            break
        seconds = _best(_product(side, device, dtype), device, budget_s)
        flops = max(flops, 2 * side**3 / seconds)
    size = copy_bytes or _COPY_BYTES[kind]
    size = size if kind == "cpu" else min(size, torch.cuda.mem_get_info(device)[0] // 4)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return Peaks(flops, 2 * size / _best(lambda: target.copy_(source), device, budget_s), precision)


def _product(side: int, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    left, right, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(left, right.t(), out=out)


def _best(call: Callable[[], Any], device: str, budget_s: float) -> float:
    """Returns the seconds of the quickest of at least 4 calls within a budget, after a warm-up call."""
    call()
    clock = DeviceClock(device)
    calls = 4 if clock.is_cuda else 1
    found, end = [clock.time_call(call, calls)], time.perf_counter() + budget_s
    while len(found) < 4 or time.perf_counter() < end:
        found.append(clock.time_call(call, calls))
    return min(found) / 1000


def roofline(work: Work, peaks: Peaks, step_s: float) -> Roofline:
    """Returns how near a call is to the device's limits.

    Args:
        work: what the call computes and moves.
        peaks: the device's limits.
        step_s: the measured time of the call, seconds.

    Raises:
        UsageError: the time is not over 0.
    """
    if not step_s > 0:
        raise UsageError(f"a step of {step_s} s", expected="more than 0")
    compute_s = 2 * work.macs / peaks.matmul_flops_per_s
    memory_s = work.moved_bytes / peaks.bandwidth_bytes_per_s
    return {
        "share_of_matmul_peak": compute_s / step_s,
        "share_of_bandwidth": memory_s / step_s,
        "least_ms": 1000 * max(compute_s, memory_s),
        "bound": "compute" if compute_s >= memory_s else "memory",
    }
