"""The folder of a drawn data set while it is drawn: what a run finds in it, keeps and removes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ArtifactError, storage_errors
from sdcompress_engines.files import replace_file
from sdcompress_engines.manifest import Manifest, check_free, faults, read_manifest, sha256_file

KIND = "dataset"
"""Kind of the manifest."""
SETTINGS = "settings.json"
METADATA = "metadata.jsonl"
_TEMPORARY = ".part"


def claim_folder(output: Path, identity: dict[str, Any], names: list[str], force: bool) -> Manifest | None:
    """Prepare the output folder: empty, or with complete pictures of the same settings.

    Args:
        output: the folder.
        identity: what decides the pictures.
        names: file names of all pictures.
        force: replace what is in the folder where it is anything but a set of these settings.

    Returns:
        The manifest of a finished set, or None where pictures have to be drawn.

    Raises:
        ArtifactError: something else is in the folder, or a set of other settings.
        StorageError: the folder cannot be written.
    """
    if not force or output.is_file():
        _refuse_other(output, identity)
    recorded = _read_settings(output)
    with storage_errors(output):
        if recorded != identity:
            if output.exists():
                shutil.rmtree(output)
            output.mkdir(parents=True)
            write_file(output / SETTINGS, json.dumps(identity, indent=1).encode())
            return None
        for stray in output.glob(f"*{_TEMPORARY}"):
            stray.unlink()
        manifest = _read_manifest(output)
        if manifest is None:
            return None
        if not faults(output, KIND):
            return manifest
        _remove_damaged(output, manifest, names)
    return None


def list_missing(output: Path, names: list[str]) -> list[int]:
    """Returns the indices of the pictures in `names` that the folder lacks; an empty file counts as missing."""
    with storage_errors(output):
        present = {path.name for path in output.iterdir() if path.stat().st_size}
    return [i for i, name in enumerate(names) if name not in present]


def write_file(path: Path, payload: bytes) -> None:
    """Write a file that appears complete or not at all.

    `write_atomically` is not used: the next run knows what a killed run left by the ending of its name.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        temporary.write_bytes(payload)
        replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_other(output: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder that holds something else, or a set of other settings.

    Settings without a picture do not count: a run that stopped before its first picture can be replaced.
    """
    begun = output.is_dir() and any(
        path.name != SETTINGS and not path.name.endswith(_TEMPORARY) for path in output.iterdir()
    )
    recorded = _read_settings(output)
    if recorded is None:
        if begun or not output.is_dir():
            check_free(output)
        return
    differing = [
        f"{key}: {_shorten(recorded.get(key))} in the folder, {_shorten(value)} now"
        for key, value in identity.items()
        if recorded.get(key) != value
    ]
    if differing and begun:
        raise ArtifactError(
            f"holds a data set of other settings ({'; '.join(differing)})",
            where=output,
            hint="use the same settings to continue it, --force to replace it, or another -o",
        )


def _shorten(value: object) -> str:
    """Returns a setting as text, a sha256 cut to 12 digits."""
    text = "the default" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _read_settings(output: Path) -> dict[str, Any] | None:
    """Returns the settings of the run that began in a folder, or None where there are none."""
    try:
        found = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "prompts" in found and "picture_format" in found else None


def _read_manifest(output: Path) -> Manifest | None:
    """Returns the manifest, or None where there is none or a stopped run cut it."""
    try:
        return read_manifest(output)
    except ArtifactError:
        return None


def _remove_damaged(output: Path, manifest: Manifest, names: list[str]) -> None:
    """Remove the pictures in `names` that are not as the manifest of the folder records them."""
    for name in names:
        path, entry = output / name, manifest.files.get(name)
        if path.is_file() and (
            entry is None or path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256
        ):
            path.unlink()
