"""A function called in a process of its own, started afresh, so that nothing outlives the call and a crash costs only its own figure.

The processes are forked from a server that has imported what they need and computed nothing (`multiprocessing`'s fork server): no
thread pool, no arena and no CUDA context is older than the call, and six seconds of imports are paid once. Where a platform cannot
fork, each is spawned.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import SdCompressError

_PRELOADED = ["sdcompress_bench._preload"]
_NOTICES = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")


def call(function: Callable[[Any], dict[str, Any]], argument: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """What `function(argument)` returns, through JSON; `{"failed": reason}` where it raised, was killed, or ran over `timeout_s`.

    Args:
        function: importable by name. argument: plain values.
    """
    with tempfile.TemporaryDirectory(prefix="sdcompress-bench-") as folder:
        process = _context().Process(target=_run, args=(function, dict(argument), folder))  # type: ignore[attr-defined]
        process.start()
        try:
            process.join(timeout_s)
            late = process.exitcode is None
        finally:  # also when the caller is interrupted: no child outlives its caller
            _end(process)
        answer = Path(folder) / "answer.json"
        if answer.is_file():
            return dict(json.loads(answer.read_text()))
        if late:
            return {"failed": f"took over {timeout_s:g} s"}
        return {"failed": _cause(process.exitcode, Path(folder) / "stderr")}


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    for name in _NOTICES:  # of optional packages, read when the server imports
        os.environ.setdefault(name, "error")
    return context


def _run(function: Callable[[Any], dict[str, Any]], argument: dict[str, Any], folder: str) -> None:
    """The child: its own process group, first to go when memory runs out, its words in a file."""
    with suppress(OSError):
        os.setsid()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    said = os.open(Path(folder) / "stderr", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        outcome = function(argument)
    except (SdCompressError, RuntimeError, ValueError, OSError, ImportError, MemoryError) as error:
        name = "" if isinstance(error, SdCompressError) else f"{type(error).__name__}: "
        outcome = {"failed": f"{name}{' '.join(str(error).split())[:400]}".replace(str(Path.home()), "~")}
    partial = Path(folder) / "answer.partial"
    partial.write_text(json.dumps(outcome))
    os.replace(partial, Path(folder) / "answer.json")


def _end(process: Any) -> None:
    """The child and whatever it started (compilers) are gone when this returns."""
    with suppress(OSError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)  # no such group where it has not made its own yet
    if process.exitcode is None:
        process.kill()
    process.join(10)


def _cause(status: int | None, said: Path) -> str:
    if status is not None and status < 0:
        cause = "; out of memory is the usual cause" if -status == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-status).name}{cause}"
    lines = said.read_text(errors="replace").splitlines() if said.is_file() else []
    tail = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
    return f"its process ended with status {status}: {tail[:400]}".replace(str(Path.home()), "~")
