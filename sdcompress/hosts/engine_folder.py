"""An engine folder as a host takes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdcompress_engines.errors import (
    ArtifactError,
    EngineMismatch,
    UsageError,
)
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, faults, read_manifest
from sdcompress_engines.store import engine_faults

from sdcompress.hosts.host import Host
from sdcompress.hosts.record import (
    Entry,
    Record,
)

WEIGHTS = "student.safetensors"
"""The model itself beside its engine: what a plugin runs in torch where the engine cannot serve."""


@dataclass(frozen=True)
class Engine:
    """An engine folder to install.

    Attributes:
        files: path in the folder → `Entry`; the manifest too.
    """

    name: str
    folder: Path
    manifest: Manifest
    files: Mapping[str, Entry]


def engines_of(host: Host, record: Record | None) -> list[str]:
    """Names of the engines in a record."""
    return sorted({name for path in (record.files if record else ()) if (name := engine_of(host, path)) is not None})


def engine_of(host: Host, path: str) -> str | None:
    """The name of the engine that a recorded path belongs to, or None for the plugin's."""
    return path.removeprefix(f"{host.models}/").split("/")[0] if path.startswith(f"{host.models}/") else None


def read_engine_folder(path: str | Path, host: Host, name: str | None = None) -> Engine:
    """An engine folder that this host's plugin can call, every byte held against its manifest.

    Raises:
        UsageError: no such folder, or a name that is none for a folder. ArtifactError: no engine, or a damaged one.
            EngineMismatch: another signature.
    """
    given = Path(path).expanduser().absolute()
    build = f"sdcompress export MODEL --trt --signature {host.signatures[0]} -o DIR"
    if not given.is_dir():
        raise UsageError("no such folder", where=given, expected="one that `sdcompress export` has written", hint=build)
    folder = _held(given)
    made = read_manifest(folder)
    if made is None or made.kind not in ("engine", "onnx"):
        raise ArtifactError(
            "holds no engine" if made is None else f"is a {made.kind}, not an engine", where=folder, hint=build
        )
    signature, components = made.config.get("signature"), made.config.get("components")
    if signature not in host.signatures or components != ["unet"]:
        told = (
            f"the components {', '.join(map(str, components or []))}"
            if components != ["unet"] and signature in host.signatures
            else f"the signature {signature}"
        )
        raise EngineMismatch(
            f"has {told}, which {host.title} does not call",
            where=folder,
            expected=f"a UNet with the signature {' or '.join(host.signatures)}",
            hint=build,
        )
    if found := engine_faults(folder) if made.kind == "engine" else faults(folder):
        raise ArtifactError(f"is damaged: {'; '.join(found[:3])}", where=folder, hint=f"build it again: {build}")
    chosen = name or str(
        made.config.get("model_name") or (given.parent.name if given.name in ("engine", "onnx") else given.name)
    )
    if not re.fullmatch(r'[^<>:"/\\|?*\x00-\x1f]{1,100}', chosen) or chosen[0] in ". " or chosen[-1] in ". ":
        raise UsageError(f"{chosen!r} is no name for a folder", hint="--name NAME")
    files = {path: Entry(entry.sha256, entry.bytes) for path, entry in made.files.items()} | {
        MANIFEST_NAME: Entry.of(folder / MANIFEST_NAME)
    }
    return Engine(chosen, folder, made, files)


def _held(folder: Path) -> Path:
    """Where the manifest is, in a folder as `export` or `export --trt` writes it."""
    return next(
        (place for place in (folder, folder / "engine", folder / "onnx") if (place / MANIFEST_NAME).is_file()), folder
    )
