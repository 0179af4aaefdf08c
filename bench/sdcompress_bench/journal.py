"""Outcomes of finished cases, kept beside the report that is being made: a suite that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import storage_errors

from . import isolated


class Journal:
    """A file of one line a case: its name and its outcome. Failures are not kept, so they are tried again.

    Args:
        path: in a folder of its own, which goes with it; None keeps nothing. fingerprint: what the outcomes hold for; a
            folder of another is begun anew.
    """

    def __init__(self, path: Path | None = None, fingerprint: str = "") -> None:
        self.path, self.known = path, {} if path is None else _read(path, fingerprint)
        self.continued = bool(self.known)
        if path is not None and not self.known:
            with storage_errors(path):
                shutil.rmtree(
                    path.parent, ignore_errors=True
                )  # what cases of another suite have written would be taken for this one's
                path.parent.mkdir(parents=True)
                path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")

    def call(
        self, name: str, function: Callable[[Any], dict[str, Any]], argument: Mapping[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        """`isolated.call`, or what it gave before."""
        if name not in self.known:
            outcome = isolated.call(function, argument, timeout_s)
            if "failed" in outcome:
                return outcome
            self.known[name] = outcome
            if self.path is not None:
                with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"case": name, "outcome": outcome}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        return self.known[name]


def _read(path: Path, fingerprint: str) -> dict[str, dict[str, Any]]:
    """Whole lines of a journal of this fingerprint; a line cut by a crash is left out."""
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(head)["fingerprint"] != fingerprint:
            return {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    known = {}
    for line in lines:
        try:
            entry = json.loads(line)
            known[entry["case"]] = entry["outcome"]
        except (ValueError, KeyError, TypeError):
            continue
    return known
