"""The folder of a finished pipeline or LoRA, checked before it is published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdcompress_engines.errors import ArtifactError, ModelError, UsageError
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, faults, read_manifest

CARD = "README.md"
PICTURE = "samples.webp"
KINDS = ("student", "finetuned", "lora")
_PARTS = ("pipeline", "lora")


@dataclass(frozen=True)
class FinishedModel:
    """A folder that can be published.

    Attributes:
        folder: holds the manifest and the files that it names.
        manifest: of kind student, finetuned or lora.
        samples: the newest grid of pictures drawn during training, or None.
    """

    folder: Path
    manifest: Manifest
    samples: Path | None

    def files(self) -> dict[str, Path]:
        """Returns name in the repository → file, the manifest last.

        Only files in the manifest are listed; a card and its picture are left out, because they are written anew.
        """
        return {
            name: self.folder / name for name in [*self.manifest.files, MANIFEST_NAME] if name not in (CARD, PICTURE)
        }


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
    grids = sorted((place.parent / "samples").glob("step-*.webp")) if place.resolve().name in _PARTS else []
    return FinishedModel(place, manifest, grids[-1] if grids else None)


def _find_manifest(folder: Path) -> tuple[Path, Manifest]:
    """Returns the artifact's folder, `folder` itself or its `pipeline/` or `lora/`, and its manifest."""
    expected = "a pipeline or LoRA that distill, finetune or lora train has finished, or its training folder"
    place = next((p for p in (folder, *(folder / part for part in _PARTS)) if (p / MANIFEST_NAME).is_file()), None)
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
        missing = [name for name in ("model_index.json", "unet/config.json") if not (place / name).is_file()]
        if missing:
            return [f"{name} is missing" for name in missing]
    has_training = isinstance(manifest.config.get("train"), dict)
    if not has_training or (manifest.kind == "student" and "plan" not in manifest.config):
        return [f"{MANIFEST_NAME} has no record of the training"]
    return []
