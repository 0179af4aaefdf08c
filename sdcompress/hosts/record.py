"""What an install has written into a host's folder: a record of files by sha256, and the few file operations that keep
to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.manifest import canonical, is_plain_path, sha256_file

SCHEMA = 1
PARTIAL = ".sdcompress-partial"
"""How the name of a copy ends that was not renamed into its place."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One thing an install has written: a file by its sha256 and size, or a link by its target."""

    sha256: str = ""
    bytes: int = 0
    link: str = ""

    @classmethod
    def of(cls, path: Path) -> Entry:
        """The entry of a file."""
        return cls(sha256_file(path), path.stat().st_size)

    def is_at(self, path: Path) -> bool:
        """Whether this is what lies there."""
        if path.is_symlink():
            return bool(self.link) and without_prefix(os.readlink(path)) == self.link
        return (
            not self.link and path.is_file() and path.stat().st_size == self.bytes and sha256_file(path) == self.sha256
        )


@dataclass(frozen=True)
class Record:
    """What installs have written into a host.

    Attributes:
        files: path in the host's folder, with `/` → `Entry`.
        folders: those that were made for it.
        version: of sdcompress, which the plugin is from. created: when it was written.
    """

    files: Mapping[str, Entry] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    version: str = ""
    created: str = ""


def read_record(path: Path, ours: tuple[str, ...]) -> tuple[Record | None, str | None]:
    """The record, None where there is none; and what is wrong with it, where it cannot be believed.

    Args:
        ours: the folders it may name files in; one that names others is none of ours.
    """
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError) as error:
        return None, f"it cannot be read: {error}"
    try:
        seal = raw.pop("seal")
        if raw["schema"] != SCHEMA:
            return None, f"it has schema {raw['schema']}, not {SCHEMA}"
        if seal != hashlib.sha256(canonical(raw)).hexdigest():
            return None, "it was edited: its seal does not match what it says"
        record = Record(
            {name: Entry(**entry) for name, entry in raw["files"].items()},
            tuple(raw["folders"]),
            raw["version"],
            raw["created"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return None, f"it does not say what was installed ({type(error).__name__}: {error})"
    outside = [
        name
        for name in record.files
        if not is_plain_path(name) or not name.startswith(tuple(f"{folder}/" for folder in ours))
    ]
    outside += [name for name in record.folders if not is_plain_path(name)]
    return (None, f"it names {outside[0]}, which is none of ours") if outside else (record, None)


def without_prefix(target: str) -> str:
    """The target of a link without the prefix that Windows puts before it: the link was made without."""
    if target.startswith("\\\\?\\UNC\\"):
        return "\\\\" + target[8:]
    return target.removeprefix("\\\\?\\")


def write_record(path: Path, record: Record) -> None:
    """Write a record by one rename."""
    said: dict[str, Any] = asdict(record) | {"schema": SCHEMA, "folders": sorted(record.folders)}
    said["files"] = {
        name: {key: value for key, value in asdict(entry).items() if value}
        for name, entry in sorted(record.files.items())
    }
    text = json.dumps(said | {"seal": hashlib.sha256(canonical(said)).hexdigest()}, indent=1) + "\n"
    temporary = _beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def set_aside(path: Path) -> Path:
    """A copy of a file under a name that is free; returns it."""
    backup = next(
        place
        for number in range(1, 10_000)
        if not os.path.lexists(place := path.with_name(f"{path.name}.broken-{number}"))
    )
    shutil.copyfile(path, backup)
    return backup


def copy_beside(source: Path, entry: Entry, target: Path) -> Path:
    """A copy of `source` beside `target`, to be renamed into its place.

    Raises:
        ArtifactError: the source is not `entry` any more.
    """
    temporary, digest = _beside(target), hashlib.sha256()
    try:
        with temporary.open("wb") as written, source.open("rb") as read:
            while chunk := read.read(_CHUNK):
                digest.update(chunk)
                written.write(chunk)
        if digest.hexdigest() != entry.sha256:
            raise ArtifactError("has changed while it was copied", where=source, hint="run the same command again")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def remove(root: Path, entries: Mapping[str, Entry]) -> tuple[list[str], dict[str, str]]:
    """Delete what is still what was written, and what Python has made of it; returns those paths, and those that were
    kept with the reason.
    """
    removed, kept = [], {}
    for name, entry in entries.items():
        path = root / name
        if entry.is_at(path):
            path.unlink()
            removed.append(name)
            if path.suffix == ".py":
                _forget_compiled(path)
        elif os.path.lexists(path):
            kept[name] = "was changed since it was installed"
    return removed, kept


def _forget_compiled(source: Path) -> None:
    cache = source.parent / "__pycache__"
    for compiled in cache.iterdir() if cache.is_dir() else ():
        if re.fullmatch(rf"{re.escape(source.stem)}\.[\w.-]+\.pyc", compiled.name):
            compiled.unlink(missing_ok=True)
    with suppress(OSError):  # not there, or something else is in it
        cache.rmdir()


def make_folders(root: Path, folder: str) -> list[str]:
    """Make a folder in `root`; returns those that were not there, outermost first."""
    made = [
        str(place)
        for place in [*reversed(PurePosixPath(folder).parents), PurePosixPath(folder)]
        if not (root / place).exists()
    ]
    for place in made:
        (root / place).mkdir()
    return made


def prune_folders(root: Path, folders: Iterable[str]) -> tuple[str, ...]:
    """Remove those of our folders that are empty; returns the others."""
    left = []
    for folder in sorted(set(folders), key=lambda name: -len(PurePosixPath(name).parts)):
        try:
            (root / folder).rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # not empty, or no folder any more
            left.append(folder)
    return tuple(sorted(left))


def leftovers(root: Path, folders: Iterable[str]) -> list[str]:
    """Copies that an install which was killed has left."""
    return sorted(
        path.relative_to(root).as_posix()
        for folder in folders
        if (root / folder).is_dir()
        for path in (root / folder).rglob(f".*{PARTIAL}")
    )


def _beside(target: Path) -> Path:
    """A new, empty file beside `target`, with the mode of any other."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent)
    os.close(handle)
    Path(name).chmod(0o644)
    return Path(name)
