"""The check of an export folder, before anything of it is opened: graphs or engines, and configs in `pipeline/`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import ArtifactError, shorten
from .files import check_regular
from .graph import AGAIN
from .json_files import read_json_object
from .manifest import MANIFEST_NAME, Manifest, cache_folder, find_file_fault, read_manifest
from .paths import file_inside
from .trust import CODE_SUFFIXES
from .verified import sha256_once

_NOT_OURS = re.compile(r"(README|LICENSE|NOTICE)(\.(md|txt))?")
"""Files at the top of a folder that people and hubs add, and that nothing opens."""


def check_export(folder: Path, kinds: Collection[str], *, unnamed: bool = False) -> Manifest:
    """Returns the manifest of an export folder in which every file is as the manifest says.

    Hidden files are not looked at, because nothing opens them. Of engines and packages only the size is compared: their
    runners check the bytes that they open.

    Args:
        folder: that holds the manifest.
        kinds: that the manifest may be of, such as `onnx`.
        unnamed: accept ordinary files that the manifest does not name, as where a host keeps weights beside an engine.

    Raises:
        ArtifactError: no manifest, an edited one, or one of another kind; a file that is missing, altered, not in the
            manifest, a link, or no regular file.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError(
            f"has no {MANIFEST_NAME}, so it is unknown what its files are", where=folder, hint=_hint(folder)
        )
    if manifest.kind not in kinds:
        raise ArtifactError(
            f"is of kind {shorten(repr(manifest.kind), 40)}",
            where=folder,
            expected=f"a folder of kind {' or '.join(kinds)}",
            hint=_hint(folder),
        )
    check_names(folder, manifest, unnamed=unnamed)
    paths = {name: file_inside(folder, name, source=folder / MANIFEST_NAME) for name in manifest.files}
    data = {name: path for name, path in paths.items() if not name.endswith(CODE_SUFFIXES)}
    found = _find_faults(paths, manifest, None) or _find_faults(data, manifest, sha256_once)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ArtifactError(f"is damaged: {'; '.join(found[:3])}{more}", where=folder, hint=_hint(folder))
    return manifest


def check_names(folder: Path, manifest: Manifest, *, unnamed: bool = False) -> None:
    """Check what lies in an export folder, without a look into the files.

    Args:
        folder, unnamed: see `check_export`.
        manifest: of the folder.

    Raises:
        ArtifactError: a file is not in the manifest, a link, or no regular file.
    """
    for name in _files(folder):
        if name not in manifest.files and not unnamed:
            raise ArtifactError(
                f"holds {shorten(name, 120)}, which its {MANIFEST_NAME} does not name",
                where=folder,
                hint=f"move that file away, or {_hint(folder)}",
            )


def read_named_json(folder: Path, manifest: Manifest, name: str) -> dict[str, Any] | None:
    """Returns the JSON object in a file of an artifact, checked against the manifest; None where it names no such file.

    Args:
        folder: that holds the manifest.
        manifest: read from there.
        name: of the file, relative, with `/`.

    Raises:
        ArtifactError: the file is missing, altered, a link, or no JSON object.
    """
    entry = manifest.files.get(name)
    if entry is None:
        return None
    path = file_inside(folder, name, source=folder / MANIFEST_NAME)
    if fault := find_file_fault(path, entry, sha256_once):
        raise ArtifactError(f"{name} {fault}", where=folder, hint=_hint(folder))
    return read_json_object(path)


def _find_faults(paths: Mapping[str, Path], manifest: Manifest, digest: Callable[[Path], str] | None) -> list[str]:
    faults = {name: find_file_fault(path, manifest.files[name], digest) for name, path in paths.items()}
    return [f"{name} {fault}" for name, fault in faults.items() if fault is not None]


def _files(folder: Path) -> Iterator[str]:
    """Yields the names of all files that are not hidden, with `/`, in order.

    Raises:
        ArtifactError: one is a link or no regular file.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted([*files, *folders]):
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            if name.startswith(".") or relative == MANIFEST_NAME:
                continue
            file_inside(folder, relative, source=folder)
            if name in folders and path.is_dir():
                continue
            check_regular(path)
            if not _NOT_OURS.fullmatch(relative):
                yield relative


def _hint(folder: Path) -> str:
    """Returns what to do about a folder that is not as it was written."""
    in_cache = cache_folder().absolute() in folder.absolute().parents
    return "delete this folder; the next run makes it again" if in_cache else AGAIN
