"""Stages of a run: each leaves one artifact, and is skipped where the artifact is complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcompress_engines.manifest import faults, read_manifest
from sdcompress_engines.progress import Reporter


@dataclass(frozen=True)
class Stage:
    """One step of a run and its artifact.

    Attributes:
        label: for messages.
        folder: the artifact.
        kind: the kind in the artifact's manifest.
        inputs: name → sha256 of what the artifact is made from.
        config: settings that the artifact must have been made with, as far as its version records them.
    """

    label: str
    folder: Path
    kind: str
    inputs: Mapping[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)

    def is_done(self) -> bool:
        """Returns whether the artifact is complete and was made from these inputs with these settings."""
        if not self.folder.is_dir() or faults(self.folder, self.kind):
            return False
        manifest = read_manifest(self.folder)
        return (
            manifest is not None
            and self.inputs.items() <= manifest.inputs.items()
            and all(manifest.config.get(name, value) == value for name, value in self.config.items())
        )


@dataclass
class StageRunner:
    """Runs the stages in turn and reports which of how many it is at.

    Attributes:
        report: shows progress.
        total: number of stages.
        started: how many have begun.
        seconds: kind of artifact → seconds that its stages took; without stages that were done before.
    """

    report: Reporter
    total: int
    started: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, stage: Stage, make: Callable[[], Any]) -> None:
        """Call `make`, unless the stage is done.

        Args:
            stage: the stage.
            make: writes the stage's artifact.
        """
        head = self._begin(stage)
        if head is None:
            return
        self.report.show_line(head)
        with self._timed(stage.kind) as seconds:
            make()
        self.report.show_line(f"{head}: {seconds():.0f} s")

    def run_together(
        self, label: str, stages: Sequence[Stage], make: Callable[[set[Path], Callable[[Path], None]], Any]
    ) -> None:
        """Call `make` once for all of the stages that are not done. Their wall clock is counted once.

        Args:
            label: of all of them.
            stages: all of one kind.
            make: writes artifacts into the folders that it gets, and calls its second argument with each finished one.
        """
        heads = {stage.folder: head for stage in stages if (head := self._begin(stage)) is not None}
        if not heads:
            return
        with self._timed(stages[0].kind) as seconds, self.report.task(label, total=len(heads)) as advance:

            def finish(folder: Path) -> None:
                advance()
                self.report.show_line(f"{heads[folder]}: finished after {seconds():.0f} s")

            make(set(heads), finish)

    def _begin(self, stage: Stage) -> str | None:
        """Returns the line that announces a stage; None for one that is done, which is reported."""
        self.started += 1
        head = f"[{self.started}/{self.total}] {stage.label}"
        if not stage.is_done():
            return head
        self.report.show_line(f"{head}: there already, {stage.folder}")
        return None

    @contextmanager
    def _timed(self, kind: str) -> Iterator[Callable[[], float]]:
        """Add the time of the block to that of a kind of artifact. Yields a function: the seconds until now."""
        started = time.monotonic()
        yield lambda: time.monotonic() - started
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.monotonic() - started
