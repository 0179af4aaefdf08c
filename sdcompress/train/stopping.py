"""Stop signals, agreed on by all processes of a run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

_ASK_EVERY = 10


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that a SIGINT or SIGTERM is put in instead of ending the process; a second one ends it."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever owns it handles its signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agree(accelerator: Accelerator, mine: bool, step: int) -> bool:
    """Whether any process has been told to stop.

    Several processes ask one another every `_ASK_EVERY` steps, as each time they wait for the device.
    """
    if accelerator.num_processes == 1:
        return mine
    if step % _ASK_EVERY:
        return False
    return float(accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), "sum")) > 0
