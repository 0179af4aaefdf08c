"""Progress on stderr, for the command line and for studies."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click
from sdcompress_engines.errors import escape_controls
from sdcompress_engines.progress import Advance, Reporter

LAUNCHED = frozenset({"RANK", "LOCAL_RANK", "MASTER_ADDR"})
"""Variables that torchrun and accelerate set beside `WORLD_SIZE`; a cluster may set some of them for any command."""


def is_first_process() -> bool:
    """Returns whether this process prints: of several that torchrun or accelerate started, only the first does."""
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1" or not set(os.environ) >= LAUNCHED
    return is_alone or os.environ["RANK"] == "0"


def describe_time(seconds: float) -> str:
    """Returns how long something took, as in `36 ms` or `1.2 s`."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.5 else f"{seconds:.1f} s"


class ConsoleReporter(Reporter):
    """Prints on stderr: progress bars on a terminal, elsewhere a plain line every few seconds."""

    PLAIN_EVERY_S = 10.0

    def __init__(self) -> None:
        self.terminal = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def show_line(self, text: str) -> None:
        if is_first_process():
            with suppress(OSError):  # of a full disk behind stderr, for which no work is given up
                click.echo(escape_controls(text), err=True)

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        show = self._show_bar if self.terminal and is_first_process() else self._show_lines
        with show(label, total) as advance:
            yield advance

    @contextmanager
    def _show_bar(self, label: str, total: int | None) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description:<34}", markup=False),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(escape_controls(label), total=total, note="")
            yield lambda n=1, note="": bar.update(task, advance=n, note=escape_controls(note))

    @contextmanager
    def _show_lines(self, label: str, total: int | None) -> Iterator[Advance]:
        started = last = time.monotonic()
        done = 0

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done, last
            done += n
            now = time.monotonic()
            if now - last >= self.PLAIN_EVERY_S:
                last = now
                left = f", {(now - started) / done * (total - done):.0f} s left" if total and done else ""
                self.show_line(f"{label}: {done}{f'/{total}' if total else ''}{left}{f', {note}' if note else ''}")

        self.show_line(f"{label} ...")
        yield advance
        self.show_line(f"{label}: done in {describe_time(time.monotonic() - started)}")
