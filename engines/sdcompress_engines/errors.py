"""Every error that a user can meet.

The library raises them. Only the command line turns one into a line and an exit code.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class SdCompressError(Exception):
    """What failed, where, what was expected, and what to type next, in one line.

    Args:
        what: what failed, with the offending value.
        where: the path, key or node it failed at.
        expected: what would have been accepted.
        hint: the next thing to type or to change.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | PathLike[str] | None = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.expected, self.hint = what, expected, hint
        self.where = None if where is None else fspath(where)
        line = what if self.where is None else f"{self.where}: {what}"
        if expected:
            line += f"; expected {expected}"
        if hint:
            line += f". Try: {hint}"
        super().__init__(" ".join(line.split()))

    def with_hint(self, hint: str) -> Self:
        """Returns the same error with a further hint behind its own."""
        hints = f"{self.hint}; {hint}" if self.hint else hint
        return type(self)(self.what, where=self.where, expected=self.expected, hint=hints)


class UsageError(SdCompressError):
    """A name or an option that does not exist, or a path that does not exist."""

    exit_code = 2


class ModelError(SdCompressError):
    """A checkpoint or pipeline that cannot be used: missing parts, unknown family, wrong shapes."""


class PlanError(SdCompressError):
    """A block-pruning plan that its UNet does not allow."""


class DataError(SdCompressError):
    """A data set that is empty, broken, without captions or of another kind."""


class ArtifactError(SdCompressError):
    """An artifact on disk that is damaged, of another kind, or in the place of an output."""


class StorageError(SdCompressError):
    """A refusal of the file system: no space, no permission, a read-only place."""


class TrainingError(SdCompressError):
    """Training that cannot continue: divergence, or a checkpoint of another run."""


class ExportError(SdCompressError):
    """A graph that could not be exported."""


class EngineError(SdCompressError):
    """An engine that could not be built, loaded or run."""


class EngineMismatch(EngineError):
    """An engine that was built for another model, card, version, platform or shape."""


class BackendMissing(SdCompressError):
    """A runtime that is not installed, or a device that this machine does not have."""


class GateFailed(SdCompressError):
    """A measured figure is over its limit."""

    exit_code = 3


_FULL_HINT = "free some space or choose another -o"
_FULL = {
    errno.ENOSPC: ("no space left on the device", _FULL_HINT),
    errno.EDQUOT: ("the disk quota is used up", _FULL_HINT),
    errno.EFBIG: (
        "the file is larger than the file system or this account's limit (ulimit -f) allows",
        "raise the limit or choose another -o",
    ),
    errno.EIO: ("the disk reports a fault (input/output error)", "check the disk or choose another -o"),
    errno.EROFS: ("the file system is read-only", "choose another -o"),
}
"""Refusals of a write that libraries also report as text, by errno."""
_STORAGE = _FULL | {
    errno.EACCES: ("no permission to write here", "choose another -o"),
    errno.EPERM: ("no permission to write here", "choose another -o"),
    errno.EEXIST: ("a part of this path is a file, not a folder", "choose another -o"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "choose another -o"),
    errno.EISDIR: ("is a folder, not a file", "choose another -o"),
    errno.ENAMETOOLONG: ("a name in this path is too long", "choose another -o"),
    errno.ELOOP: ("the links in this path lead to each other", "choose another -o"),
    errno.EBUSY: ("is in use by the system, as a mount point is", "choose another -o"),
}
_TORCH_WRITES = re.compile(r"file write failed|inline_container\.cc.*unexpected pos")
"""What torch reports where its own writer fails; the reason is nearly always a full disk."""

_IN_USE = ("is in use by another program", "close the program that uses it")
_WINDOWS_STORAGE = {  # by `winerror`, because their errno fits many other faults
    32: _IN_USE,
    33: _IN_USE,
    1224: _IN_USE,
    1314: ("Windows does not allow this account to create links", "turn on Developer Mode, or leave out --link"),
}


def storage_error(error: BaseException, path: str | PathLike[str]) -> StorageError | None:
    """Returns the `StorageError` for an exception, or None where it is no known fault of the file system.

    torch, safetensors and tokenizers report a full disk as exceptions of their own, with the text of the system's.

    Args:
        error: met while `path` was written.
        path: the file or folder, for the message where the error names none.
    """
    known, where = None, path
    if isinstance(error, OSError):
        known = _WINDOWS_STORAGE.get(getattr(error, "winerror", None) or 0) or _STORAGE.get(error.errno or 0)
        where = error.filename or path
    elif isinstance(error, Exception) and not isinstance(error, SdCompressError):
        known = next((_FULL[number] for number in _FULL if os.strerror(number) in str(error)), None)
        if known is None and _TORCH_WRITES.search(str(error)):
            known = _FULL[errno.ENOSPC]
    return StorageError(known[0], where=where, hint=known[1]) if known else None


@contextmanager
def storage_errors(path: str | PathLike[str]) -> Iterator[None]:
    """Turn errors such as "no space" and "no permission", met while `path` is written, into `StorageError`."""
    try:
        yield
    except Exception as error:
        known = storage_error(error, path)
        if known is None:
            raise
        raise known from error


def shorten(error: object, length: int = 300) -> str:
    """Returns an error's message, or another text, in one line of at most `length` characters and dots."""
    line = " ".join(str(error).split())
    return line if len(line) <= length else f"{line[:length]} ..."
