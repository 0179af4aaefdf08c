"""How a stage reports its progress: it calls a `Reporter`.

The default one, here, shows nothing. The command line has one that prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]


class Reporter:
    """Takes reports of stages and shows nothing."""

    def show_line(self, text: str) -> None:
        """Show one line."""

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """Show the progress of a task. The block gets `advance(n=1, note="")`.

        Args:
            label: what is done.
            total: units of work; None where the number is not known.
        """

        def advance(n: int = 1, note: str = "") -> None:
            return None

        yield advance


SILENT = Reporter()
