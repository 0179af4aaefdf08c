"""Small files that only save time, such as compiled kernels: whole or absent, and ignored when damaged."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from .files import write_atomically


def read_sealed(path: Path) -> bytes | None:
    """Returns what `write_sealed` wrote; None where there is nothing or the file is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content[32:] if content[:32] == hashlib.sha256(content[32:]).digest() else None


def write_sealed(path: Path, content: bytes) -> None:
    """Write `content` behind its sha256, whole or not at all.

    Such a file only saves time, so a disk that refuses it is a warning.
    """
    if read_sealed(path) == content:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(content).digest() + content)
    except OSError as error:
        warnings.warn(
            f"{path}: not kept ({error.strerror or error}), so it is made again next time", RuntimeWarning, stacklevel=3
        )
