"""Runs the parts one after the other within some minutes, each in its own process that is killed at its cap."""

from __future__ import annotations

import functools
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import BackendMissing, UsageError

from .. import isolated
from .child import Row, describe, run_part
from .results import ResultFile, format_row, headline

RESERVE_S = 4.0
"""Reserved for ending the last process and writing the file."""
LEAST_S = 10.0
"""A part does not begin with less time than this."""
POLL_S, WRITE_S = 0.2, 5.0
RESTARTS = 2
"""How often a part whose process died continues in a new one, after the row that killed it."""
CARD_S = 90.0


@dataclass(frozen=True)
class Part:
    """A part of the program.

    Attributes:
        number: as in `--parts` and in the rows.
        title: for people.
        function: `module:name`, called with a `PartRun` in the part's own process.
        cap_s: seconds after which that process is killed.
        kept_s: seconds that earlier parts must leave for it.
        on_request: it only runs where it is chosen.
    """

    number: int
    title: str
    function: str
    cap_s: float
    kept_s: float = 0.0
    on_request: bool = False


_HERE = __package__
PARTS = (
    Part(0, "environment", f"{_HERE}.part_basics:environment", 30),
    Part(1, "peaks", f"{_HERE}.part_basics:peaks", 30),
    Part(2, "execution and shared memory over the stand-in engine", f"{_HERE}.part_execution:execution", 30),
    Part(3, "UNet step", f"{_HERE}.part_unet:unet_step", 120),
    Part(4, "UNet step, compiled", f"{_HERE}.part_unet:compiled_step", 190),
    Part(5, "a whole picture", f"{_HERE}.part_picture:picture", 110, 50),
    Part(6, "training", f"{_HERE}.part_training:training", 150, 60),
    Part(7, "pytest -m gpu", f"{_HERE}.part_tests:tests", 90, 40),
    Part(8, "what takes longer", f"{_HERE}.part_longer:longer", 600),
    Part(9, "nano", f"{_HERE}.part_nano:nano", 600, on_request=True),
)


def cap_seconds(part: Part, later: Sequence[Part], left_s: float) -> float:
    """Returns how many seconds a part may take.

    Args:
        part: the part.
        later: parts that come after it, whose `kept_s` is not available.
        left_s: seconds that are left for all of them.
    """
    return min(part.cap_s, left_s - sum(each.kept_s for each in later))


