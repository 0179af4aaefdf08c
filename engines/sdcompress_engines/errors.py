"""Every error that a user can meet.

The library raises them. Only the command line turns one into a line and an exit code.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath


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


class NotTrusted(EngineError):
    """An engine or package that was built elsewhere, and that the user has not allowed to run."""


class EngineMismatch(EngineError):
    """An engine that was built for another model, card, version, platform or shape."""


class BackendMissing(SdCompressError):
    """A runtime that is not installed, or a device that this machine does not have."""


class GateFailed(SdCompressError):
    """A measured figure is over its limit."""

    exit_code = 3


_STORAGE = {
    errno.ENOSPC: ("no space left on the device", "free some space or choose another -o"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another -o"),
    errno.EACCES: ("no permission to write here", "choose another -o"),
    errno.EPERM: ("no permission to write here", "choose another -o"),
    errno.EROFS: ("the file system is read-only", "choose another -o"),
    errno.EEXIST: ("a part of this path is a file, not a folder", "choose another -o"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "choose another -o"),
}

_IN_USE = ("is in use by another program", "close the program that uses it")
_WINDOWS_STORAGE = {  # by `winerror`, because their errno fits many other faults
    32: _IN_USE,
    33: _IN_USE,
    1224: _IN_USE,
    1314: ("Windows does not allow this account to create links", "turn on Developer Mode, or leave out --link"),
}


def storage_error(error: OSError, path: str | PathLike[str]) -> StorageError | None:
    """Returns the `StorageError` for an OSError, or None where it is no known fault of the file system.

    Args:
        error: met while `path` was written.
        path: the file or folder, for the message where the error names none.
    """
    known = _WINDOWS_STORAGE.get(getattr(error, "winerror", None) or 0) or _STORAGE.get(error.errno or 0)
    return StorageError(known[0], where=error.filename or path, hint=known[1]) if known else None


@contextmanager
def storage_errors(path: str | PathLike[str]) -> Iterator[None]:
    """Turn errors such as "no space" and "no permission", met while `path` is written, into `StorageError`."""
    try:
        yield
    except OSError as error:
        known = storage_error(error, path)
        if known is None:
            raise
        raise known from error
    except RuntimeError as error:  # torch and safetensors report a full disk so, with the text of the OSError
        text = str(error)
        if "No space left" in text or "file write failed" in text or "os error 28" in text:
            raise StorageError(*_STORAGE[errno.ENOSPC][:1], where=path, hint=_STORAGE[errno.ENOSPC][1]) from error
        raise


def shorten(error: object, length: int = 300) -> str:
    """Returns an error's message, or another text, in one line of at most `length` characters and dots."""
    line = " ".join(str(error).split())
    return line if len(line) <= length else f"{line[:length]} ..."
