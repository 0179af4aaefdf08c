"""How many threads compute, and how idle ones wait for each other: they spin on a quiet machine, sleep on a busy one.

The threads of OpenMP (PyTorch) and of ONNX Runtime spin while they wait. That is fastest on a quiet machine. On a busy
one they spin on a core that the thread they wait for needs. `bench/results/busy-machine.json` has the measured times.
Threads that sleep still wait for the slowest: on a busy machine fewer of them are faster.
"""

from __future__ import annotations

import os

VARIABLE = "OMP_WAIT_POLICY"
"""OpenMP reads it when PyTorch is imported. `PASSIVE` lets idle threads sleep, those of ONNX Runtime too."""
COUNT = "OMP_NUM_THREADS"
"""How many threads compute; read at the same time."""
BUSY_PERCENT = 40.0
"""Use of all cores by other work from which on idle threads sleep."""
LOOKS = 6
"""How many times in a row the cores have to be that busy: a program that is just ending is no other work."""


def choose_waiting(sample_s: float = 0.05) -> None:
    """Use fewer threads, and let idle ones sleep, if other work keeps the cores busy now.

    Call it before PyTorch is imported. Values of `OMP_WAIT_POLICY` and `OMP_NUM_THREADS` that are set already stay.
    Child processes inherit the choice.

    Args:
        sample_s: how long each look at the use of the cores takes, in seconds; the first quiet one is the last.
    """
    import psutil

    if VARIABLE in os.environ:
        return
    least = 100.0
    for _ in range(LOOKS):
        least = min(least, psutil.cpu_percent(interval=sample_s))
        if least < BUSY_PERCENT:
            return
    os.environ[VARIABLE] = "PASSIVE"
    os.environ.setdefault(COUNT, str(fair_threads(os.cpu_count() or 1, least)))


def fair_threads(cores: int, percent: float) -> int:
    """Returns how many threads do not have to share a core: half of what other work uses, and what it leaves.

    Args:
        cores: of the machine.
        percent: use of all cores by other work, 0 to 100.
    """
    return max(1, int(cores * (1 - percent / 200)))


def idle_threads_sleep() -> bool:
    """Returns whether idle threads sleep in this process."""
    return os.environ.get(VARIABLE, "").upper() == "PASSIVE"
