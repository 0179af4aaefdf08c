"""Recognize a host's folder."""

from __future__ import annotations

from pathlib import Path

from sdcompress_engines.errors import UsageError
from sdcompress_engines.paths import expand_user

from sdcompress.hosts.definitions import hosts
from sdcompress.hosts.host import Host


def find_host(name: str, path: str | Path) -> tuple[Host, Path]:
    """Returns the host of this name and its absolute folder.

    Raises:
        UsageError: there is no such host or folder, or the folder is not this host's.
    """
    known = hosts()
    if name not in known:
        raise UsageError(f"no host {name!r}", expected=" or ".join(known))
    host, root = known[name], expand_user(path).absolute()
    if not root.is_dir():
        raise UsageError("no such folder", where=root, expected=f"the folder of {host.title}")
    missing = host.missing_mark(root)
    excluding = next((other for mark, other in host.absent.items() if (root / mark).exists()), None)
    if missing is None and excluding is None:
        return host, root
    other = excluding or next(
        (each.name for each in known.values() if each is not host and each.missing_mark(root) is None), None
    )
    if other is not None:
        raise UsageError(
            f"is {known[other].title}, not {host.title}",
            where=root,
            hint=f"the same command with {other} instead of {name}",
        )
    inside = next(
        (entry for entry in sorted(root.iterdir()) if entry.is_dir() and host.missing_mark(entry) is None), None
    )
    raise UsageError(
        f"is not the folder of {host.title}: it has no {missing}",
        where=root,
        expected="the folder that the program is started from",
        hint=None if inside is None else f"the same command with the folder {inside}",
    )
