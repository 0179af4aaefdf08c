"""What is installed in a host, and whether it is whole and loads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import (
    SdCompressError,
)
from sdcompress_engines.flavour import obstacle
from sdcompress_engines.manifest import MANIFEST_NAME, faults, read_manifest
from sdcompress_engines.runners.onnxruntime import missing as onnxruntime_missing
from sdcompress_engines.store import engine_faults

from sdcompress.hosts.engine_folder import _held, engines_of
from sdcompress.hosts.find import host_packages
from sdcompress.hosts.host import Host
from sdcompress.hosts.record import (
    Record,
    leftovers,
)
from sdcompress.hosts.transaction import read


@dataclass(frozen=True)
class EngineStatus:
    """An engine in a host's model folder.

    Attributes:
        ours: whether an install has put it there. fault: what is wrong with its files. why_not: why it does not load on
            this machine.
    """

    name: str
    path: Path
    ours: bool
    facts: Mapping[str, Any]
    fault: str | None
    why_not: str | None


@dataclass(frozen=True)
class Status:
    """What is installed in a host.

    Attributes:
        record: None where nothing is; its `version` is the plugin's.
        broken: what is wrong with the record. changed: path → what happened to a file of ours. leftovers: of an install
            that was stopped.
        packages: of the host's own Python, those an engine needs; None where it was not found.
    """

    host: Host
    root: Path
    record: Record | None
    broken: str | None
    changed: Mapping[str, str]
    engines: tuple[EngineStatus, ...]
    leftovers: tuple[str, ...]
    packages: Mapping[str, str] | None


def status(host: Host, root: Path) -> Status:
    """What is installed in the host's folder, whether it is whole, and whether its engines load on this machine.

    Reads every byte of it, writes nothing.
    """
    record, broken = read(host, root)
    changed = {
        path: "was changed since" if os.path.lexists(root / path) else "is missing"
        for path, entry in (record or Record()).files.items()
        if not entry.is_at(root / path)
    }
    changed |= {
        path: f"is a link to {entry.link}, which is not there"
        for path, entry in (record or Record()).files.items()
        if entry.link and path not in changed and not (root / path).exists()
    }
    ours, place = engines_of(host, record), root / host.models
    folders = (
        sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
        if place.is_dir()
        else []
    )
    engines = tuple(_engine_status(folder.name, _held(folder), folder.name in ours) for folder in folders)
    return Status(
        host,
        root,
        record,
        broken,
        changed,
        engines,
        tuple(leftovers(root, (host.extension, host.models))),
        host_packages(root),
    )


def _engine_status(name: str, folder: Path, ours: bool) -> EngineStatus:
    try:
        made = read_manifest(folder)
        if made is None:
            return EngineStatus(name, folder, ours, {}, f"has no {MANIFEST_NAME}", None)
        found = engine_faults(folder) if made.kind == "engine" else faults(folder)
        config, size = made.config, sum(entry.bytes for entry in made.files.values())
        runtime = f"{config.get('flavour')} {config.get('version')}" if made.kind == "engine" else "onnxruntime"
        facts = {
            name: config.get(name)
            for name in ("model_name", "precision", "signature", "compute_capabilities", "platform")
        } | {"runtime": runtime, "created": made.created, "bytes": size}
        hindrance = obstacle(config, folder) if made.kind == "engine" else None
        why_not = hindrance.what if hindrance else onnxruntime_missing() if made.kind == "onnx" else None
        return EngineStatus(name, folder, ours, facts, "; ".join(found) or None, why_not)
    except SdCompressError as error:
        return EngineStatus(name, folder, ours, {}, error.what, None)
