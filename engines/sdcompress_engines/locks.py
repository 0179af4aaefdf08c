"""Locks between processes: one file each. The operating system holds the lock and releases it when the process ends."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import StorageError, storage_error

if TYPE_CHECKING:
    from filelock import BaseFileLock


class HeldLock:
    """A lock that this process holds.

    Until its release, Windows refuses to remove or rename the lock's file and its folder.
    """

    def __init__(self, path: Path, lock: BaseFileLock) -> None:
        self.path, self._lock = path, lock

    def release(self) -> None:
        """Let other processes take the lock.

        Its file may stay: on POSIX, removing it would let two processes hold it.
        """
        self._lock.release()

    def discard(self) -> None:
        """Release the lock and remove its file, for a folder that is removed too."""
        try:
            self.path.unlink()  # while it is held, so that no process locks a file that is gone
        except OSError:  # Windows: in use, by this process
            self._lock.release()
            self.path.unlink(missing_ok=True)
        else:
            self._lock.release()


def try_lock(path: Path, *, hint: str) -> HeldLock | None:
    """Returns the lock of a file without waiting, or None while another process, or another part of this one, holds it.

    Args:
        path: the lock's file, created where it is missing; its folder must exist.
        hint: what to type or change where the file system has no locks. Some network file systems have none.

    Raises:
        StorageError: the file system has no locks, or the file cannot be written.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    options: dict[str, Any] = {"thread_local": False}
    if "fallback_to_soft" in inspect.signature(FileLock.__init__).parameters:  # from filelock 3.30
        options["fallback_to_soft"] = False
    lock = FileLock(path, **options)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except NotImplementedError as error:  # filelock before 3.24, for a file system without flock
        raise StorageError("the file system has no locks", where=path, hint=hint) from error
    except OSError as error:
        known = storage_error(error, path)
        if known is not None:
            raise known from error
        what = f"the file system cannot lock a file ({error.strerror or error})"
        raise StorageError(what, where=path, hint=hint) from error
    if isinstance(lock, SoftFileLock):  # filelock 3.24 to 3.29 there: a file, which would outlive a killed process
        lock.release()
        raise StorageError("the file system has no locks", where=path, hint=hint)
    return HeldLock(path, lock)
