"""Engine files and the manifest beside them, in the store and in an export: reading one, and finding its faults."""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path

from .engine_key import EngineKey
from .errors import ArtifactError, UsageError
from .files import check_regular
from .flavour import REBUILD
from .manifest import MANIFEST_NAME, Manifest, faults, read_manifest
from .paths import file_inside, is_link

SUFFIX = ".engine"


def read_engine(path: str | PathLike[str]) -> tuple[bytes, Manifest]:
    """Returns an engine file's bytes, checked against the manifest of its folder, and that manifest.

    Raises:
        UsageError: no such file. ArtifactError: no manifest beside it, an edited one, or a file that is cut, altered or
            a link.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError("no such file", where=path, hint="make it with: sdcompress export MODEL --trt -o DIR")
    check_regular(path)
    manifest = read_manifest(path.parent)
    if manifest is None:
        raise ArtifactError(
            f"the engine has no {MANIFEST_NAME} beside it, so it is unknown what it was built for",
            where=path,
            hint=f"keep both files together, or {REBUILD}",
        )
    entry = manifest.files.get(path.name)
    if manifest.kind != "engine" or entry is None:
        fault = "does not name this file" if entry is None else "is not the manifest of an engine"
        raise ArtifactError(
            f"the {MANIFEST_NAME} beside it is of kind {manifest.kind!r} and {fault}", where=path, hint=REBUILD
        )
    try:
        data = file_inside(path.parent, path.name, source=path.parent / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"the engine cannot be read ({error.strerror or error})", where=path, hint=REBUILD
        ) from error
    if len(data) != entry.bytes:
        what = "is truncated" if len(data) < entry.bytes else "is longer than it was built"
        raise ArtifactError(
            f"the engine {what}: it has {len(data):,} bytes",
            where=path,
            expected=f"{entry.bytes:,} bytes",
            hint=REBUILD,
        )
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ArtifactError(
            "the engine was altered: its sha256 is not the one of its manifest",
            where=path,
            expected=f"{entry.sha256[:12]}...",
            hint=REBUILD,
        )
    return data, manifest


def find_manifest_folder(folder: Path) -> Path | None:
    """Returns the folder with the manifest: `folder`, or its `engine` or `onnx` folder; None if no manifest exists.

    `folder` may be a link, as `sdcompress install --link` makes one, and the folders in it may not.
    """
    places = (folder, *(folder / name for name in ("engine", "onnx") if not is_link(folder / name)))
    return next((place for place in places if (place / MANIFEST_NAME).is_file()), None)


def folder_faults(folder: Path, kind: str, *, contents: bool = True) -> list[str]:
    """Returns what is wrong with an artifact folder; nothing where it is whole.

    Args:
        folder: the folder that holds the manifest.
        kind: of its manifest; of an `engine` the keys are checked, too.
        contents: read the files' bytes; without it only their sizes are checked.

    Raises:
        ArtifactError: the manifest cannot be read, or was edited.
    """
    return engine_faults(folder, contents=contents) if kind == "engine" else faults(folder, contents=contents)


def engine_faults(folder: Path, *, contents: bool = True) -> list[str]:
    """Returns what is wrong with the files, manifest and keys of an engine folder; nothing where it is whole.

    Args:
        folder: an entry of the store, or the engine folder of an export.
        contents: read the files' bytes; without it only their sizes are checked.

    Raises:
        ArtifactError: its manifest cannot be read, was edited, or does not say what the engines are.
    """
    found = faults(folder, "engine", contents=contents)
    manifest = read_manifest(folder)
    if manifest is None or manifest.kind != "engine":
        return found
    components, keys = manifest.config.get("components"), manifest.config.get("keys")
    if not isinstance(components, list) or not components or not isinstance(keys, dict):
        return [*found, "the manifest does not say which engines these are"]
    for component in components:
        if f"{component}{SUFFIX}" not in manifest.files:
            found.append(f"the manifest names no {component}{SUFFIX}")
        if (key := EngineKey.of(manifest.config, component).digest) != keys.get(component):
            found.append(f"the key of {component} is {key}, and the manifest says {keys.get(component)}")
    return found
