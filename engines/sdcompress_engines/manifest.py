"""Artifacts on disk: a folder with a `sdcompress.json` that says what it is, written beside its place and renamed into
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from .errors import ArtifactError, StorageError, storage_errors

MANIFEST_NAME = "sdcompress.json"
SCHEMA_VERSION = 1
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
    """What an artifact folder is and what it was made from.

    Attributes:
        kind: `student`, `onnx`, `engine`, `results`, ...
        files: relative path, with `/` on every system → `FileEntry`, every file but the manifest itself.
        inputs: name of an input artifact → its sha256.
        config: the full configuration of the stage that made it.
        figures: what the stage measured (parity, losses, seconds).
        versions: package → version at the time.
        seal: sha256 of all the rest in canonical JSON, so that an edit shows; empty in manifests of before there was
            one.
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
    """JSON of a value, the same bytes whatever the order of its keys, and for a tuple as for a list."""
    plain = json.loads(json.dumps(value))  # keys that are numbers become text before they are sorted
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_tree(folder: Path) -> str:
    """One hash for a folder: over the sorted (relative path, sha256) of its files, manifests left out."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return sorted(found, key=by_parts)


def by_parts(path: PurePath) -> tuple[str, ...]:
    """The sort key of a path that is the same on every system: Windows would compare paths without regard to case."""
    return path.parts


def is_plain_path(name: str) -> bool:
    """Whether a name, as a manifest has it, stays in its folder on Linux and Windows: relative, with `/`, no `..` and
    no drive.
    """
    return not re.search(r"[\\:\x00]", name) and all(part not in ("", ".", "..") for part in name.split("/"))


def installed_versions() -> dict[str, str]:
    """The versions of the packages that shape an artifact, those that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(
    folder: Path,
    kind: str,
    *,
    config: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    figures: Mapping[str, Any] | None = None,
    seed: int | None = None,
    hashed: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Hash every file of `folder`, but those `hashed` already, and write its manifest; returns it."""
    known = hashed or {}
    manifest = Manifest(
        kind=kind,
        files={
            name: known.get(name) or FileEntry(sha256_file(p), p.stat().st_size)
            for p in _files(folder)
            for name in [p.relative_to(folder).as_posix()]
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
    """Seal a manifest and write it into `folder` as it is; returns it sealed."""
    manifest = replace(manifest, seal=_seal(asdict(manifest)))
    (folder / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    return manifest


def _seal(raw: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({name: value for name, value in raw.items() if name != "seal"})).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None where it has none.

    Raises:
        ArtifactError: the file is there but is not a manifest this version reads, or it was edited.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA_VERSION:
            raise ArtifactError(
                f"manifest schema {raw['schema']}",
                where=path,
                expected=f"schema {SCHEMA_VERSION}",
                hint="make this artifact again with the installed version",
            )
        seal = raw.get("seal", "")
        if seal and seal != _seal(raw):
            raise ArtifactError(
                "this manifest was edited: its seal does not match what it says",
                where=path,
                hint="put the file back as it was, or delete the folder and make it again",
            )
        if not seal and raw["kind"] == "engine":
            raise ArtifactError(
                "this engine's manifest has no seal: it was edited, or made by an older version",
                where=path,
                hint="delete the folder and build it again: sdcompress export MODEL --trt -o DIR",
            )
        raw["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
        manifest = Manifest(**raw)
        if wrong := [
            name
            for name in ("inputs", "config", "figures", "versions")
            if not isinstance(getattr(manifest, name), dict)
        ]:
            raise ValueError(f"{wrong[0]} is no mapping")
        if wrong := [
            name
            for name, entry in manifest.files.items()
            if not isinstance(entry.sha256, str) or not isinstance(entry.bytes, int)
        ]:
            raise ValueError(f"no sha256 and size of {wrong[0]}")
        if wrong := [name for name in manifest.files if not is_plain_path(name)]:
            raise ValueError(f"{wrong[0]!r} is no path in its folder")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"broken manifest ({error})", where=path, hint="delete the folder and make it again"
        ) from error


def faults(folder: Path, kind: str | None = None, *, contents: bool = True) -> list[str]:
    """What is wrong with an artifact folder: missing, cut or altered files; empty where it is whole.

    Without `contents` the files' sizes are checked and their bytes are not read.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder / MANIFEST_NAME} is missing"]
    found = [] if kind in (None, manifest.kind) else [f"is a {manifest.kind}, not a {kind}"]
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry.bytes:
            found.append(f"{name} has {path.stat().st_size} bytes, not {entry.bytes}")
        elif contents and sha256_file(path) != entry.sha256:
            found.append(f"{name} is not what the manifest says (sha256 differs)")
    return found


def check_free(target: Path, force: bool = False) -> None:
    """Refuse an output folder that holds something already, unless `force`.

    Raises:
        ArtifactError: `target` is a file, or a folder that is not empty.
    """
    if target.is_file():
        raise ArtifactError("is a file", where=target, expected="a folder to write to", hint="choose another -o")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ArtifactError(
            "exists and is not empty", where=target, hint="add --force to replace it, or choose another -o"
        )


@contextmanager
def staged(target: Path, force: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that becomes `target` when the block ends well and vanishes when it does not.

    With `force` an existing `target` is replaced, and only once the new one is complete.

    Raises:
        ArtifactError: `target` is in the way. StorageError: no space, no permission.
    """
    target = target.absolute()
    check_free(target, force)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        with storage_errors(target):
            temporary.chmod(0o755)
            yield temporary
            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
                os.replace(target, old / "was")
                os.replace(temporary, target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """Where derived files are kept: `$SDCOMPRESS_CACHE`, else `~/.cache/sdcompress`."""
    return Path(os.environ.get("SDCOMPRESS_CACHE") or Path("~/.cache/sdcompress").expanduser())


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse to start a write the disk has no room for.

    Raises:
        StorageError: fewer than `needed_bytes` are free where `folder` will be.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise StorageError(
            f"{what} needs {needed_bytes / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free",
            where=place,
            hint="free some space or choose another -o",
        )
