"""A part's view of the program in its own process: its device, the rows of earlier parts, and where its rows go."""

from __future__ import annotations

import gc
import importlib
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import BackendMissing, SdCompressError, shorten
from sdcompress_engines.files import append_line
from sdcompress_engines.paths import hide_home

Row = dict[str, Any]
BEGUN = "begun"
"""Key of a line with the name of the row being measured, so that a crash can be attributed to that row."""


class DeviceLost(RuntimeError):
    """The CUDA context is broken. Every further call in this process fails."""


class PartRun:
    """One run of one part.

    Args:
        argument: see `Program.argument_of`; plain values.

    Attributes:
        part: its number.
        device: `cpu`, or a CUDA device with its index.
        smoke: measure small models, a few samples each.
        earlier: rows of other parts, and of this part from an earlier attempt.
        precision: of the models.
        folder: of the results.
        scratch: for large files; it is removed when the program ends.
        facts: what the program knows about the machine.
    """

    def __init__(self, argument: Mapping[str, Any]) -> None:
        self.part: int = argument["part"]
        self.smoke: bool = argument["smoke"]
        self.device = torch.device("cuda", 0) if argument["device"] == "cuda" else torch.device("cpu")
        self.precision = "fp16" if self.is_cuda else "bf16"
        self.folder, self.scratch = Path(argument["folder"]), Path(argument["scratch"])
        self.facts: Mapping[str, Any] = argument["facts"]
        self.earlier: list[Row] = argument["rows"]
        self._done = {
            row["row"]: row for row in self.earlier if row["part"] == self.part and row["row"] in argument["done"]
        }
        self._deadline: float = argument["deadline"]

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def seconds_left(self) -> float:
        """Returns how long this part may still run."""
        return self._deadline - time.time()

    def find(self, part: int, row: str) -> Row | None:
        """Returns an earlier row that has figures, or None."""
        found = [each for each in self.earlier if each["part"] == part and each["row"] == row]
        return next((each for each in found if "failed" not in each and "skipped" not in each), None)

    def row(self, name: str, **figures: Any) -> Row:
        """Write a row now and return it; a figure that is not finite marks it as failed."""
        found: Row = {"part": self.part, "row": name} | figures
        for key, value in figures.items():
            if isinstance(value, float) and not math.isfinite(value):
                found[key] = None
                found.setdefault("failed", f"{key} is {value}")
        self._write(found)
        self.earlier.append(found)
        return found

    def measure(self, name: str, function: Callable[[], Mapping[str, Any]], **labels: Any) -> Row:
        """Write the row with the figures of `function`, unless an earlier attempt has it; returns the row.

        If the function raises, the row is marked as skipped or failed, with the reason.

        Args:
            name: of the row, unique in the part.
            function: measures and returns the figures.
            labels: plain values that the row has in any case.

        Raises:
            DeviceLost: the device does not answer anymore.
        """
        if name in self._done:
            return self._done[name]
        self._write({"part": self.part, BEGUN: name})
        began = time.monotonic()
        try:
            found = {**labels, **function()}
        except BackendMissing as error:
            found = {**labels, "skipped": str(error)}
        except Exception as error:  # a failed row must not stop the part
            self.log(f"part {self.part}, {name}\n{traceback.format_exc()}")
            kind = "" if isinstance(error, SdCompressError) else f"{type(error).__name__}: "
            found = {**labels, "failed": hide_home(shorten(f"{kind}{error}"))}
        row = self.row(name, **found, took_s=round(time.monotonic() - began, 2))
        if "failed" in row:
            self._recover(name)
        return row

    def skip(self, name: str, reason: str, **labels: Any) -> Row:
        """Write a row that this machine cannot measure; returns it.

        Args:
            name: of the row, unique in the part.
            reason: why.
            labels: plain values of the row.
        """
        return self.row(name, **labels, skipped=reason)

    def log(self, text: str) -> None:
        """Add lines to gpu.log."""
        append_line(self.folder / "gpu.log", text.rstrip())

    def _write(self, line: Row) -> None:
        append_line(self.folder / "rows.jsonl", json.dumps(line, allow_nan=False))

    def _recover(self, name: str) -> None:
        """Free the memory that a failed row left behind."""
        gc.collect()
        if self.is_cuda:
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise DeviceLost(f"the device was lost in row {name!r} ({shorten(error)})") from error


def run_part(argument: Mapping[str, Any]) -> dict[str, Any]:
    """Run the part that `argument` names, in this process; it writes its rows to rows.jsonl."""
    run = PartRun(argument)
    if run.is_cuda:
        torch.cuda.set_device(run.device)
    module, _, name = argument["function"].partition(":")
    getattr(importlib.import_module(module), name)(run)
    return {}


def describe(argument: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the environment; on CUDA it checks that the device computes in this process.

    Raises:
        RuntimeError: the device does not answer, or its result is wrong.
    """
    from ..environment import environment

    if argument["device"] == "cuda":
        one = torch.ones(256, 256, device="cuda")
        if (one @ one).sum().item() != 256.0**3:
            raise RuntimeError("a product of ones on the GPU came out wrong")
    return {"environment": environment()}
