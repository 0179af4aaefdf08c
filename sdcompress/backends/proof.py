"""One backend, one UNet, a process of its own: the case that goes in, the outcome that comes out, and its end.

The process is `sdcompress.backends.worker`. It prepares and runs the backend, then waits for a word before it times the
step: so several can prepare side by side, and each is timed alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from sdcompress.backends.installation import how_it_ended
from sdcompress.export.components import Precision

WHOLE, SMALL = "whole", "small"
"""The model's own UNet; and `worker.small_unet` of it, which compiles in a fraction of the time."""
REFERENCE = "reference"
"""Name of the answers of torch in IEEE fp32."""
EVENT = "sdcompress-proof:"
"""Marks the worker's lines among whatever native code prints."""


@dataclass(frozen=True)
class Case:
    """One backend to prove.

    Attributes:
        model: what `load_pipeline` takes.
        backend: `torch`, `compile`, `aot`, `onnxruntime`, `tensorrt` or `tensorrt-rtx`.
        device: `cpu` or `cuda`.
        subjects: the UNets to run, `WHOLE` or `SMALL`; more than one for `torch` only.
        folder: where the answers go.
        hidden: modules that are kept from the process, because they would break others than the backend itself.
    """

    model: str
    backend: str
    device: str
    precision: Precision
    subjects: tuple[str, ...]
    folder: str
    hidden: tuple[str, ...] = ()

    def answer(self, subject: str) -> Path:
        """The file with the answer of this case."""
        return answer_file(self.folder, f"{self.backend}-{self.device}-{self.precision}", subject)


def answer_file(folder: str, name: str, subject: str) -> Path:
    """The file with an answer: a UNet's output as a float32 tensor on the CPU, (2, 4, H/8, W/8)."""
    return Path(folder) / f"{name}-{subject}.pt"


class Proof:
    """A case in its process. What the process starts (compilers, builders) ends with it.

    Args:
        deadline: on the clock of `time.monotonic`; the process is ended then.
    """

    def __init__(self, case: Case, deadline: float) -> None:
        self.case, self.deadline = case, deadline
        self.seconds = 0.0
        self._process: subprocess.Popen[str] | None = None
        self._said: Any = None
        self._outcome: dict[str, Any] | None = None
        self._late = False

    def prepare(self) -> None:
        """Start the process and wait until the backend has run once, or has failed. Without effect the second time."""
        if self._process is not None or self._outcome is not None:
            return
        if time.monotonic() >= self.deadline:
            self._outcome = {"unfinished": "the time was over before it began"}
            return
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sdcompress.backends.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            errors="replace",
            env=environment,
        )
        self._exchange(json.dumps(asdict(self.case)))

    def finish(self) -> dict[str, Any]:
        """Time the step and end the process; returns the outcome.

        One of `ms` (subject → median of a step), `built_s`, `not_here`, `failed` (with `command`) and `unfinished`.
        """
        try:
            self.prepare()
            if self._outcome is None:
                self._exchange("go")
        finally:
            self.close()
        return self._outcome or {"failed": "its process said nothing"}

    def close(self) -> None:
        """End the process and all that it has started. Safe to call at any time."""
        if self._process is not None:
            _kill(self._process)
            for stream in (self._process.stdin, self._process.stdout):
                with suppress(OSError):  # what was not sent has nobody to read it
                    if stream is not None:
                        stream.close()
        if self._said is not None:
            self._said.close()
        self._process = self._said = None

    def _exchange(self, line: str) -> None:
        """Send a line and read the answer to it; an answer other than `prepared` is the outcome."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        started = time.monotonic()
        timer = threading.Timer(max(0.0, self.deadline - started), self._stop, (process,))
        timer.start()
        try:
            with suppress(OSError):  # it may have died; its end is the outcome
                process.stdin.write(line + "\n")
                process.stdin.flush()
            said = next((each for each in process.stdout if each.startswith(EVENT)), None)
        finally:
            timer.cancel()
            self.seconds += time.monotonic() - started
        answer = json.loads(said.removeprefix(EVENT)) if said else self._cause(process)
        if "prepared" not in answer:
            self._outcome = answer

    def _stop(self, process: subprocess.Popen[str]) -> None:
        self._late = True
        _kill(process)

    def _cause(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Why there is no answer."""
        if self._late:
            return {"unfinished": f"the time was over after it had run for {self.seconds:.0f} s"}
        status = process.wait()
        self._said.seek(0)
        return {"failed": how_it_ended(status, self._said.read())}


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and its descendants."""
    tree: list[psutil.Process] = []
    with suppress(psutil.Error):
        tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for each in tree:
        with suppress(psutil.Error):
            each.kill()
    process.wait()
