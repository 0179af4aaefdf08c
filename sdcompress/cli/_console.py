"""What the commands share: progress on stderr, the closing card, common options, did-you-mean."""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from sdcompress_engines.progress import Advance, Reporter


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where something known is near, else the list of what is known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def first_process() -> bool:
    """Whether this is the one process of several, started by torchrun or accelerate, that talks."""
    return os.environ.get("RANK", "0") == "0"


class ConsoleReporter(Reporter):
    """Progress bars on a terminal, a plain line every few seconds elsewhere; always on stderr, and from one process of
    several.
    """

    PLAIN_EVERY_S = 10.0

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def say(self, text: str) -> None:
        if first_process():
            click.echo(text, err=True)

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        if self.terminal and first_process():
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
                TextColumn("{task.description:<34}"),
                BarColumn(24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task(label, total=total, note="")
                yield lambda n=1, note="": bar.update(task, advance=n, note=note)
            return
        started = last = time.monotonic()
        done = 0

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done, last
            done += n
            now = time.monotonic()
            if now - last >= self.PLAIN_EVERY_S:
                last = now
                left = f", {(now - started) / done * (total - done):.0f} s left" if total and done else ""
                self.say(f"{label}: {done}{f'/{total}' if total else ''}{left}{f', {note}' if note else ''}")

        self.say(f"{label} ...")
        yield advance
        self.say(f"{label}: done in {time.monotonic() - started:.1f} s")


def card(title: str, rows: Iterable[tuple[str, object]], next_command: str | None = None) -> None:
    """The closing card of a stage, on stdout: what was made, where, and what to type next."""
    if not first_process():
        return
    rows = [(key, str(value)) for key, value in rows]
    width = max((len(key) for key, _ in rows), default=0)
    lines = [f"{key:<{width}}  {value}" for key, value in rows]
    rule = "─" * min(100, max(len(line) for line in [title, *lines]))
    click.echo("\n".join(["", title, rule, *lines]))
    if next_command:
        click.echo(f"{rule}\nnext: {next_command}")


def output_option(help: str = "Folder to write to; must not exist or be empty.") -> Callable[[Any], Any]:
    """`-o/--output DIR`, required."""
    return click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help=help)


def force_option(function: Any) -> Any:
    """`--force`: replace what is at the output."""
    return click.option("--force", is_flag=True, help="Replace the output folder if it is there.")(function)


def json_option(function: Any) -> Any:
    """`--json`: the result as JSON on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"


def millions(count: float) -> str:
    return f"{count / 1e6:,.2f} M"
