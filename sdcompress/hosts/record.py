"""The record of what was installed into a host's folder: a sealed JSON file that lists each file by its sha256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdcompress_engines.files import replace_file, sync, write_atomically
from sdcompress_engines.manifest import canonical
from sdcompress_engines.paths import is_plain_path

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
    return read_record(root / host.record, host.folders)


def read_record(path: Path, allowed: tuple[str, ...]) -> tuple[Record | None, str | None]:
    """Returns the record, or None if there is none, and the reason why it cannot be trusted, or None.

    Args:
        path: the record's file.
        allowed: the folders that it may list files in. A record that lists any other file is refused.
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
            return None, "it was edited: its seal does not match its content"
        record = Record(
            {name: Entry(**entry) for name, entry in raw["files"].items()},
            tuple(raw["folders"]),
            raw["version"],
            raw["created"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return None, f"it does not list what was installed ({type(error).__name__}: {error})"
    inside = tuple(f"{folder}/" for folder in allowed)
    outside = [name for name in record.files if not is_plain_path(name) or not name.startswith(inside)]
    outside += [name for name in record.folders if not is_plain_path(name)]
    return (None, f"it names {outside[0]}, which sdcompress does not install") if outside else (record, None)


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
    """Copy a broken record to an unused name beside it, and return the copy's path."""
    backup = next(
        place
        for number in range(1, 10_000)
        if not os.path.lexists(place := path.with_name(f"{path.name}.broken-{number}"))
    )
    write_atomically(backup, path.read_bytes())
    return backup
