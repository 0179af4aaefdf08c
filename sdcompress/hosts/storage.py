"""What the file system allows in a host's folder."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdcompress_engines.errors import ArtifactError, StorageError, storage_error, storage_errors
from sdcompress_engines.locks import try_lock
from sdcompress_engines.manifest import cache_folder
from sdcompress_engines.output_folders import nearest_existing

from sdcompress.hosts.host import Host

_NO_PRIVILEGE = 1314
"""The Windows error of an account that may not create links."""


def check_writable(host: Host, root: Path) -> None:
    """Check the host's two folders before anything is written.

    Raises:
        StorageError: a link to a missing folder, a file where a folder is needed, or no permission.
    """
    for place in (root / folder for folder in host.folders):
        if dangling := [path for path in (place, *place.parents) if path.is_symlink() and not path.exists()]:
            raise StorageError(
                f"is a link to {os.readlink(dangling[0])}, which is not there",
                where=dangling[0],
                hint="mount or create that folder, or remove the link",
            )
        existing = nearest_existing(place)
        if not existing.is_dir():
            raise StorageError("is a file, and a folder is needed here", where=existing, hint="move it away")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise StorageError(
                "no permission to write here", where=existing, hint=f"run this as the user who runs {host.title}"
            )


def check_links(folder: Path) -> None:
    """Create a link in a temporary folder inside `folder`, to see whether this account can create links there.

    Raises:
        OSError: it cannot, as on Windows without Developer Mode.
    """
    with tempfile.TemporaryDirectory(prefix=".sdcompress-", dir=folder) as place:
        try:
            os.symlink(place, Path(place) / "link", target_is_directory=True)
        except OSError as error:
            error.filename = str(folder)  # the temporary folder is gone when a person reads the message
            raise


@contextmanager
def host_lock(root: Path) -> Iterator[None]:
    """Keep other installs and uninstalls of this user out of a host's folder, for the block.

    The lock lies in the cache folder, so that nothing of it stays in the host.

    Raises:
        ArtifactError: another one is at work.
        StorageError: the cache folder cannot be written, or has no locks.
    """
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
    path = cache_folder() / "locks" / f"{name}.lock"
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = try_lock(path, hint="set SDCOMPRESS_CACHE to a folder on a local disk")
    if lock is None:
        raise ArtifactError("another install or uninstall is at work here", where=root, hint="wait until it has ended")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def host_storage_errors(host: Host, root: Path) -> Iterator[None]:
    """Turn an `OSError` within the block into a `StorageError` whose hint fits an install.

    Raises:
        StorageError: the file system refused or failed.
    """
    try:
        yield
    except OSError as error:
        known = storage_error(error, error.filename or root)
        what = known.what if known else f"the file system failed ({error.strerror or error})"
        no_links = known is not None and getattr(error, "winerror", None) == _NO_PRIVILEGE
        if known and no_links:
            hint = known.hint
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, then install again"
        else:
            hint = f"close {host.title} if it runs, and run this as the user who runs it"
        raise StorageError(what, where=error.filename or root, hint=hint) from error
