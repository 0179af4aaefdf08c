"""Files that appear whole or not at all, on Linux and on Windows."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

_BUSY = (5, 32)
"""`winerror` of a refusal that may pass: access denied, and a file that another program has open."""
_WAITS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.3)
"""Pauses between the attempts, about one second together: virus scanners and indexers let go within that time."""


def replace_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Rename a file or folder, over an existing file. Try again for about a second where Windows says it is in use.

    Args:
        source: the file or folder, on the file system of `target`.
        target: its new path. A folder may replace nothing but, on Linux, an empty folder.

    Raises:
        OSError: as of `os.replace`; on Windows after the last attempt.
    """
    for wait_s in _WAITS_S:
        try:
            os.replace(source, target)
        except PermissionError as error:
            if getattr(error, "winerror", None) not in _BUSY or os.path.isdir(target):
                raise  # another reason, or a folder in the way, which stays there
            time.sleep(wait_s)
        else:
            return
    os.replace(source, target)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file beside its place and rename it into it, so that readers see the old content or all of the new.

    Nothing is left beside it after an error. The content is not forced to the disk: after a power failure the file may
    be empty.

    Args:
        path: the file; its folder is there.
        data: the content; text is written in UTF-8, with its line ends as they are.

    Raises:
        OSError: no space, no permission, or the file is in use.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        replace_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)
