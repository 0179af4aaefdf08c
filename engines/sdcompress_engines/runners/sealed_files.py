"""Small files that only save time, such as compiled kernels: written whole or not at all, and not believed when
damaged.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from pathlib import Path


def read_sealed(path: Path) -> bytes | None:
    """What `write_sealed` wrote; None where there is nothing or it was damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content[32:] if content[:32] == hashlib.sha256(content[32:]).digest() else None


def write_sealed(path: Path, content: bytes) -> None:
    """Keep `content` behind its sha256, whole or not at all.

    What is kept only saves time, so a disk that refuses it is a warning.
    """
    if read_sealed(path) == content:
        return
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            prefix=f".{path.name}.", suffix=".partial", dir=path.parent, delete=False
        ) as file:
            partial = file.name
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(partial, path)
    except OSError as error:
        warnings.warn(
            f"{path}: not kept ({error.strerror or error}), so it is made again next time", RuntimeWarning, stacklevel=3
        )
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
