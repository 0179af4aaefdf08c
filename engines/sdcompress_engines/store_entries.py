"""What an engine store holds, and what a check or a clean-up of it reports."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .engine_files import SUFFIX
from .manifest import MANIFEST_NAME, Manifest


@dataclass(frozen=True)
class StoredEngine:
    """An entry whose manifest is sound and whose file has the right size.

    `EngineStore.verify` and `EngineStore.find` read the file's bytes too.
    """

    folder: Path
    manifest: Manifest
    component: str

    @property
    def digest(self) -> str:
        return self.folder.name

    @property
    def path(self) -> Path:
        """The engine file."""
        return self.folder / f"{self.component}{SUFFIX}"

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def used(self) -> float:
        """When it was last asked for, or built: seconds since the epoch."""
        return modified_s(self.folder / MANIFEST_NAME)


@dataclass(frozen=True)
class BrokenEngine:
    """An entry that is not used, because of its fault."""

    folder: Path
    fault: str

    @property
    def digest(self) -> str:
        return self.folder.name

    @property
    def bytes(self) -> int:
        return size_of(self.folder)

    @property
    def used(self) -> float:
        """When it was last changed: seconds since the epoch."""
        return modified_s(self.folder)


Entry = StoredEngine | BrokenEngine


@dataclass(frozen=True)
class Finding:
    """The faults of one folder; none where it is whole."""

    folder: Path
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Pruned:
    """A folder that was removed, or would be.

    Attributes:
        bytes: what that frees; a file that an output folder shares counts as nothing.
        reason: why it was chosen.
    """

    folder: Path
    bytes: int
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The result of `EngineStore.verify`.

    Attributes:
        findings: one for each entry, and one for each other file or folder in the store.
        swept: what killed builds had left, and is removed now.
    """

    findings: tuple[Finding, ...]
    swept: tuple[Pruned, ...]

    @property
    def clean(self) -> bool:
        """Whether no entry has a fault."""
        return not any(finding.faults for finding in self.findings)


def size_of(path: Path, *, unshared: bool = False) -> int:
    """Returns the bytes of a file, or of all files in a folder; 0 where it cannot be read.

    Args:
        path: the file or folder.
        unshared: leave out files that another folder shares by a hard link.
    """
    with suppress(OSError):
        stats = [file.stat() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
        return sum(stat.st_size for stat in stats if not unshared or stat.st_nlink == 1)
    return 0


def modified_s(path: Path) -> float:
    """Returns when a file or folder was changed, in seconds since the epoch; now, where it cannot be read."""
    with suppress(OSError):
        return path.stat().st_mtime
    return time.time()