class Program:
    """One run of the program.

    Args:
        folder: of the results; parts that ended in an earlier run are not repeated.
        device: `cuda` or `cpu`.
        smoke: small models, a few samples each.
        minutes: after which everything has ended.
        parts: what can be run.
        show: prints a line.

    Raises:
        UsageError: the folder has results of other settings.
        ArtifactError, StorageError: as in `ResultFile`.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        smoke: bool,
        minutes: float,
        *,
        parts: Sequence[Part] = PARTS,
        show: Callable[[str], None] = functools.partial(print, flush=True),  # noqa: B008 (it has no state)
    ) -> None:
        self._began = time.monotonic()
        self._end = self._began + 60 * minutes
        self._device, self._smoke, self._show = device, smoke, show
        self._table = {part.number: part for part in parts}
        self.results = ResultFile(folder.resolve(), {"device": device, "smoke": smoke})
        self.results.minutes = minutes
        self._before_s = self.results.seconds
        self._facts: dict[str, Any] = {}
        self._scratch = ""
        self._fork = True

    def run(self, chosen: Collection[int] | None = None, again: bool = False) -> bool:
        """Run the chosen parts (by default all) in order; returns whether each has ended.

        Args:
            chosen: numbers of the parts; None is all but those that run on request.
            again: run also the parts that ended in an earlier run.

        Raises:
            UsageError: there is no such part, or the folder has results of another card.
            BackendMissing: the device does not answer.
        """
        usual = (number for number, part in self._table.items() if not part.on_request)
        numbers = sorted(usual if chosen is None else chosen)
        if unknown := [number for number in numbers if number not in self._table]:
            raise UsageError(f"no part {unknown[0]}", expected=f"{min(self._table)} to {max(self._table)}")
        list(self.results.read_new())
        todo = [n for n in numbers if again or self.results.parts.get(n, {}).get("state") != "ended"]
        if done := [str(number) for number in numbers if number not in todo]:
            self._show(f"parts {', '.join(done)} have ended before; --again repeats them")
        with tempfile.TemporaryDirectory(prefix="sdcompress-gpu-", ignore_cleanup_errors=True) as scratch:
            self._scratch = scratch
            if todo:
                self._find_card(replaced=again and set(self.results.parts) <= set(numbers))
            if again:
                self.results.drop(numbers)
            self._write()
            for index, number in enumerate(todo):
                self._run(self._table[number], [self._table[later] for later in todo[index + 1 :]])
                self._write()
        return all(self.results.parts[number]["state"] == "ended" for number in numbers)

    def summary(self) -> dict[str, Any]:
        """Returns the content of a run's last line: the card, numbers of rows, the parts' states, and the headline."""
        rows = self.results.rows
        return {
            "results": self.results.path.name,
            "card": self.results.card and self.results.card["name"],
            "seconds": round(time.monotonic() - self._began, 1),
            "rows": len(rows),
            "failed": sum("failed" in row for row in rows),
            "skipped": sum("skipped" in row for row in rows),
            "parts": {number: part["state"] for number, part in sorted(self.results.parts.items())},
            **headline(rows),
        }

    def _seconds_left(self) -> float:
        return self._end - time.monotonic() - RESERVE_S

    def _find_card(self, replaced: bool) -> None:
        """Describe the machine in a forked process; if CUDA does not work in one, all parts are spawned.

        Args:
            replaced: the folder's rows are all replaced, so they may be of another card.
        """
        argument, limit_s = {"device": self._device}, min(CARD_S, max(1.0, self._seconds_left()))
        began = time.monotonic()
        found = isolated.call(describe, argument, limit_s)
        self._facts["forked"] = {"seconds": round(time.monotonic() - began, 1)}
        if "failed" in found:
            self._facts["forked"]["failed"] = found["failed"]
            self._fork = False
            found = isolated.call(describe, argument, limit_s, fork=False)
        if "failed" in found:
            raise BackendMissing(
                f"the device {self._device} does not answer ({found['failed']})",
                hint="--device cpu --smoke tries the program without a GPU",
            )
        environment = found["environment"]
        card = environment["gpu"][0] if self._device == "cuda" else None
        before = self.results.card
        if card and before and card["name"] != before["name"] and not replaced:
            raise UsageError(
                f"has results of another card ({before['name']})",
                where=self.results.path,
                expected=card["name"],
                hint="another -o, or --again with all parts",
            )
        self.results.card, self.results.environment = card, environment
        name = f"{card['name']}, driver {card['driver']}, CUDA {card['cuda']}" if card else environment["cpu"]
        packages = environment["packages"]
        versions = ", ".join(f"{package} {packages.get(package)}" for package in ("torch", "diffusers", "transformers"))
        self._show(f"{name}; Python {environment['python']}, {versions}; commit {environment['commit']}")

    def _run(self, part: Part, later: Sequence[Part]) -> None:
        cap_s = cap_seconds(part, later, self._seconds_left())
        entry = {"title": part.title, "state": "not begun", "seconds": 0.0, "cap_s": round(max(cap_s, 0), 1)}
        self.results.parts[part.number] = entry
        if cap_s < LEAST_S:
            entry["reason"] = f"{max(cap_s, 0):.0f} s were left of {self.results.minutes:g} minutes"
            self._show(f"== {part.number} {part.title}: not begun, {entry['reason']}")
            return
        self._show(f"== {part.number} {part.title}, at most {cap_s:.0f} s")
        began = time.monotonic()
        state, reason = self._attempts(part, began + cap_s)
        entry |= {"state": state, "seconds": round(time.monotonic() - began, 1)} | (
            {"reason": reason} if reason else {}
        )
        self._write()
        self._show(f"== {part.number} {state} after {entry['seconds']:.0f} s{f': {reason}' if reason else ''}")

    def _attempts(self, part: Part, end: float) -> tuple[str, str | None]:
        """Run a part and return its state and the reason; if its process dies, a new one continues after that row."""
        done = {row["row"] for row in self.results.of_part(part.number) if "failed" not in row}
        reason = None
        for _ in range(1 + RESTARTS):
            limit_s = end - time.monotonic()
            if limit_s < 1:
                break
            before = len(self.results.of_part(part.number))
            self.results.begun = None
            found = self._call(part, limit_s, done)
            reason = found.get("failed")
            if reason is None:
                return "ended", None
            at = self.results.begun
            if reason.startswith("took over"):
                return "cut", f"over its cap{f' in row {at!r}' if at else ''}"
            if at:
                self.results.add({"part": part.number, "row": at, "failed": reason})
                self._show_new()
            rows = self.results.of_part(part.number)
            done |= {row["row"] for row in rows}
            if len(rows) == before:  # it died outside of its rows
                break
        return "failed", reason

    def argument_of(self, part: Part, limit_s: float, done: Collection[str]) -> dict[str, Any]:
        """Returns the argument of the part's process: plain values.

        Args:
            part: the part.
            limit_s: seconds that it may take.
            done: rows of this part that are not measured again.
        """
        return {
            "part": part.number,
            "function": part.function,
            "device": self._device,
            "smoke": self._smoke,
            "folder": str(self.results.folder),
            "scratch": self._scratch,
            "deadline": time.time() + limit_s,
            "rows": self.results.rows,
            "done": sorted(done),
            "facts": self._facts,
        }

    def _call(self, part: Part, limit_s: float, done: Collection[str]) -> dict[str, Any]:
        """Returns the result of `isolated.call`; meanwhile it shows the rows as they are written."""
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        watcher.start()
        try:
            return isolated.call(run_part, self.argument_of(part, limit_s, done), limit_s, fork=self._fork)
        finally:
            ended.set()
            watcher.join()
            self.results.close_last_line()
            self._show_new()

    def _watch(self, ended: threading.Event) -> None:
        written = time.monotonic()
        while not ended.wait(POLL_S):
            if self._show_new() and time.monotonic() - written > WRITE_S:
                self._write()
                written = time.monotonic()

    def _show_new(self) -> list[Row]:
        rows = list(self.results.read_new())
        for row in rows:
            if not row.get("silent"):
                self._show(format_row(row))
        return rows

    def _write(self) -> None:
        self.results.seconds = self._before_s + time.monotonic() - self._began
        self.results.write()
