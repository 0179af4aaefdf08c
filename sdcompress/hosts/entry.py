"""What identifies a file or link that an install has written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sdcompress_engines.manifest import sha256_file


@dataclass(frozen=True)
class Entry:
    """What identifies a file or link that an install has written.

    Attributes:
        sha256, bytes: of a file.
        link: the target of a link.
    """

    sha256: str = ""
    bytes: int = 0
    link: str = ""

    @classmethod
    def of(cls, path: Path) -> Entry:
        """Returns the entry of a file."""
        return cls(sha256_file(path), path.stat().st_size)

    def is_at(self, path: Path) -> bool:
        """Returns whether exactly this file or link lies at `path`."""
        if path.is_symlink():
            return bool(self.link) and without_prefix(os.readlink(path)) == self.link
        return (
            not self.link and path.is_file() and path.stat().st_size == self.bytes and sha256_file(path) == self.sha256
        )


@dataclass(frozen=True)
class Item:
    """A file or link to put into a host.

    Attributes:
        source: the file to copy, or the target of the link.
        entry: what identifies it in the host.
    """

    source: Path
    entry: Entry


def without_prefix(target: str) -> str:
    """Returns a link's target without the prefix that Windows adds when it reads the link."""
    if target.startswith("\\\\?\\UNC\\"):
        return "\\\\" + target[8:]
    return target.removeprefix("\\\\?\\")
