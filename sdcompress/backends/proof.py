"""The proof of one backend on one UNet, in a process of its own.

The process is `sdcompress.backends.worker`. It prepares and runs the backend, and waits for a message before it times
the step. So several backends can prepare side by side, and each is timed alone.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.child_process import ChildProcess, explain_exit

from sdcompress.export.components import Precision

REFERENCE = "reference"
"""Name of the outputs of torch in IEEE fp32."""


@dataclass(frozen=True)
class Case:
    """One backend to prove.

    Attributes:
        model: what `load_pipeline` takes.
        backend: a name of `proof_plan.provable`.
        device: `cpu` or `cuda`.
        precision: of the UNet.
        subjects: the UNets to run, of `sdcompress.backends.subjects`; more than one for `torch` only.
        folder: for the outputs.
        hidden: modules that the process must not import, because they are broken and the backend does not need them.
    """

    model: str
    backend: str
    device: str
    precision: Precision
    subjects: tuple[str, ...]
    folder: str
    hidden: tuple[str, ...] = ()

    def answer(self, subject: str) -> Path:
        """Returns the file with the output of this case for a UNet."""
        return answer_file(self.folder, f"{self.backend}-{self.device}-{self.precision}", subject)


def answer_file(folder: str, name: str, subject: str) -> Path:
    """Returns the file with the output of a UNet: a tensor (2, 4, H/8, W/8), float32, on the CPU.

    Args:
        folder: of the outputs.
        name: of the backend, device and precision.
        subject: the UNet.
    """
    return Path(folder) / f"{name}-{subject}.pt"


class Proof:
    """A case and its process. What the process starts (compilers, builders) ends with it.

    Args:
        case: to prove.
        deadline: when the process is ended, on the clock of `time.monotonic`.

    Attributes:
        seconds: that the process took to prepare and to time the step.
    """

    def __init__(self, case: Case, deadline: float) -> None:
        self.case, self.deadline = case, deadline
        self.seconds = 0.0
        self._child: ChildProcess | None = None
        self._outcome: dict[str, Any] | None = None

    def prepare(self) -> None:
        """Start the process and wait until the backend has run once or has failed; does nothing the second time."""
        if self._child is not None or self._outcome is not None:
            return
        if time.monotonic() >= self.deadline:
            self._outcome = {"unfinished": "no time was left to start it"}
            return
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._child = ChildProcess("sdcompress.backends.worker", environment=threads)
        self._exchange(self._child, asdict(self.case))

    def finish(self) -> dict[str, Any]:
        """Time the step and end the process. Returns the outcome.

        It has one of `ms` (subject → median time of a step), `built_s`, `not_here`, `failed` (with `command`) and
        `unfinished`.
        """
        try:
            self.prepare()
            if self._outcome is None and self._child is not None:
                self._exchange(self._child, {"go": True})
        finally:
            self.close()
        return self._outcome or {"failed": "its process sent nothing"}

    def close(self) -> None:
        """End the process and all that it has started. Safe to call at any time."""
        if self._child is not None:
            self._child.close()
        self._child = None

    def _exchange(self, child: ChildProcess, message: dict[str, Any]) -> None:
        """Send a message and read the answer. An answer other than `prepared` is the outcome."""
        started = time.monotonic()
        try:
            with child.time_limit(self.deadline - started):
                child.send(message)
                answer = next(child.events(), None)
        finally:
            self.seconds += time.monotonic() - started
        if answer is None:
            answer = self._explain_end(child)
        if "prepared" not in answer:
            self._outcome = answer

    def _explain_end(self, child: ChildProcess) -> dict[str, Any]:
        """Returns the outcome of a process that ended without an answer."""
        if child.timed_out:
            return {"unfinished": f"it was stopped after {self.seconds:.0f} s, because no time was left"}
        status = child.wait()
        return {"failed": explain_exit(status, child.output())}
