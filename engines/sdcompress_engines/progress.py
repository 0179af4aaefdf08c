"""How a stage tells what it is doing: it calls a `Reporter`; the silent one here is the default, the command line has a
visible one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]


class Reporter:
    """Takes what stages say and shows nothing."""

    def say(self, text: str) -> None:
        """One line worth reading."""

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """A piece of work of `total` units; the block gets `advance(n=1, note="")`."""

        def advance(n: int = 1, note: str = "") -> None:
            return None

        yield advance


SILENT = Reporter()
