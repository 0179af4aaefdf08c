"""Calls a function in a new process, so that nothing outlives the call and a crash costs only its own figure.

The processes are forked from `multiprocessing`'s fork server, which has imported what they need and has computed
nothing. So no thread pool, arena or CUDA context is older than the call, and six seconds of imports are paid once.
Where a platform cannot fork, such as Windows, each process is spawned.
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
from sdcompress_engines.child_process import leave_out_working_folder
from sdcompress_engines.errors import SdCompressError
from sdcompress_engines.files import write_atomically
from sdcompress_engines.paths import hide_home

_PRELOADED = ["sdcompress_bench.preload"]
_NOTICES = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")


def call(
    function: Callable[[Any], dict[str, Any]], argument: Mapping[str, Any], timeout_s: float, *, fork: bool = True
) -> dict[str, Any]:
    """Returns the result of `function(argument)`, or `{"failed": reason}` if it raised, died or took too long.

    Args:
        function: importable by name; returns plain values.
        argument: plain values.
        timeout_s: seconds after which the process is killed.
        fork: start it from the fork server. False spawns it: it pays for its imports and inherits nothing.
    """
    # Windows cannot remove a file that a process which is just ending still has open; the system removes it later.
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
    leave_out_working_folder(os.environ)  # `multiprocessing` starts its processes with `python -c`
    if not fork or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # diffusers asks at import whether there is CUDA, and torch starts CUDA to answer. Then no forked process could use
    # it. With this variable torch asks the driver's management library instead.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in _NOTICES:  # the server reads them at import
        os.environ.setdefault(name, "error")
    return context


def _run(function: Callable[[Any], dict[str, Any]], argument: dict[str, Any], folder: str) -> None:
    """Run the function in the child process.

    The child has its own process group and writes its output to a file. When memory runs out, it is killed first.
    """
    if hasattr(os, "setsid"):
        with suppress(OSError):
            os.setsid()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    try:
        output = os.open(Path(folder) / "stderr", os.O_WRONLY | os.O_CREAT, 0o600)
    except FileNotFoundError:  # the caller was stopped before this process began
        return
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        outcome = function(argument)
    except (SdCompressError, RuntimeError, ValueError, OSError, ImportError, MemoryError) as error:
        name = "" if isinstance(error, SdCompressError) else f"{type(error).__name__}: "
        outcome = {"failed": hide_home(f"{name}{' '.join(str(error).split())[:400]}")}
    write_atomically(Path(folder) / "answer.json", json.dumps(outcome))


def _end(process: Any, started: float) -> None:
    """End the child and everything it started, such as compilers.

    Args:
        process: the child.
        started: when it started, or shortly before, seconds since the epoch.
    """
    grouped = hasattr(os, "killpg")
    descendants = [] if grouped else _descendants(process.pid, started)
    if grouped:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # there is no such group if the child has not created it yet
    if process.exitcode is None:
        process.kill()
    for each in descendants:
        with suppress(psutil.Error):
            each.kill()
    process.join(10)
    psutil.wait_procs(descendants, timeout=10)


def _descendants(pid: int, started: float) -> list[psutil.Process]:
    """Returns the descendants of a process, for platforms without process groups.

    Windows still knows the parent of a process after that parent has ended.
    """
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended
            if process.create_time() >= started - 1:  # older ones belong to a former process with this id
                children.setdefault(process.ppid(), []).append(process)
    waiting, found = [pid], list[psutil.Process]()
    while waiting:
        direct = children.pop(waiting.pop(), [])
        found += direct
        waiting += [process.pid for process in direct]
    return found


def _cause(status: int | None, output: Path) -> str:
    """Returns why a child ended without an answer: its signal, or its last line of output."""
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f"its process was ended by {name}" + ("; out of memory is the usual cause" if name == "SIGKILL" else "")
    lines = output.read_text(errors="replace", encoding="utf-8").splitlines() if output.is_file() else []
    tail = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
    return hide_home(f"its process ended with status {status}: {tail[:400]}")
