"""Files that appear whole or not at all, on Linux and on Windows, and files that are safe to open.

Every file of ours is written by `atomic_file` or `write_atomically`, or in a folder of `output_folders.staged`.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ArtifactError, SdCompressError
from .leftovers import temporary_path

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


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file beside `path` that replaces it when the block ends.

    Readers see the old content or all of the new, also after a power failure. After an error the old file is as it was,
    and nothing is left beside it.

    Args:
        path: the file; its folder is there. A link is replaced, not followed.

    Raises:
        OSError: no space, no permission, or the file is in use.
    """
    partial = temporary_path(path)
    try:
        yield partial
        sync(partial)
        replace_file(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file by `atomic_file`.

    Args:
        path: the file; its folder is there.
        data: the content; text is written in UTF-8, with its line ends as they are.

    Raises:
        OSError: no space, no permission, or the file is in use.
    """
    with atomic_file(path) as partial:
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def append_line(path: Path, line: str, *, durable: bool = False) -> None:
    """Append a line to a file, whole or not at all, as far as the process lives.

    Args:
        path: the file, created where it is missing; its folder is there.
        line: without its end.
        durable: force it to the disk, too.

    Raises:
        OSError: no space or no permission; the file is as it was.
    """
    with path.open("ab", buffering=0) as file:
        size, rest = file.tell(), memoryview(f"{line}\n".encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


@contextmanager
def parents_made(path: Path) -> Iterator[None]:
    """Create the missing folders above `path`; after an error in the block, remove those of them that are empty.

    Raises:
        OSError: no permission, or a part of the path is a file.
    """
    missing = [place for place in path.absolute().parents if not os.path.lexists(place)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in missing:  # the innermost first
            with suppress(OSError):
                place.rmdir()
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file into another place too: by a hard link where the file system has them, else as a copy.

    Args:
        source: the file.
        target: is replaced if it exists.

    Raises:
        FileNotFoundError: there is no source. OSError: it cannot be copied.
    """
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def copy_tree(source: Path, target: Path, *, without: str = "") -> None:
    """Copy the files of a folder and its subfolders, without their permissions: a copy may be replaced and removed.

    Args:
        source: the folder. Links are followed.
        target: the new folder, or one that is there.
        without: name of a subfolder that is left out.

    Raises:
        OSError: no space or no permission.
    """
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.is_dir() and path.name != without:
            copy_tree(path, target / path.name)
        elif not path.is_dir():
            shutil.copyfile(path, target / path.name)


def sync_tree(folder: Path) -> None:
    """Force every file in a folder, and the names of all, to the disk.

    Raises:
        OSError: as `sync`.
    """
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk.

    Raises:
        OSError: the file's content could not be written: no space, or a fault of the disk.
    """
    if path.is_dir():
        if os.name == "posix":  # Windows cannot open a folder
            with suppress(OSError):  # some network file systems cannot synchronize a folder
                _sync(path, os.O_RDONLY)
        return
    # Windows synchronizes only what may be written. Elsewhere a copy of a read-only file may be read-only, too.
    _sync(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_regular(path: Path, error: type[SdCompressError] = ArtifactError) -> None:
    """Refuse what is no regular file. A pipe would be waited for, and a device has no end.

    Args:
        path: of the file. A link is followed.
        error: the class to raise.

    Raises:
        SdCompressError: of the class `error`: the path leads to a folder, a pipe, a device or a socket.
        OSError: there is nothing, or it may not be read.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise error(f"is {_name_kind(mode)}", where=path, expected="a regular file")


def check_tree(folder: Path, error: type[SdCompressError] = ArtifactError) -> None:
    """Refuse a folder with a pipe, a device or a socket somewhere in it. Libraries open whatever has the right name.

    Args:
        folder: a model or another artifact. Links are followed, but not into other folders.
        error: the class to raise.

    Raises:
        SdCompressError: of the class `error`, as of `check_regular`.
    """
    for path in folder.rglob("*"):
        with suppress(OSError):  # a link to nothing
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise error(f"is {_name_kind(mode)}", where=path, expected="a regular file")


def _name_kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "no file")
