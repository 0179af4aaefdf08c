"""The teacher of a model, by what the model's manifest says that it was made from."""

from __future__ import annotations

from sdcompress_engines.errors import UsageError, shorten
from sdcompress_engines.manifest import read_manifest

from sdcompress.families.registry import family_of
from sdcompress.models.locate import hash_pipeline, is_hub_id, locate_pipeline, read_unet_config
from sdcompress.models.nano import BUILT_IN


def find_teacher(model: str) -> str:
    """Returns the name of the teacher that a model was distilled from; of another model, its own.

    A manifest holds no path, so that the teacher is found where it is a built-in model or one of the hub.

    Args:
        model: the name of a built-in model, a path, or a hub id.

    Raises:
        UsageError: the model is a student, or draws in few steps, and its teacher is not known, not found, or no longer
            the one that it was; or there is no such model.
        ModelError: the model has no UNet.
    """
    config = read_unet_config(model)
    if model in BUILT_IN:
        return BUILT_IN[0]
    folder = locate_pipeline(model)
    manifest = read_manifest(folder) if folder.is_dir() else None
    is_whole = family_of(config).student_of(config) is None
    if is_whole and (manifest is None or manifest.kind != "few-step"):
        return model
    name = manifest.config.get("teacher_name") if manifest is not None else None
    sha256 = manifest.inputs.get("teacher", "") if manifest is not None else ""
    if not isinstance(name, str):
        raise UsageError(
            "was distilled, and nothing in its folder names its teacher", where=model, hint="--teacher TEACHER"
        )
    if name in BUILT_IN or is_hub_id(name):
        if hash_pipeline(locate_pipeline(name)) == sha256:
            return name
        if name not in BUILT_IN:
            raise UsageError(
                f"was distilled from {name} as it was ({sha256[:12]}), and the hub has other files now",
                where=model,
                hint=f"--teacher {name}, to learn from these",
            )
    raise UsageError(
        f"was distilled from {shorten(name, 80)} ({sha256[:12]}), whose place is not recorded",
        where=model,
        hint="--teacher, with the path of that model",
    )
