"""Check what is installed in a host."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcompress_engines.engine_files import find_manifest_folder, folder_faults
from sdcompress_engines.errors import SdCompressError
from sdcompress_engines.few_steps import read_exported_few_steps
from sdcompress_engines.flavour import obstacle
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, read_manifest
from sdcompress_engines.runners.onnxruntime_install import missing as onnxruntime_missing
from sdcompress_engines.trust import find_unallowed, trust_command

from sdcompress.hosts.engine_folder import engine_names
from sdcompress.hosts.environment import read_packages
from sdcompress.hosts.files import find_leftovers
from sdcompress.hosts.host import Host
from sdcompress.hosts.record import Record, read_host_record


@dataclass(frozen=True)
class EngineStatus:
    """An engine in a host's model folder.

    Attributes:
        name: of its folder.
        path: of the folder with the manifest.
        is_recorded: whether a record lists it, so that sdcompress has installed it.
        facts: runtime, precision, signature, size in bytes and more, for display. `sampling` is what to choose in the
            host for a few-step model, or None.
        fault: what is wrong with its files, or None.
        why_not: why it does not load on this machine, or None.
    """

    name: str
    path: Path
    is_recorded: bool
    facts: Mapping[str, Any]
    fault: str | None
    why_not: str | None


@dataclass(frozen=True)
class Status:
    """What is installed in a host.

    Attributes:
        host: the program.
        root: its folder.
        record: None if nothing is installed. Its `version` is the plugin's.
        broken: what is wrong with the record, or None.
        changed: path → what happened to an installed file.
        engines: all engines in the model folder.
        leftovers: partial copies of an interrupted install.
        packages: what an engine needs from the host's own Python, package → version. None if it was not found.
    """

    host: Host
    root: Path
    record: Record | None
    broken: str | None
    changed: Mapping[str, str]
    engines: tuple[EngineStatus, ...]
    leftovers: tuple[str, ...]
    packages: Mapping[str, str] | None


def read_status(host: Host, root: Path) -> Status:
    """Returns what is installed in the host's folder, whether it is intact, and which engines load on this machine.

    It reads every byte of what is installed and writes nothing.
    """
    record, broken = read_host_record(host, root)
    installed, place = engine_names(host, record), root / host.models
    folders = (
        sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
        if place.is_dir()
        else []
    )
    return Status(
        host=host,
        root=root,
        record=record,
        broken=broken,
        changed=_find_changes(host, root, record or Record()),
        engines=tuple(_read_engine_status(host, folder, folder.name in installed) for folder in folders),
        leftovers=tuple(find_leftovers(host, root)),
        packages=read_packages(root),
    )


def _find_changes(host: Host, root: Path, record: Record) -> dict[str, str]:
    behind = {path: link for path in record.files if (link := host.find_link_above(root, path)) is not None}
    changed = {path: f"lies behind the link {link}" for path, link in behind.items()} | {
        path: "was changed since it was installed" if os.path.lexists(root / path) else "is missing"
        for path, entry in record.files.items()
        if path not in behind and not entry.is_at(root / path)
    }
    return changed | {
        path: f"is a link to {entry.link}, which is not there"
        for path, entry in record.files.items()
        if entry.link and path not in changed and not (root / path).exists()
    }


def _read_engine_status(host: Host, place: Path, is_recorded: bool) -> EngineStatus:
    name, folder = place.name, place
    try:
        folder = find_manifest_folder(place) or place
        manifest = read_manifest(folder)
        if manifest is None:
            return EngineStatus(name, folder, is_recorded, {}, f"has no {MANIFEST_NAME}", None)
        fault = "; ".join(folder_faults(folder, manifest.kind)) or None
        facts = _read_facts(manifest) | {"sampling": None if fault else _read_sampling(host, folder, manifest)}
        return EngineStatus(name, folder, is_recorded, facts, fault, _find_obstacle(manifest, folder))
    except SdCompressError as error:
        return EngineStatus(name, folder, is_recorded, {}, error.what, None)
    except OSError as error:
        return EngineStatus(name, folder, is_recorded, {}, f"cannot be read ({error.strerror or error})", None)


def _read_facts(manifest: Manifest) -> dict[str, Any]:
    config = manifest.config
    facts = {
        name: config.get(name) for name in ("model_name", "precision", "signature", "compute_capabilities", "platform")
    }
    is_engine = manifest.kind == "engine"
    return facts | {
        "runtime": f"{config.get('flavour')} {config.get('version')}" if is_engine else "onnxruntime",
        "created": manifest.created,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
    }


def _read_sampling(host: Host, folder: Path, manifest: Manifest) -> str | None:
    sampling = read_exported_few_steps(folder, manifest)
    return None if sampling is None else sampling.describe(host.name)


def _find_obstacle(manifest: Manifest, folder: Path) -> str | None:
    if manifest.kind == "engine":
        if (error := obstacle(manifest.config, folder)) is not None:
            return error.what
        if find_unallowed(manifest):
            return f"it was built elsewhere and is not allowed to run ({trust_command(folder)})"
        return None
    return onnxruntime_missing() if manifest.kind == "onnx" else None
