"""Runs commands of `sdcompress` in processes that are killed at a chosen moment.

Each command runs in a process of its own, forked from a server that has made the imports: the seconds of imports, in
which a kill loses nothing, are paid once. It has its own process group, as a terminal gives one to a command, and the
whole group is killed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PRELOADED = ["sdcompress_bench.preload", "accelerate", "onnx", "onnxscript", "onnxruntime"]
GRACE_S = 60.0
"""How long a command may take to end after SIGTERM."""
LIMIT_S = 3600.0
"""How long a command may take that is not interrupted."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; the negative number of the signal that ended it.
        seconds: it took.
        output: what it printed.
        survivors: processes it started that were still there afterwards; they were killed then.
    """

    code: int
    seconds: float
    output: str
    survivors: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """The lines by which a command says why it failed."""
        return [line for line in self.output.splitlines() if line.startswith("sdcompress: ")]

    @property
    def is_clean(self) -> bool:
        """Whether it ended without a traceback."""
        return "Traceback (most recent call last)" not in self.output


class Command:
    """A command that has been started.

    Args:
        arguments: of `sdcompress`.
        log: file for what it prints.
        environment: variables that differ from this process's.
    """

    def __init__(self, arguments: Iterable[str], log: Path, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.log, self.started = log, time.monotonic()
        self.process = context.Process(target=_run, args=([*arguments], str(log), dict(environment)))
        self.process.start()
        self.descendants: dict[int, psutil.Process] = {}

    def wait(self, limit_s: float) -> bool:
        """Returns whether the command ends within `limit_s` seconds from its start."""
        while (left := self.started + limit_s - time.monotonic()) > 0 and self.process.exitcode is None:
            with suppress(psutil.Error):
                found = psutil.Process(self.process.pid).children(recursive=True)
                self.descendants |= {child.pid: child for child in found}
            self.process.join(min(left, 0.25))
        return self.process.exitcode is not None

    def end(self, number: signal.Signals | None = None, limit_s: float = LIMIT_S) -> Ended:
        """Send a signal to the command's process group, if it still runs; returns how it ended.

        Args:
            number: SIGKILL or SIGTERM; None waits for it, and kills it only after `limit_s` seconds.
            limit_s: from the command's start.
        """
        if number is None:
            number = None if self.wait(limit_s) else signal.SIGKILL
        if number is not None and self.process.exitcode is None:
            _signal_group(self.process.pid, number)
            self.process.join(GRACE_S)
            if self.process.exitcode is None:
                _signal_group(self.process.pid, signal.SIGKILL)
                self.process.join()
        seconds = time.monotonic() - self.started
        _, alive = psutil.wait_procs(self.descendants.values(), timeout=5)
        survivors = tuple(_name(process) for process in alive)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        output = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        return Ended(self.process.exitcode or 0, seconds, output, survivors)


def run(arguments: Iterable[str], log: Path, environment: Mapping[str, str], limit_s: float = LIMIT_S) -> Ended:
    """Run a command of `sdcompress` to its end. The arguments are those of `Command`."""
    return Command(arguments, log, environment).end(limit_s=limit_s)


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """Run `python -m sdcompress` in the forked process."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    sys.argv = ["sdcompress", *arguments]
    runpy.run_module("sdcompress", run_name="__main__", alter_sys=True)


def _signal_group(pid: int | None, number: signal.Signals) -> None:
    if pid is None:
        return
    with suppress(OSError):  # it has ended
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # it has no group yet
            os.kill(pid, number)


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())[:200]
    return f"pid {process.pid}"


def list_files(folder: Path, without: tuple[str, ...] = ()) -> set[str]:
    """Returns everything in a folder, hidden files included, by relative path.

    Args:
        folder: to list.
        without: beginnings of the paths that are left out.
    """
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in names if not name.startswith(without)}


def is_hidden(name: str) -> bool:
    """Returns whether a part of a relative path begins with a dot."""
    return any(part.startswith(".") for part in Path(name).parts)


def fingerprint(folder: Path, patterns: Iterable[str], volatile: Iterable[str]) -> dict[str, str]:
    """Returns file → hash of its content.

    Of JSON files, values that name a time or depend on one do not count, at any depth.

    Args:
        folder: whose files are read.
        patterns: of the files, as for `Path.glob`.
        volatile: JSON keys that do not count.
    """
    left_out = frozenset(volatile)
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): _hash(path, left_out) for path in sorted(files)}


def _hash(path: Path, volatile: frozenset[str]) -> str:
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        with suppress(ValueError):  # a host's file
            content = json.dumps([_without(json.loads(line), volatile) for line in lines], sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _without(value: Any, keys: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(entry, keys) for key, entry in value.items() if key not in keys}
    return [_without(entry, keys) for entry in value] if isinstance(value, list) else value
