"""Exports of a run side by side, each process doing one at a time: tracing is Python, and keeps only one core busy."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sdcompress_engines.errors as engines_errors
from sdcompress_engines.child_process import ChildProcess, explain_exit
from sdcompress_engines.errors import ExportError
from sdcompress_engines.leftovers import remove_leftovers
from sdcompress_engines.resources import available_memory_bytes
from sdcompress_engines.thread_waiting import COUNT

_MODULE = "sdcompress_bench.export_worker"
_ROOTS = tuple(Path(file).parents[1] for file in (__file__, engines_errors.__file__))
_IMPORTS_BYTES, _COPIES = 2**31, 6
"""What an export takes of memory: for torch itself, and how many times the weights in fp32."""


@dataclass(frozen=True)
class ExportJob:
    """One export to ONNX.

    Attributes:
        model: a name or a path.
        precision: of the graphs.
        folder: to write; an older one is replaced.
        source: name → sha256 of what the model came from, for the manifest.
    """

    model: str
    precision: Literal["fp32", "fp16"]
    folder: Path
    source: Mapping[str, str]


def count_workers(jobs: int, parameters: int) -> int:
    """Returns how many exports this machine can do side by side: one a core, as far as its memory allows.

    Args:
        jobs: number of exports.
        parameters: of the largest model.
    """
    memory = available_memory_bytes() or 0
    fitting = memory // (_IMPORTS_BYTES + _COPIES * 4 * parameters)
    return max(1, min(jobs, os.cpu_count() or 1, fitting))


def run_exports(
    jobs: Sequence[ExportJob], workers: int, reuse: Mapping[str, Path], on_done: Callable[[ExportJob], None]
) -> None:
    """Do exports, as many at a time as there are workers.

    An export takes over equal components from the first one that is finished in its precision.

    Args:
        jobs: the exports, in the order in which they start.
        workers: number of processes.
        reuse: precision → an export that is there already.
        on_done: called after each export, from a thread of its worker.

    Raises:
        SdCompressError: what the first export that failed has raised; the others are ended and leave nothing.
        ExportError: a process died.
    """
    waiting, finished = deque(jobs), dict(reuse)

    def work(child: ChildProcess) -> None:
        events = child.events()
        while True:
            try:
                job = waiting.popleft()
            except IndexError:
                return
            known = finished.get(job.precision)
            child.send(
                {
                    "model": job.model,
                    "precision": job.precision,
                    "folder": str(job.folder),
                    "source": dict(job.source),
                    "reuse": None if known is None else str(known),
                }
            )
            answer = next(events, None)
            if answer is None:
                reason = explain_exit(child.wait(), child.output())
                raise ExportError(f"the export ended early: {reason}", where=job.folder)
            if "error" in answer:
                kind = getattr(engines_errors, answer["error"])
                raise kind(**answer["reason"])
            finished.setdefault(job.precision, job.folder)
            on_done(job)

    # One process alone keeps the number of threads that this one has, which is smaller on a busy machine.
    threads = {COUNT: str(max(1, (os.cpu_count() or 1) // workers))} if workers > 1 else {}
    # The processes end first, also on an error or Ctrl-C; then their threads have nothing to wait for.
    with ThreadPoolExecutor(workers) as pool, ExitStack() as stack:
        stack.callback(_remove_partial, jobs)
        children = [
            stack.enter_context(ChildProcess(_MODULE, paths=_ROOTS, environment=threads)) for _ in range(workers)
        ]
        for future in as_completed([pool.submit(work, child) for child in children]):
            future.result()


def _remove_partial(jobs: Sequence[ExportJob]) -> None:
    """Remove what exports that were ended have left."""
    for job in jobs:
        remove_leftovers(job.folder.absolute())
