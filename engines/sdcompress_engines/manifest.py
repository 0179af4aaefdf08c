"""The manifest of an artifact folder, `sdcompress.json`: what its files are, and what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from .errors import ArtifactError, shorten
from .files import write_atomically
from .json_files import read_json_object
from .paths import expand_user, file_inside, is_link, is_plain_path

MANIFEST_NAME = "sdcompress.json"
SCHEMA_VERSION = 1
_MAKE_AGAIN = "delete the folder and make it again"
_LARGEST = 2**63
"""No file system has a file of so many bytes."""
_PACKAGES = (
    "sdcompress",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "polygraphy",
)


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: its sha256 and its size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What an artifact folder is, and what it was made from.

    Attributes:
        kind: `student`, `onnx`, `engine`, `results`, ...
        files: relative path, with `/` on every system → `FileEntry`; every file but the manifest itself.
        inputs: name of an input artifact → its sha256.
        config: the full configuration of the stage that wrote it.
        figures: what the stage measured (parity, losses, seconds).
        versions: package → version at the time.
        seed: of the stage's random numbers; None where it has none.
        created: time in UTC, ISO 8601.
        schema: version of the format.
        seal: sha256 of all other fields in canonical JSON, so that an edit is noticed; empty in manifests from before
            seals were written.
    """

    kind: str
    files: dict[str, FileEntry]
    inputs: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    created: str = ""
    schema: int = SCHEMA_VERSION
    seal: str = ""


