"""The folder of a finished pipeline or LoRA, checked before it is published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sdcompress_engines.errors import ArtifactError, ModelError, UsageError
from sdcompress_engines.json_files import read_json_object
from sdcompress_engines.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    faults,
    manifest_text,
    read_manifest,
    seal_manifest,
)
from sdcompress_engines.paths import file_inside, is_link

from sdcompress.publish.local_names import without_places
from sdcompress.support.pictures import read_picture

CARD = "README.md"
PICTURE = "samples.webp"
KINDS = ("student", "few-step", "finetuned", "lora")
_PARTS = ("pipeline", "lora")
_CONFIGS = ("config.json", "model_index.json")
"""Ends of the names of configs, in which diffusers and transformers note where they were loaded from."""


@dataclass(frozen=True)
class FinishedModel:
    """A folder that can be published.

    Attributes:
        folder: holds the manifest and the files that it names.
        manifest: of one of `KINDS`, as it is published: without paths of this machine, sealed anew.
        samples: the newest grid of pictures drawn during training, or None.
        texts: name → content of the files that are published with changes: the manifest, and configs that name a path
            of this machine.
    """

    folder: Path
    manifest: Manifest
    samples: Path | None
    texts: Mapping[str, bytes]

    def contents(self) -> dict[str, Path | bytes]:
        """Returns name in the repository → file or content, the manifest last.

        Only files in the manifest are listed. A card and its picture are left out, because they are written anew.
        """
        return {name: self.texts.get(name) or self.file(name) for name in [*self.manifest.files, MANIFEST_NAME]}

    def file(self, name: str) -> Path:
        """Returns the path of a file that the manifest names.

        Raises:
            ArtifactError: it is a link.
        """
        return file_inside(self.folder, name, source=self.folder / MANIFEST_NAME)


def find_finished_model(folder: Path) -> FinishedModel:
    """Returns what a training or artifact folder has to publish; every file is read and checked.

    Raises:
        UsageError: there is no such folder.
        ModelError: it holds neither a pipeline nor a LoRA that sdcompress made.
        ArtifactError: the model is damaged; the message names all faults.
    """
    if not folder.is_dir():
        raise UsageError(
            "is not a folder" if folder.exists() else "does not exist",
            where=folder,
            expected="a pipeline, LoRA or training folder",
        )
    place, manifest = _find_manifest(folder)
    damage = _find_damage(place, manifest)
    if damage:
        raise ArtifactError(
            f"is damaged: {'; '.join(damage)}", where=place, hint="train it again with --resume, or copy it again"
        )
    texts = _rewrite_configs(place, manifest)
    published = _publish_manifest(manifest, texts)
    return FinishedModel(
        place, published, _find_samples(place), texts | {MANIFEST_NAME: manifest_text(published).encode()}
    )


def _find_samples(place: Path) -> Path | None:
    """Returns the newest grid of pictures beside the model's folder, or None.

    Raises:
        ArtifactError: it is a link or no picture.
    """
    place = place.resolve()  # `.`, as where this runs in the model's folder, has no other parent
    folder = place.parent / "samples"
    names = sorted(path.name for path in folder.glob("step-*.webp")) if place.name in _PARTS else []
    if not names:
        return None
    picture = file_inside(place.parent, f"samples/{names[-1]}", source=folder)
    read_picture(picture)
    return picture


def _rewrite_configs(place: Path, manifest: Manifest) -> dict[str, bytes]:
    """Returns name → new content of the configs that hold a path of this machine, as diffusers notes it."""
    texts = {}
    for name in manifest.files:
        if not name.endswith(_CONFIGS):
            continue
        config = read_json_object(file_inside(place, name, source=place / MANIFEST_NAME))
        published = without_places(config)
        if published != config:
            texts[name] = (json.dumps(published, indent=2) + "\n").encode()
    return texts


def _publish_manifest(manifest: Manifest, texts: Mapping[str, bytes]) -> Manifest:
    """Returns the manifest of what is published: names instead of paths, and the new hashes of rewritten files."""
    changed = {name: FileEntry(hashlib.sha256(text).hexdigest(), len(text)) for name, text in texts.items()}
    files = {name: changed.get(name, entry) for name, entry in manifest.files.items() if name not in (CARD, PICTURE)}
    clean = {name: without_places(getattr(manifest, name)) for name in ("inputs", "config", "figures")}
    return seal_manifest(replace(manifest, files=files, **clean))


def _find_manifest(folder: Path) -> tuple[Path, Manifest]:
    """Returns the artifact's folder, `folder` itself or its `pipeline/` or `lora/`, and its manifest."""
    expected = "a pipeline or LoRA that distill, few-step, finetune or lora train has finished, or its training folder"
    inside = (folder / part for part in _PARTS if not is_link(folder / part))
    place = next((place for place in (folder, *inside) if (place / MANIFEST_NAME).is_file()), None)
    if place is None and (folder / "checkpoints").is_dir():
        raise ModelError(
            "is a training that has not finished",
            where=folder,
            expected=expected,
            hint="the command that started it, with --resume",
        )
    if place is None:
        is_pipeline = (folder / "model_index.json").is_file()
        raise ModelError(
            f"was not made by sdcompress: it has no {MANIFEST_NAME}"
            if is_pipeline
            else "is neither a pipeline nor a LoRA",
            where=folder,
            expected=expected,
        )
    manifest = read_manifest(place)
    if manifest is None or manifest.kind not in KINDS:
        raise ModelError(f"is of kind {manifest.kind if manifest else None!r}", where=place, expected=expected)
    return place, manifest


def _find_damage(place: Path, manifest: Manifest) -> list[str]:
    damage = faults(place)
    if damage:
        return damage
    if manifest.kind != "lora":
        missing = [name for name in ("model_index.json", "unet/config.json") if name not in manifest.files]
        if missing:
            return [f"{name} is missing" for name in missing]
    has_training = isinstance(manifest.config.get("train"), dict)
    if not has_training or (manifest.kind == "student" and "plan" not in manifest.config):
        return [f"{MANIFEST_NAME} has no record of the training"]
    return []
