"""Builds gpu.json from rows.jsonl, formats rows for people, and extracts the headline figures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ArtifactError, UsageError, storage_errors
from sdcompress_engines.files import append_line, write_atomically

from .child import BEGUN, Row

SCHEMA = 1
UNET_PARTS = (3, 4, 8)
_FORMS: dict[str, tuple[str, float]] = {
    "matmul_tflops": ("{:,.1f} TFLOP/s", 1),
    "copy_gb_per_s": ("copy {:,.0f} GB/s", 1),
    "step_ms": ("{:,.2f} ms", 1),
    "host_ms": ("host {:,.2f}", 1),
    "picture_ms": ("{:,.0f} ms a picture", 1),
    "gap_ms_per_step": ("gap {:,.2f} ms a step", 1),
    "synchronizations_per_step": ("{:.1f} waits a step", 1),
    "samples_per_s": ("{:,.1f} samples/s", 1),
    "share_of_peak": ("{:.1f}% of peak", 100),
    "compile_s": ("compiled in {:,.0f} s", 1),
    "relative_l2": ("relative L2 {:.1e}", 1),
    "peak_mib": ("{:,.0f} MiB", 1),
    "step": ("{:,} steps", 1),
    "loss": ("loss {:.4f}", 1),
    "heldout_loss": ("held-out loss {:.4f}", 1),
    "psnr_heldout": ("held-out {:.1f} dB", 1),
    "heldout_style": ("held-out style {:.0f}%", 100),
    "heldout_top5": ("held-out top-5 {:.0f}%", 100),
    "passed": ("{} passed", 1),
    "not_passed": ("{} did not pass", 1),
    "value": ("{}", 1),
}
"""Figure → its form in a line, and its factor; other figures are only in gpu.json."""


def format_row(row: Row) -> str:
    """Returns a row as one line for people."""
    parts = [
        form.format(row[key] * factor if factor != 1 else row[key])
        for key, (form, factor) in _FORMS.items()
        if row.get(key) is not None
    ]
    parts += (
        [f"FAILED {row['failed']}"] if "failed" in row else [f"skipped: {row['skipped']}"] if "skipped" in row else []
    )
    return f"{row['part']} {row['row']}: {', '.join(parts) or 'done'}"


class ResultFile:
    """gpu.json of a folder, with the results of an earlier run there.

    Args:
        folder: of the results.
        settings: `device` and `smoke`.

    Raises:
        UsageError: the folder has results of other settings.
        ArtifactError: its gpu.json is damaged.
        StorageError: it cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.path, self.rows_path = folder, folder / "gpu.json", folder / "rows.jsonl"
        self.settings = dict(settings)
        self.card: Mapping[str, Any] | None = None
        self.environment: Mapping[str, Any] = {}
        self.parts: dict[int, dict[str, Any]] = {}
        self.minutes = self.seconds = 0.0
        self.begun: str | None = None
        self._rows: dict[tuple[int, str], Row] = {}
        self._offset = 0
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                self._continue()
            self.rows_path.touch()
            self.close_last_line()

    def _continue(self) -> None:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            parts = {int(number): part for number, part in known["parts"].items()}
            settings, seconds, card, environment = (
                known[key] for key in ("settings", "seconds", "card", "environment")
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise ArtifactError(f"is damaged ({error})", where=self.path, hint="another -o") from error
        if settings != self.settings:
            raise UsageError(
                f"has results of {settings}", where=self.path, expected=str(self.settings), hint="another -o"
            )
        self.parts, self.seconds, self.card, self.environment = parts, seconds, card, environment

    def close_last_line(self) -> None:
        """End a line that a killed process left unfinished, so that the next row does not continue it."""
        content = self.rows_path.read_bytes()
        if content and not content.endswith(b"\n"):
            append_line(self.rows_path, "")

    @property
    def rows(self) -> list[Row]:
        """The rows, each once, in the order in which they were first written."""
        return list(self._rows.values())

    def of_part(self, part: int) -> list[Row]:
        return [row for row in self.rows if row["part"] == part]

    def read_new(self) -> Iterator[Row]:
        """Yields the rows that were written since the last call; a row written again replaces the one before."""
        with self.rows_path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                try:
                    row = json.loads(line)
                except ValueError:  # cut by a kill
                    continue
                if BEGUN in row:
                    self.begun = row[BEGUN]
                    continue
                self.begun = None if row["row"] == self.begun else self.begun
                self._rows[row["part"], row["row"]] = row
                yield row

    def add(self, row: Row) -> None:
        """Write a row from the program itself."""
        append_line(self.rows_path, json.dumps(row))

    def drop(self, parts: Sequence[int]) -> None:
        """Remove parts and their rows."""
        list(self.read_new())
        self._rows = {key: row for key, row in self._rows.items() if key[0] not in parts}
        self.parts = {number: part for number, part in self.parts.items() if number not in parts}
        write_atomically(self.rows_path, "".join(json.dumps(row) + "\n" for row in self._rows.values()))
        self._offset = self.rows_path.stat().st_size

    def write(self) -> None:
        """Replace gpu.json."""
        content = {
            "schema": SCHEMA,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "settings": self.settings,
            "minutes": self.minutes,
            "seconds": round(self.seconds, 1),
            "card": self.card,
            "environment": self.environment,
            "headline": headline(self.rows),
            "parts": {str(number): self.parts[number] for number in sorted(self.parts)},
            "rows": self.rows,
        }
        with storage_errors(self.path):
            write_atomically(self.path, json.dumps(content, indent=1) + "\n")


def measured(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that have figures."""
    return [row for row in rows if "failed" not in row and "skipped" not in row]


def best_step(rows: Sequence[Row], model: str, batch: int) -> Row | None:
    """Returns the fastest UNet step of a model at a batch, on any backend, or None if none was measured.

    Args:
        rows: of all parts.
        model: its name in the rows.
        batch: of the UNet.
    """
    found = [
        row
        for row in measured(rows)
        if row["part"] in UNET_PARTS and (row.get("model"), row.get("batch")) == (model, batch)
    ]
    return min(found, key=lambda row: row["step_ms"], default=None)


def headline(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the figures that the project aims at, if they were measured.

    unet_step_speedup   time of the teacher in eager mode over bk-tiny in its fastest row, at UNet batch 2; with that
                        row and its share of the peak
    picture_speedup     the same for a whole picture of 25 steps with guidance
    few_step_speedup    the same, if the student draws in 4 steps without guidance and with a small decoder
    training_speedup    our loop over a loop in the public scripts' manner; with the share of the peak of our fastest
    tests_passed, tests_not_passed
    """
    by_name = {(row["part"], row["row"]): row for row in measured(rows)}
    found: dict[str, Any] = {}
    eager, best = by_name.get((3, "sd15 b2 eager")), best_step(rows, "bk-tiny", 2)
    if eager and best:
        found["unet_step_speedup"] = round(eager["step_ms"] / best["step_ms"], 3)
        found |= {"unet_step_row": best["row"], "unet_step_share_of_peak": round(best["share_of_peak"], 4)}
    slow = by_name.get((5, "sd15 eager"))
    for name, row in (("picture_speedup", "bk-tiny best"), ("few_step_speedup", "bk-tiny 4 steps small decoder best")):
        if slow and (fast := by_name.get((5, row))):
            found[name] = round(slow["picture_ms"] / fast["picture_ms"], 3)
    public = by_name.get((6, "public manner"))
    loops = [row for (part, name), row in by_name.items() if part == 6 and name.startswith("sdcompress")]
    if public and loops:
        quickest = max(loops, key=lambda row: row["samples_per_s"])
        found["training_speedup"] = round(quickest["samples_per_s"] / public["samples_per_s"], 3)
        if quickest.get("share_of_peak"):
            found["training_share_of_peak"] = round(quickest["share_of_peak"], 4)
    tests = next((row for row in rows if row["part"] == 7 and "passed" in row), None)
    if tests:
        found |= {"tests_passed": tests["passed"], "tests_not_passed": tests["not_passed"]}
    return found
