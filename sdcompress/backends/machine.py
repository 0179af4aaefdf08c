"""Facts about this machine: what a measurement holds for, and what a diagnosis shows."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from sdcompress_engines.manifest import installed_versions


def machine_key(device: str) -> dict[str, Any]:
    """Returns what a measurement holds for: the name of the device, its threads and the installed versions."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "versions": installed_versions()}


def _cpu_name() -> str:
    """Returns the name of the processor. psutil has none, and `platform` has only an architecture on Linux."""
    try:
        return next(
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def load_average() -> float:
    """Returns how many processes were running or waiting on average in the last minute."""
    return float(psutil.getloadavg()[0])


def core_count() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def system_name() -> str:
    """Returns the operating system, its version and the kind of processor."""
    name = f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}"
    if sys.platform != "linux":
        return name
    try:
        return f"{platform.freedesktop_os_release().get('PRETTY_NAME', 'Linux')}, {name}"
    except OSError:
        return name


def describe_cards() -> list[str]:
    """Returns the name, compute capability and memory of each GPU that torch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [
        f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:,.0f} GiB"
        for card in cards
    ]


def memory_gib() -> float:
    """Returns the memory of the machine."""
    return round(psutil.virtual_memory().total / 2**30, 1)
