"""An engine folder, as `sdcompress export` writes it and as a host takes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdcompress_engines.engine_files import find_manifest_folder, folder_faults
from sdcompress_engines.errors import ArtifactError, EngineMismatch, UsageError, shorten
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, read_manifest
from sdcompress_engines.paths import expand_user, is_plain_path

from sdcompress.hosts.entry import Entry
from sdcompress.hosts.host import Host
from sdcompress.hosts.record import Record

_FOLDER_NAME = re.compile(r'[^<>:"/\\|?*\x00-\x1f]{1,100}')
"""A folder name that Linux and Windows accept, together with `is_plain_path`."""
_FILES = re.compile(
    r"unet\.engine|unet\.onnx([._]data)?|unet\.(engine|onnx)\.safetensors|pipeline/(.+/)?[^/]+\.(json|txt)"
)
"""The files that an engine folder consists of: graph, weights, configs and tokenizers; nothing that a host executes."""


@dataclass(frozen=True)
class Engine:
    """An engine folder to install.

    Attributes:
        name: the engine's name in the host.
        folder: the folder that holds the manifest, all links resolved: a link of a host may lead to it.
        manifest: read from there.
        files: path in the folder → `Entry`, the manifest included.
    """

    name: str
    folder: Path
    manifest: Manifest
    files: Mapping[str, Entry]


def engine_names(host: Host, record: Record | None) -> list[str]:
    """Returns the names of the engines in a record."""
    return sorted({name for path in (record.files if record else ()) if (name := engine_of(host, path)) is not None})


def engine_of(host: Host, path: str) -> str | None:
    """Returns the name of the engine that a recorded path belongs to, or None for a file of the plugin."""
    return path.removeprefix(f"{host.models}/").split("/")[0] if path.startswith(f"{host.models}/") else None


def read_engine_folder(path: str | Path, host: Host, name: str | None = None) -> Engine:
    """Returns the engine in a folder, after checking every byte against the manifest.

    Args:
        path: what `sdcompress export` has written. The manifest may lie in it or in its `engine` or `onnx` folder.
        host: the program whose plugin will call the engine.
        name: of the engine in the host, by default its model's name or the folder's.

    Raises:
        UsageError: the path is a file, or nothing is there, or the name is not valid for a folder.
        ArtifactError: the folder holds no engine, or a damaged one.
        EngineMismatch: the engine has a signature that the host does not call.
    """
    given = expand_user(path).absolute()
    build = f"sdcompress export MODEL --trt --signature {host.signatures[0]} -o DIR"
    if given.is_file():
        raise UsageError(
            "is a file", where=given, expected="the folder of an engine", hint=f"its folder, {given.parent}"
        )
    if not given.is_dir():
        raise UsageError("no such folder", where=given, expected="one that `sdcompress export` has written", hint=build)
    folder = (find_manifest_folder(given) or given).resolve()
    manifest = read_manifest(folder)
    if manifest is None or manifest.kind not in ("engine", "onnx"):
        what = "holds no engine" if manifest is None else f"is a {manifest.kind}, not an engine"
        raise ArtifactError(what, where=folder, hint=build)
    _check_signature(manifest, host, folder, build)
    if damage := folder_faults(folder, manifest.kind):
        raise ArtifactError(f"is damaged: {'; '.join(damage[:3])}", where=folder, hint=f"build it again: {build}")
    folder_name = given.parent.name if given.name in ("engine", "onnx") else given.name
    chosen = name or str(manifest.config.get("model_name") or folder_name)
    if not (_FOLDER_NAME.fullmatch(chosen) and is_plain_path(chosen)) or chosen[0] in ". ":
        raise UsageError(f"{shorten(repr(chosen), 120)} is not a valid name for a folder", hint="--name NAME")
    _check_files(manifest, folder)
    files = {path: Entry(entry.sha256, entry.bytes) for path, entry in manifest.files.items()}
    return Engine(chosen, folder, manifest, files | {MANIFEST_NAME: Entry.of(folder / MANIFEST_NAME)})


def _check_files(manifest: Manifest, folder: Path) -> None:
    """Refuse an engine folder with other files than `export` writes, such as scripts.

    Raises:
        ArtifactError: it has such a file, or two that are one on a file system without upper and lower case.
    """
    strange = [name for name in manifest.files if not _FILES.fullmatch(name)]
    if strange:
        raise ArtifactError(
            f"names the file {shorten(repr(strange[0]), 120)}, which no engine consists of",
            where=folder / MANIFEST_NAME,
            expected="unet.engine or unet.onnx, its weights, and the configs and tokenizers in pipeline/",
        )
    if len({name.lower() for name in manifest.files}) < len(manifest.files):
        raise ArtifactError("names two files that differ only in upper and lower case", where=folder / MANIFEST_NAME)


def _check_signature(manifest: Manifest, host: Host, folder: Path, build: str) -> None:
    signature, components = manifest.config.get("signature"), manifest.config.get("components")
    if signature in host.signatures and components == ["unet"]:
        return
    what = (
        f"the components {', '.join(map(str, components)) if isinstance(components, list) else components}"
        if signature in host.signatures
        else f"the signature {signature}"
    )
    raise EngineMismatch(
        f"has {shorten(what, 200)}, which {host.title} does not call",
        where=folder,
        expected=f"a UNet with the signature {' or '.join(host.signatures)}",
        hint=build,
    )
