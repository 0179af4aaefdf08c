"""The sha256 of large files, computed once as long as they do not change."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from .manifest import cache_folder, sha256_file
from .sealed_files import read_sealed, write_sealed

LEAST_BYTES = 2**26
"""Smaller files are read again each time, which takes less than 50 ms."""
_SETTLED_NS = 2 * 10**9
"""A file that changed less than this before it was read may change again with the same time, and gets no note."""


def sha256_once(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hex. A large file that did not change since the last call is not read.

    A note in the cache folder holds the sha256 with the file's size, number and times. It shows a file that was
    replaced, restored or written to by any program. Whoever can set the times of a file back, or write into the cache
    folder, acts as this user and needs no such trick. Code (`.engine`, `.pt2`) is read again at each start.

    Args:
        path: of the file.

    Raises:
        OSError: there is nothing, or it may not be read.
    """
    before = _identity(path)
    if before[0] < LEAST_BYTES:
        return sha256_file(path)
    # By the file's number and not by its path, so that the note of an export is found after its folder is renamed.
    place = path.stat()
    note = cache_folder() / "verified" / hashlib.sha256(f"{place.st_dev} {place.st_ino}".encode()).hexdigest()[:32]
    kept = read_sealed(note)
    if kept is not None and kept[64:] == json.dumps(before).encode():
        return kept[:64].decode("ascii")
    digest = sha256_file(path)
    if _identity(path) == before and time.time_ns() - max(before[2:]) > _SETTLED_NS:
        write_sealed(note, digest.encode("ascii") + json.dumps(before).encode())
    return digest


def _identity(path: Path) -> tuple[int, int, int, int]:
    """Returns size, number, and the times of the last change of content and of anything, in ns.

    On Windows the last time is the one of its creation.
    """
    facts = path.stat()
    return facts.st_size, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns
