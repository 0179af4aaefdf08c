"""Describes the machine of a measurement: enough to judge a figure, nothing that names the machine or its owner."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
from sdcompress_engines.manifest import installed_versions


def environment() -> dict[str, Any]:
    """Returns CPU, memory, GPU, driver and clocks, OS, Python, package versions, load and git commit.

    There is no host name, user or path in it.
    """
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "memory_mib": psutil.virtual_memory().total // 2**20,
        "load_average": load_average(),
        "gpu": _gpus(),
        "cpu_features": _cpu_features(),
        "clocks": _clocks(),
        "os": _system(),
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "packages": installed_versions(),
        "commit": _commit(),
    }


def _cores() -> int | None:
    """Returns how many CPU cores this process may use."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count()


def load_average() -> float | None:
    """Returns the load average of the last minute, or None on a system without one, such as Windows."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def _cpu_features() -> list[str]:
    """Returns the vector units that decide how fast a precision is on this CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    flags = set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))
    return [
        name
        for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
        if name in flags
    ]


def _clocks() -> str:
    """Returns the present clocks, limits and mode of the GPU, else of the CPU; empty where they are unknown."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,persistence_mode"
    gpu = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()
    if gpu:
        names = ("SM", "SM at most", "memory", "power limit", "persistence")
        return "; ".join(
            ", ".join(f"{name} {value.strip()}" for name, value in zip(names, line.split(","), strict=False))
            for line in gpu
        )
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    cpuinfo = Path("/proc/cpuinfo")
    speeds = [
        float(line.split(":", 1)[1])
        for line in (cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else [])
        if line.startswith("cpu MHz")
    ]
    parts = [
        f"CPU {max(speeds):,.0f} MHz" if speeds else "",
        governor.read_text(encoding="utf-8").strip() if governor.is_file() else "",
    ]
    return ", ".join(part for part in parts if part)


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "memory_mib": gpu.total_memory // 2**20,
            "compute": f"{gpu.major}.{gpu.minor}",
            "driver": driver[0] if driver else "",
            "cuda": torch.version.cuda,
        }
        for gpu in found
    ]


def gpu_memory_used_mib() -> float | None:
    """Returns the memory in use on all GPUs, MiB, contexts included, or None if `nvidia-smi` does not answer.

    Unlike torch's own figures, this needs no CUDA context.
    """
    values = _output("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits").split()
    try:
        return sum(float(value) for value in values) if values else None
    except ValueError:
        return None


def _system() -> str:
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "") + ", "
    except OSError:
        distribution = ""
    return f"{distribution}{platform.system()} {platform.release().split('-')[0]} {platform.machine()}"


def _commit() -> str | None:
    """Returns the commit of this file's checkout, with `+` if files differ from it; None for an installed package."""
    here = str(Path(__file__).parent)
    commit = _output("git", "-C", here, "log", "-1", "--format=%h", "--", ".")
    if not commit:
        return None
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    return commit + ("+" if _output("git", "-C", here, "status", "--porcelain") else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