def canonical(value: Any) -> bytes:
    """Returns JSON of a value: the same bytes for any order of keys, and for a tuple as for a list."""
    plain = json.loads(json.dumps(value))  # keys that are numbers become text before they are sorted
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def sha256_file(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_tree(folder: Path) -> str:
    """Returns one hash for a folder: over the sorted (relative path, sha256) of its files, without manifests."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return sorted(files, key=by_parts)


def by_parts(path: PurePath) -> tuple[str, ...]:
    """Returns a sort key of a path, the same on every system. Windows would compare paths without regard to case."""
    return path.parts


def installed_versions() -> dict[str, str]:
    """Returns the versions of the packages that affect an artifact, of those that are installed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_manifest(
    folder: Path,
    kind: str,
    *,
    config: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    figures: Mapping[str, Any] | None = None,
    seed: int | None = None,
    hashed: Mapping[str, FileEntry] | None = None,
    without: Collection[str] = (),
) -> Manifest:
    """Write the manifest of a folder. Returns it.

    Args:
        folder: the artifact; every file in it is hashed.
        kind: see `Manifest`, as `config`, `inputs`, `figures` and `seed`.
        hashed: entries of files whose hash is known already; those are not read.
        without: names of files that are no part of the artifact.
    """
    known = hashed or {}
    manifest = Manifest(
        kind=kind,
        files={
            name: known.get(name) or FileEntry(sha256_file(p), p.stat().st_size)
            for p in _files(folder)
            for name in [p.relative_to(folder).as_posix()]
            if name not in without
        },
        inputs=dict(inputs or {}),
        config=dict(config or {}),
        figures=dict(figures or {}),
        versions=installed_versions(),
        seed=seed,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    return save_manifest(folder, manifest)


def save_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Seal a manifest and write it into `folder`. Returns it with its seal."""
    manifest = seal_manifest(manifest)
    write_atomically(folder / MANIFEST_NAME, manifest_text(manifest))
    return manifest


def seal_manifest(manifest: Manifest) -> Manifest:
    """Returns the manifest with the seal of its content."""
    return replace(manifest, seal=_seal(asdict(manifest)))


def manifest_text(manifest: Manifest) -> str:
    """Returns the content of the manifest's file."""
    return json.dumps(asdict(manifest), indent=1) + "\n"


def _seal(raw: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({name: value for name, value in raw.items() if name != "seal"})).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """Returns the folder's manifest, or None where it has none.

    Raises:
        ArtifactError: the file is a link or no manifest that this version reads, or it was edited.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file() and not is_link(path):
        return None
    file_inside(folder, MANIFEST_NAME, source=folder)
    try:
        raw = read_json_object(path)
    except ArtifactError as error:
        raise ArtifactError(f"broken manifest: {error.what}", where=path, hint=_MAKE_AGAIN) from error
    try:
        _check_seal(raw, path)
        return _parse_manifest(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"broken manifest ({shorten(error)})", where=path, hint=_MAKE_AGAIN) from error


def _check_seal(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse a manifest of another schema, an edited one, and an engine's without a seal."""
    if raw["schema"] != SCHEMA_VERSION:
        raise ArtifactError(
            f"manifest schema {shorten(raw['schema'], 60)}",
            where=path,
            expected=f"schema {SCHEMA_VERSION}",
            hint="make this artifact again with the installed version",
        )
    seal = raw.get("seal", "")
    if seal and seal != _seal(raw):
        raise ArtifactError(
            "this manifest was edited: its seal does not match its content",
            where=path,
            hint="put the file back as it was, or delete the folder and make it again",
        )
    if not seal and raw["kind"] == "engine":
        raise ArtifactError(
            "this engine's manifest has no seal: it was edited, or written by an older version",
            where=path,
            hint="delete the folder and build it again: sdcompress export MODEL --trt -o DIR",
        )


def _parse_manifest(raw: Mapping[str, Any]) -> Manifest:
    """Returns the manifest in a JSON object.

    Raises:
        ValueError: a field is of another kind, or a file's name leads out of the folder. KeyError, TypeError,
            AttributeError: as ValueError.
    """
    manifest = Manifest(**{**raw, "files": {name: FileEntry(**entry) for name, entry in raw["files"].items()}})
    mappings = ("inputs", "config", "figures", "versions")
    if wrong := [name for name in mappings if not isinstance(getattr(manifest, name), dict)]:
        raise ValueError(f"{wrong[0]} is no mapping")
    if not isinstance(manifest.kind, str) or not isinstance(manifest.created, str):
        raise ValueError("the kind or the time is no text")
    if wrong := [name for name in ("inputs", "versions") if not _holds_texts(getattr(manifest, name))]:
        raise ValueError(f"{wrong[0]} holds more than texts")
    if wrong := [name for name in manifest.files if not is_plain_path(name)]:
        raise ValueError(f"{shorten(repr(wrong[0]), 120)} is no path in its folder")
    if wrong := [name for name, entry in manifest.files.items() if not _is_whole(entry)]:
        raise ValueError(f"no sha256 and size of {shorten(wrong[0], 120)}")
    return manifest


def _holds_texts(mapping: Mapping[str, Any]) -> bool:
    return all(isinstance(value, str) for value in mapping.values())


def _is_whole(entry: FileEntry) -> bool:
    return (
        isinstance(entry.sha256, str)
        and re.fullmatch("[0-9a-f]{64}", entry.sha256) is not None
        and type(entry.bytes) is int
        and 0 <= entry.bytes < _LARGEST
    )


def faults(folder: Path, kind: str | None = None, *, contents: bool = True) -> list[str]:
    """Returns what is wrong with an artifact folder: missing, cut or altered files, and links; nothing if it is whole.

    Args:
        folder: the artifact.
        kind: that it has to be; None is any.
        contents: read the files' bytes; without it only their sizes are checked.

    Raises:
        ArtifactError: the manifest cannot be read, or was edited.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder / MANIFEST_NAME} is missing"]
    found = [] if kind in (None, manifest.kind) else [f"is of kind {manifest.kind!r}, not {kind!r}"]
    for name, entry in manifest.files.items():
        try:
            path = file_inside(folder, name, source=folder / MANIFEST_NAME)
            fault = find_file_fault(path, entry, sha256_file if contents else None)
        except ArtifactError:
            fault = "is a link, or lies behind one"
        except OSError as error:
            fault = f"cannot be read ({error.strerror or error})"
        if fault is not None:
            found.append(f"{name} {fault}")
    return found


def find_file_fault(path: Path, entry: FileEntry, digest: Callable[[Path], str] | None) -> str | None:
    """Returns what is wrong with a file of an artifact, as the predicate of a sentence, or None.

    Args:
        path: of the file.
        entry: what the manifest says of it.
        digest: returns the sha256 of a file; None compares the sizes only.
    """
    if not path.is_file():
        return "is no regular file" if path.exists() else "is missing"
    if path.stat().st_size != entry.bytes:
        return f"has {path.stat().st_size} bytes, not {entry.bytes}"
    if digest is not None and digest(path) != entry.sha256:
        return "is not what the manifest says (sha256 differs)"
    return None


def cache_folder() -> Path:
    """Returns the folder for derived files: `$SDCOMPRESS_CACHE`, else `~/.cache/sdcompress`."""
    return expand_user(os.environ.get("SDCOMPRESS_CACHE") or "~/.cache/sdcompress")
