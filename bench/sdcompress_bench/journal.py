"""Keeps the outcomes of finished cases beside the future report, so that a stopped suite continues where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import storage_errors
from sdcompress_engines.files import append_line, write_atomically
from sdcompress_engines.manifest import canonical

from . import isolated

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)


class Journal:
    """A file with the name and the outcome of a case in each line. Failures are not kept, so they are tried again.

    Args:
        path: the file, in a folder of its own; None keeps nothing.
        fingerprint: what the outcomes depend on. A folder with another fingerprint is emptied first.
    """

    def __init__(self, path: Path | None = None, fingerprint: str = "") -> None:
        self.path, self.known = path, {} if path is None else _read(path, fingerprint)
        self.continued = bool(self.known)
        if path is not None and not self.known:
            with storage_errors(path):
                # Outputs of another suite's cases would be taken for this suite's.
                shutil.rmtree(path.parent, ignore_errors=True)
                path.parent.mkdir(parents=True)
                write_atomically(path, json.dumps({"fingerprint": fingerprint}) + "\n")
        elif path is not None and not path.read_bytes().endswith(b"\n"):
            with storage_errors(path):
                append_line(path, "")  # ends a line that a crash cut

    def call(
        self, name: str, function: Callable[[Any], dict[str, Any]], argument: Mapping[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        """Returns the kept outcome of a case, or that of `isolated.call`.

        Args:
            name: of the case, unique in the journal.
            function: importable by name; returns plain values.
            argument: plain values.
            timeout_s: seconds after which the process is killed.
        """
        if name not in self.known:
            outcome = isolated.call(function, argument, timeout_s)
            if "failed" in outcome:
                return outcome
            self.known[name] = outcome
            if self.path is not None:
                with storage_errors(self.path):
                    line = {"case": name, "outcome": outcome, "seal": _seal(name, outcome)}
                    append_line(self.path, json.dumps(line), durable=True)
        return self.known[name]


def _read(path: Path, fingerprint: str) -> dict[str, dict[str, Any]]:
    """Returns case → outcome of a journal with this fingerprint; a line that was cut or edited is left out."""
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(head)["fingerprint"] != fingerprint:
            return {}
    except _UNREADABLE:
        return {}
    known = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["seal"] == _seal(entry["case"], entry["outcome"]):
                known[entry["case"]] = entry["outcome"]
        except _UNREADABLE:
            continue
    return known


def _seal(name: str, outcome: Mapping[str, Any]) -> str:
    """Returns a hash of an outcome: its values are used without a further check."""
    return hashlib.sha256(canonical([name, outcome])).hexdigest()
