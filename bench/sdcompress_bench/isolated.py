"""A function called in a process of its own, started afresh, so that nothing outlives the call and a crash costs only
its own figure.

The processes are forked from a server that has imported what they need and computed nothing (`multiprocessing`'s fork
server): no thread pool, no arena and no CUDA context is older than the call, and six seconds of imports are paid once.
Where a platform cannot fork, as Windows, each is spawned.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
from sdcompress_engines.errors import SdCompressError

_PRELOADED = ["sdcompress_bench._preload"]
_NOTICES = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")


def call(
    function: Callable[[Any], dict[str, Any]], argument: Mapping[str, Any], timeout_s: float, *, fork: bool = True
) -> dict[str, Any]:
    """What `function(argument)` returns, through JSON; `{"failed": reason}` where it raised, was killed, or ran over
    `timeout_s`.

    Args:
        function: importable by name. argument: plain values.
        fork: from the server; False spawns the process, which pays for its imports and inherits nothing.
    """
    # Windows removes no file that a process which is just ending still has open; the rest is left to the system then.
    with tempfile.TemporaryDirectory(prefix="sdcompress-bench-", ignore_cleanup_errors=True) as folder:
        context = _context(fork)
        process = context.Process(target=_run, args=(function, dict(argument), folder))  # type: ignore[attr-defined]
        started = time.time()
        process.start()
        try:
            process.join(timeout_s)
            late = process.exitcode is None
        finally:  # also when the caller is interrupted: no child outlives its caller
            _end(process, started)
        answer = Path(folder) / "answer.json"
        if answer.is_file():
            return dict(json.loads(answer.read_text(encoding="utf-8")))
        if late:
            return {"failed": f"took over {timeout_s:g} s"}
        return {"failed": _cause(process.exitcode, Path(folder) / "stderr")}


def _context(fork: bool) -> BaseContext:
    if not fork or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # diffusers asks at its import whether CUDA is there. torch answers by starting CUDA, which no forked process could
    # use then, unless it is told to ask the driver's management library.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in _NOTICES:  # of optional packages, read when the server imports
        os.environ.setdefault(name, "error")
    return context


def _run(function: Callable[[Any], dict[str, Any]], argument: dict[str, Any], folder: str) -> None:
    """The child: its own process group, first to go when memory runs out, its words in a file."""
    if hasattr(os, "setsid"):
        with suppress(OSError):
            os.setsid()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    said = os.open(Path(folder) / "stderr", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        outcome = function(argument)
    except (SdCompressError, RuntimeError, ValueError, OSError, ImportError, MemoryError) as error:
        name = "" if isinstance(error, SdCompressError) else f"{type(error).__name__}: "
        outcome = {"failed": f"{name}{' '.join(str(error).split())[:400]}".replace(str(Path.home()), "~")}
    partial = Path(folder) / "answer.partial"
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    os.replace(partial, Path(folder) / "answer.json")


def _end(process: Any, started: float) -> None:
    """The child and whatever it started (compilers) are gone when this returns.

    Args:
        started: when the child did, or shortly before, seconds since the epoch.
    """
    grouped = hasattr(os, "killpg")
    descendants = [] if grouped else _descendants(process.pid, started)
    if grouped:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # no such group where it has not made its own yet
    if process.exitcode is None:
        process.kill()
    for each in descendants:
        with suppress(psutil.Error):
            each.kill()
    process.join(10)
    psutil.wait_procs(descendants, timeout=10)


def _descendants(pid: int, started: float) -> list[psutil.Process]:
    """What a process has started, where there are no process groups.

    Windows names the parent of a process even when that one is gone.
    """
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone
            if process.create_time() >= started - 1:  # an older process with this parent's id is another one's child
                children.setdefault(process.ppid(), []).append(process)
    waiting, found = [pid], list[psutil.Process]()
    while waiting:
        direct = children.pop(waiting.pop(), [])
        found += direct
        waiting += [process.pid for process in direct]
    return found


def _cause(status: int | None, said: Path) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f"its process was ended by {name}" + ("; out of memory is the usual cause" if name == "SIGKILL" else "")
    lines = said.read_text(errors="replace", encoding="utf-8").splitlines() if said.is_file() else []
    tail = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
    return f"its process ended with status {status}: {tail[:400]}".replace(str(Path.home()), "~")
