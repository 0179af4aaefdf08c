"""The memory of this process and of this machine, on Linux, Windows and macOS, with psutil where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss_mib() -> float:
    """Returns the largest resident memory this process has had, MiB; 0.0 where nothing here can read it.

    Linux: `VmHWM`, because `getrusage` also counts the memory of the parent before it started this process.
    Windows: `peak_wset`, which needs psutil. Elsewhere: `getrusage`.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    except (ImportError, AttributeError):  # not installed, or not Windows
        pass
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def available_memory_bytes() -> int | None:
    """Returns the memory that new processes can take without swapping, bytes; None where nothing here can read it."""
    try:
        import psutil

        return int(psutil.virtual_memory().available)
    except ImportError:
        pass
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
