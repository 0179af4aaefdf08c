"""Every error a user can meet.

The library raises them; only the command line turns one into a line and an exit code.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath


class SdCompressError(Exception):
    """What failed, where, what was expected, and what to type next; printed as one line.

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
    """A name or an option that does not exist, or a path that is not there."""

    exit_code = 2


class ModelError(SdCompressError):
    """A checkpoint or pipeline that cannot serve: missing parts, unknown family, wrong shapes."""


class PlanError(SdCompressError):
    """A block-removal plan that is illegal for the UNet it is made for."""


class DataError(SdCompressError):
    """A data set that is empty, broken, captionless or made for something else."""


class ArtifactError(SdCompressError):
    """An artifact on disk that is damaged, of another kind, or in the way."""


class StorageError(SdCompressError):
    """The file system said no: no space, no permission, a read-only place."""


class TrainingError(SdCompressError):
    """Training that cannot go on: divergence, or a checkpoint of another run."""


class ExportError(SdCompressError):
    """A graph that could not be exported."""


class EngineError(SdCompressError):
    """An engine that could not be built, loaded or run."""


class EngineMismatch(EngineError):
    """An engine made for another model, card, version, platform or shape."""


class BackendMissing(SdCompressError):
    """A runtime that is not installed, or a device that is not there."""


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
_WINDOWS_STORAGE = {  # by `winerror`; the errno of these fits many other faults
    32: _IN_USE,
    33: _IN_USE,
    1224: _IN_USE,
    1314: ("Windows lets this account make no links", "turn on Developer Mode, or do it without links"),
}


def storage_error(error: OSError, path: str | PathLike[str]) -> StorageError | None:
    """The `StorageError` that says what this OSError means for a write to `path`, or None where it is another matter."""
    known = _WINDOWS_STORAGE.get(getattr(error, "winerror", None) or 0) or _STORAGE.get(error.errno or 0)
    return StorageError(known[0], where=error.filename or path, hint=known[1]) if known else None


@contextmanager
def storage_errors(path: str | PathLike[str]) -> Iterator[None]:
    """Turn "no space", "no permission" and their kin, met while writing `path`, into `StorageError`."""
    try:
        yield
    except OSError as error:
        known = storage_error(error, path)
        if known is None:
            raise
        raise known from error
    except (
        RuntimeError
    ) as error:  # torch and safetensors report a full disk as a RuntimeError with the text of the OSError
        text = str(error)
        if "No space left" in text or "file write failed" in text or "os error 28" in text:
            raise StorageError(*_STORAGE[errno.ENOSPC][:1], where=path, hint=_STORAGE[errno.ENOSPC][1]) from error
        raise
