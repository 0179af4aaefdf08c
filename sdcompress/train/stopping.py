"""Stop signals, and the agreement of all processes of a run on stopping."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

_STEPS_BETWEEN_CHECKS = 10


@contextmanager
def catch_stop_signals() -> Iterator[list[int]]:
    """Yield a list that receives the signals to stop, instead of the process ending; a second signal ends it.

    They are SIGINT, SIGTERM and SIGHUP, which a closed terminal sends; `nohup` ignores that one, and it stays so.

    Outside the main thread the list stays empty: Python delivers signals to the main thread.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    try:
        previous = {number: signal.signal(number, receive) for number in numbers}
    except ValueError:  # not the main thread
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def any_process_stops(accelerator: Accelerator, signaled: bool, step: int) -> bool:
    """Returns whether any process of the run has received a stop signal.

    Several processes exchange this only every `_STEPS_BETWEEN_CHECKS` steps: each exchange waits for the device.

    Args:
        accelerator: the run's.
        signaled: whether this process has received one.
        step: steps done, equal in all processes.
    """
    if accelerator.num_processes == 1:
        return signaled
    if step % _STEPS_BETWEEN_CHECKS:
        return False
    return float(accelerator.reduce(torch.tensor(float(signaled), device=accelerator.device), "sum")) > 0
