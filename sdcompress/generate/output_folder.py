"""The folder of a drawn data set while it is drawn: what a run finds in it, keeps and removes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ArtifactError, storage_errors
from sdcompress_engines.files import parents_made, write_atomically
from sdcompress_engines.leftovers import remove_leftovers, remove_partial_files
from sdcompress_engines.manifest import Manifest, faults, read_manifest, sha256_file
from sdcompress_engines.output_folders import begun_folder, check_free, check_inputs, moved_aside

from sdcompress.data.drawn import DATASET

SETTINGS = "settings.json"
METADATA = "metadata.jsonl"


@contextmanager
def claim_folder(
    output: Path, identity: dict[str, Any], names: list[str], force: bool, inputs: Iterable[Path] = ()
) -> Iterator[Manifest | None]:
    """Prepare the output folder for the block: empty, or with complete pictures of the same settings.

    After an error before the first picture the folder is as it was before.

    Args:
        output: the folder.
        identity: what decides the pictures.
        names: names of all files with pictures or latents.
        force: replace a set of other settings, or another output of sdcompress.
        inputs: what the pictures are made from.

    Yields:
        The manifest of a finished set, or None where pictures have to be drawn.

    Raises:
        ArtifactError: something else is in the folder, a set of other settings, or one of the inputs.
        StorageError: the folder cannot be written.
    """
    _check_folder(output, identity, force, inputs)
    continues = _read_settings(output) == identity
    kept = nullcontext() if continues else moved_aside(output)
    with storage_errors(output), parents_made(output), kept, begun_folder(output, SETTINGS):
        if not continues:
            write_atomically(output / SETTINGS, json.dumps(identity, indent=1))
        yield _find_finished(output, names)


def check_claim(output: Path, identity: dict[str, Any]) -> None:
    """Refuse to write further pictures where another process has replaced the set by one of other settings.

    Args:
        output: the folder.
        identity: see `claim_folder`.

    Raises:
        ArtifactError: it has.
    """
    if _read_settings(output) != identity:
        raise ArtifactError("was replaced by another process", where=output, hint="choose another -o")


def _find_finished(output: Path, names: list[str]) -> Manifest | None:
    """Returns the manifest of a whole set. Of another one, files that were not finished or were damaged are removed.

    Raises:
        ArtifactError: somebody has edited the captions, which the end of the run would write anew.
    """
    manifest = _read_manifest(output)
    if manifest is None or not faults(output, DATASET):
        return manifest
    captions, entry = output / METADATA, manifest.files.get(METADATA)
    if captions.is_file() and entry is not None and sha256_file(captions) != entry.sha256:
        raise ArtifactError(
            "was edited, and would be written anew",
            where=captions,
            hint="train on the folder as it is; or move this file away, and type the same command again",
        )
    _remove_damaged(output, manifest, names)
    return None


def find_missing(output: Path, names: Iterable[str]) -> set[str]:
    """Returns those of `names` that the folder lacks; an empty file counts as missing."""
    with storage_errors(output):
        return set(names) - {path.name for path in output.iterdir() if path.stat().st_size}


def _check_folder(output: Path, identity: dict[str, Any], force: bool, inputs: Iterable[Path]) -> None:
    """Refuse what `claim_folder` refuses, before anything is written. The arguments are the same."""
    if _read_settings(output) is not None:
        remove_partial_files(output)
    if not output.is_symlink() and _read_settings(output) == identity:
        check_inputs(output, inputs)
        remove_leftovers(output)
        return
    if not force:
        _refuse_other(output, identity)
    check_free(output, force or _is_begun(output), inputs, in_place=True)


def _is_begun(output: Path) -> bool:
    """Returns whether a run stopped in the folder before its first picture; it can be replaced."""
    return output.is_dir() and all(path.name == SETTINGS for path in output.iterdir())


def _refuse_other(output: Path, identity: dict[str, Any]) -> None:
    """Refuse a set of other settings, and name them."""
    recorded = _read_settings(output)
    if recorded is None or _is_begun(output):
        return
    differing = [
        f"{key}: {_shorten(recorded.get(key))} in the folder, {_shorten(value)} now"
        for key, value in identity.items()
        if recorded.get(key) != value
    ]
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
    if not isinstance(found, dict) or "prompts" not in found or "picture_format" not in found:
        return None
    return {"latents": False} | found  # earlier versions wrote none


def _read_manifest(output: Path) -> Manifest | None:
    """Returns the manifest, or None where there is none or a stopped run cut it."""
    try:
        return read_manifest(output)
    except ArtifactError:
        return None


def _remove_damaged(output: Path, manifest: Manifest, names: list[str]) -> None:
    """Remove the files in `names` that are not as the manifest of the folder records them."""
    for name in names:
        path, entry = output / name, manifest.files.get(name)
        if path.is_file() and (
            entry is None or path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256
        ):
            path.unlink()
