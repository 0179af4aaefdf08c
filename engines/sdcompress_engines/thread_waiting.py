"""How idle threads wait for each other: they spin on a quiet machine and sleep on a busy one.

The threads of OpenMP (PyTorch) and of ONNX Runtime spin while they wait. That is fastest on a quiet machine. On a busy
one they spin on a core that the thread they wait for needs. `bench/results/busy-machine.json` has the measured times.
"""

from __future__ import annotations

import os

VARIABLE = "OMP_WAIT_POLICY"
"""OpenMP reads it when PyTorch is imported. `PASSIVE` lets idle threads sleep, those of ONNX Runtime too."""
BUSY_PERCENT = 40.0
"""Use of all cores by other work from which on idle threads sleep."""
LOOKS = 6
"""How many times in a row the cores have to be that busy: a program that is just ending is no other work."""


def choose_waiting(sample_s: float = 0.05) -> None:
    """Let idle threads sleep if other work keeps the cores busy now. Call it before PyTorch is imported.

    A value of `OMP_WAIT_POLICY` that is set already stays. Child processes inherit the choice.

    Args:
        sample_s: how long each look at the use of the cores takes, in seconds; the first quiet one is the last.
    """
    import psutil

    if VARIABLE in os.environ:
        return
    if all(psutil.cpu_percent(interval=sample_s) >= BUSY_PERCENT for _ in range(LOOKS)):
        os.environ[VARIABLE] = "PASSIVE"


def idle_threads_sleep() -> bool:
    """Returns whether idle threads sleep in this process."""
    return os.environ.get(VARIABLE, "").upper() == "PASSIVE"
