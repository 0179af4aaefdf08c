"""What `sdcompress doctor` finds, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sdcompress.backends.anonymous import anonymize
from sdcompress.backends.installation import Check

Status = Literal["works", "builds", "fails", "unfinished", "not here"]
"""`builds`: an engine that no card in this machine runs. `unfinished`: there was no time left. `not here`: the backend
is not for this machine.
"""


@dataclass(frozen=True)
class BackendResult:
    """The result of proving one backend.

    Attributes:
        backend: its name, or the name of one of its libraries.
        device: `cpu` or `cuda`. precision: of the UNet.
        subject: `whole`, the model's UNet, or `small`, one with the same operators and few of them.
        status: see `Status`.
        unet_step_ms: median time of one UNet call, for one picture with guidance.
        speedup: over torch on the same UNet and device, in the same run; None where torch did not run there.
        relative_l2: of its output, against torch in IEEE fp32.
        limit: the largest `relative_l2` that is accepted.
        built_s, built_mib: time and size of an engine that was built ahead.
        cards: the compute capabilities that such an engine can be built for.
        reason: why it does not work, or is not for this machine.
        command: the command that repairs it.
        seconds: that the proof took.
    """

    backend: str
    device: str
    precision: str
    subject: str
    status: Status
    unet_step_ms: float | None = None
    speedup: float | None = None
    relative_l2: float | None = None
    limit: float | None = None
    built_s: float | None = None
    built_mib: float | None = None
    cards: str | None = None
    reason: str | None = None
    command: str | None = None
    seconds: float = 0.0

    @property
    def healthy(self) -> bool:
        """Whether nothing has to be repaired."""
        return self.status in ("works", "builds", "not here")

    def anonymized(self) -> BackendResult:
        """Returns the result without what names a person, a machine or a path."""
        return replace(self, reason=self.reason and anonymize(self.reason), command=anonymize_command(self.command))


@dataclass(frozen=True)
class Diagnosis:
    """The state of an installation. Nothing in it names a person, a machine or a path.

    Attributes:
        model: name of a built-in model, or of the model's file or folder.
        parameters: of the model's UNet; None where torch did not answer.
        machine: facts by name: system, python, processor, threads, cores, load (of the minute before), memory_gib,
            cards, driver.
        packages: name → installed version.
        checks: of the installation.
        backends: the result of each.
        seconds: that everything took.
    """

    model: str
    parameters: int | None
    machine: dict[str, Any]
    packages: dict[str, str]
    checks: list[Check]
    backends: list[BackendResult]
    seconds: float = 0.0

    @property
    def healthy(self) -> bool:
        """Whether every check passes and every backend that this machine can have works."""
        return all(check.ok for check in self.checks) and all(result.healthy for result in self.backends)

    def to_json(self) -> dict[str, Any]:
        """Returns the diagnosis as plain values; all numbers are finite."""
        return {"healthy": self.healthy} | asdict(self)


def anonymize_command(command: str | None) -> str | None:
    """Returns a command without paths that name a person or a machine."""
    return command and anonymize(command, names=False)


def anonymize_check(check: Check) -> Check:
    """Returns a check without what names a person, a machine or a path."""
    return replace(check, text=anonymize(check.text), command=anonymize_command(check.command))
