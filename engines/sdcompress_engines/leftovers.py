"""Temporary names that say which process uses them, and the end of what killed processes have left under them."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

PARTIAL, OLD = "partial", "old"
"""What a temporary name is for: a file or folder that is being written, and a folder that is being replaced."""
_NAME = re.compile(r"\.(.+)\.(\d{1,10})-([0-9a-f]{6})([0-9a-f]{6})?[0-9a-f]{8}\.(partial|old)(?:\.[^.]*)?")
"""Target, process id, machine, start of the process (not in names of earlier versions), use."""


def temporary_path(target: Path, use: str = PARTIAL) -> Path:
    """Returns an unused hidden path beside `target`, with this process in its name.

    Args:
        target: the file or folder that is written or replaced.
        use: `PARTIAL` or `OLD`.
    """
    # The suffix stays, because some writers choose the format by it. Names have at most 255 bytes.
    suffix = target.suffix if len(target.suffix) <= 16 and target.suffix.isascii() and use == PARTIAL else ""
    process = f"{os.getpid()}-{_machine()}{_read_start(os.getpid())}"
    return target.with_name(f".{_shorten(target)}.{process}{uuid.uuid4().hex[:8]}.{use}{suffix}")


def is_temporary(name: str) -> bool:
    """Returns whether `temporary_path` makes names like this one."""
    return _NAME.fullmatch(name) is not None


def bring_back(target: Path) -> None:
    """Put a folder back that a process moved aside and did not replace, because it was killed between the two renames.

    Args:
        target: the folder that is missing; without effect where there is something.
    """
    for path, use in _left_beside(target):
        if use == OLD and not os.path.lexists(target) and os.path.lexists(path / target.name):
            with suppress(OSError):  # another process was faster
                os.replace(path / target.name, target)
                path.rmdir()


def remove_leftovers(target: Path) -> None:
    """Remove what processes that were killed while they wrote `target` have left beside it, as far as possible.

    What a process that runs is using stays, and so does what another machine has written.
    """
    for path, use in _left_beside(target):
        with suppress(OSError):
            if not path.is_dir():
                path.unlink()
            elif use == PARTIAL or {entry.name for entry in path.iterdir()} <= {target.name}:
                shutil.rmtree(path)


def remove_partial_files(folder: Path) -> None:
    """Remove the files in a folder that killed processes were writing, as far as possible."""
    for path, match in _left_in(folder):
        if match[5] == PARTIAL:
            with suppress(OSError):
                path.unlink()


def _left_beside(target: Path) -> Iterator[tuple[Path, str]]:
    """Yields the temporary paths of `target` whose process does not run any more, each with its use."""
    for path, match in _left_in(target.parent):
        if match[1] == _shorten(target):
            yield path, match[5]


def _left_in(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        match = _NAME.fullmatch(name)
        if match and match[3] == _machine() and not _is_running(int(match[2]), match[4]):
            yield folder / name, match


def _shorten(target: Path) -> str:
    return target.name[:40]


@cache
def _machine() -> str:
    """Returns 6 hex digits that differ between machines and between containers: process ids mean nothing elsewhere."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except (OSError, AttributeError):
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:6]


def _read_start(pid: int) -> str:
    """Returns 6 hex digits of when a process started, "" where that is unknown. A process id is given again and again.

    Linux counts from the system's start, which does not change with the clock.
    """
    try:
        started = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return hashlib.sha256(started).hexdigest()[:6]


def _is_running(pid: int, start: str | None) -> bool:
    """Returns whether a process runs; True where that cannot be found out.

    Args:
        pid: its id.
        start: as `_read_start` returned it to the process; None or "" where it is not known.
    """
    if start and start != (_read_start(pid) or start):
        return False
    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):  # another user's process, or no process id of this system
            return True
        return True
    try:  # os.kill would end the process on Windows
        import psutil
    except ImportError:
        return True
    return bool(psutil.pid_exists(pid))
