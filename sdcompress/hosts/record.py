"""The record of what was installed into a host's folder: a sealed JSON file that lists each file by its sha256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sdcompress_engines.errors import ArtifactError, shorten
from sdcompress_engines.files import check_regular, replace_file, sync, write_atomically
from sdcompress_engines.json_files import read_json_object
from sdcompress_engines.manifest import canonical
from sdcompress_engines.paths import file_inside, is_link, is_plain_path

from sdcompress.hosts.entry import Entry
from sdcompress.hosts.files import create_partial
from sdcompress.hosts.host import Host

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """What was installed into a host's folder.

    Attributes:
        files: path in the host's folder, with `/` → `Entry`.
        folders: the folders that installs have created.
        version: of the sdcompress that the plugin comes from.
        created: when the record was written, in ISO 8601.
    """

    files: Mapping[str, Entry] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    version: str = ""
    created: str = ""


def read_host_record(host: Host, root: Path) -> tuple[Record | None, str | None]:
    """Returns the record in the host's folder, and what is wrong with it, as `read_record` does."""
    path = root / host.record
    if is_link(path) or (link := host.find_link_above(root, host.record)) is not None:
        return None, f"it lies behind the link {path if is_link(path) else link}"
    return read_record(path, host.folders)


def read_record(path: Path, allowed: tuple[str, ...]) -> tuple[Record | None, str | None]:
    """Returns the record, or None if there is none, and the reason why it cannot be trusted, or None.

    Args:
        path: the record's file.
        allowed: the folders that it may list files in. A record that lists any other file is refused.
    """
    try:
        raw = read_json_object(path)
    except FileNotFoundError:
        return None, None
    except (OSError, ArtifactError) as error:
        return None, f"it cannot be read: {shorten(error.what if isinstance(error, ArtifactError) else error)}"
    try:
        seal = raw.pop("seal")
        if raw["schema"] != SCHEMA:
            return None, f"it has schema {shorten(raw['schema'], 60)}, not {SCHEMA}"
        if seal != hashlib.sha256(canonical(raw)).hexdigest():
            return None, "it was edited: its seal does not match its content"
        record = _parse_record(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"it does not list what was installed ({type(error).__name__}: {shorten(error, 120)})"
    inside = tuple(f"{folder}/" for folder in allowed)
    above = {str(parent) for folder in allowed for parent in PurePosixPath(folder).parents}
    outside = [name for name in record.files if not is_plain_path(name) or not name.startswith(inside)]
    outside += [
        name
        for name in record.folders
        if not is_plain_path(name) or not (name in above or f"{name}/".startswith(inside))
    ]
    if outside:
        return None, f"it names {shorten(repr(outside[0]), 120)}, which sdcompress does not install"
    return record, None


def _parse_record(raw: Mapping[str, Any]) -> Record:
    """Returns the record in a JSON object.

    Raises:
        ValueError: an entry is missing or of another kind. KeyError, TypeError, AttributeError: as ValueError.
    """
    record = Record(
        {name: Entry(**entry) for name, entry in raw["files"].items()},
        tuple(raw["folders"]),
        raw["version"],
        raw["created"],
    )
    texts = [record.version, record.created, *record.folders]
    texts += [text for entry in record.files.values() for text in (entry.sha256, entry.link)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("an entry is no text")
    if not all(type(entry.bytes) is int for entry in record.files.values()):
        raise ValueError("a size is no number")
    return record


def write_record(path: Path, record: Record) -> None:
    """Write a record by one rename."""
    content: dict[str, Any] = asdict(record) | {"schema": SCHEMA, "folders": sorted(record.folders)}
    content["files"] = {
        name: {key: value for key, value in asdict(entry).items() if value}
        for name, entry in sorted(record.files.items())
    }
    text = json.dumps(content | {"seal": hashlib.sha256(canonical(content)).hexdigest()}, indent=1) + "\n"
    partial = create_partial(path)  # by a name that a later uninstall finds
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        replace_file(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def back_up_record(path: Path) -> Path:
    """Copy a broken record to an unused name beside it, and return the copy's path.

    Raises:
        ArtifactError: it is a link, or no regular file.
    """
    check_regular(file_inside(path.parent, path.name, source=path))
    backup = next(
        place
        for number in range(1, 10_000)
        if not os.path.lexists(place := path.with_name(f"{path.name}.broken-{number}"))
    )
    write_atomically(backup, path.read_bytes())
    return backup
