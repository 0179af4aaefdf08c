"""One backend, one UNet, a process of its own: the case that goes in, the outcome that comes out, and its end.

The process is `sdcompress.backends.worker`. It prepares and runs the backend, then waits for a word before it times the
step: so several can prepare side by side, and each is timed alone.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.child_process import ChildProcess, explain_exit

from sdcompress.export.components import Precision

WHOLE, SMALL = "whole", "small"
"""The model's own UNet; and `worker.small_unet` of it, which compiles in a fraction of the time."""
REFERENCE = "reference"
"""Name of the answers of torch in IEEE fp32."""


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
        self._child: ChildProcess | None = None
        self._outcome: dict[str, Any] | None = None

    def prepare(self) -> None:
        """Start the process and wait until the backend has run once, or has failed. Without effect the second time."""
        if self._child is not None or self._outcome is not None:
            return
        if time.monotonic() >= self.deadline:
            self._outcome = {"unfinished": "the time was over before it began"}
            return
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._child = ChildProcess("sdcompress.backends.worker", environment=threads)
        self._exchange(self._child, asdict(self.case))

    def finish(self) -> dict[str, Any]:
        """Time the step and end the process; returns the outcome.

        One of `ms` (subject → median of a step), `built_s`, `not_here`, `failed` (with `command`) and `unfinished`.
        """
        try:
            self.prepare()
            if self._outcome is None and self._child is not None:
                self._exchange(self._child, {"go": True})
        finally:
            self.close()
        return self._outcome or {"failed": "its process said nothing"}

    def close(self) -> None:
        """End the process and all that it has started. Safe to call at any time."""
        if self._child is not None:
            self._child.close()
        self._child = None

    def _exchange(self, child: ChildProcess, message: dict[str, Any]) -> None:
        """Send a message and read the answer to it; an answer other than `prepared` is the outcome."""
        started = time.monotonic()
        try:
            with child.time_limit(self.deadline - started):
                child.send(message)
                answer = next(child.events(), None)
        finally:
            self.seconds += time.monotonic() - started
        if answer is None:
            answer = self._cause(child)
        if "prepared" not in answer:
            self._outcome = answer

    def _cause(self, child: ChildProcess) -> dict[str, Any]:
        """Returns why there is no answer."""
        if child.timed_out:
            return {"unfinished": f"the time was over after it had run for {self.seconds:.0f} s"}
        status = child.wait()
        return {"failed": explain_exit(status, child.output())}
