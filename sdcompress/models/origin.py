"""The teacher of a model, by what the model's manifest says that it was made from."""

from __future__ import annotations

from sdcompress_engines.errors import UsageError, shorten
from sdcompress_engines.manifest import read_manifest

from sdcompress.families.registry import family_of
from sdcompress.models.locate import hash_pipeline, is_hub_id, locate_pipeline, read_unet_config
from sdcompress.models.nano import BUILT_IN


def find_teacher(model: str) -> str:
    """Returns the name of the teacher that a model was distilled from; of a whole model, its own.

    A manifest holds no path, so that the teacher is found where it is a built-in model or one of the hub.

    Args:
        model: the name of a built-in model, a path, or a hub id.

    Raises:
        UsageError: the model is a student, and its teacher is not known or not found; or there is no such model.
        ModelError: the model has no UNet.
    """
    config = read_unet_config(model)
    if family_of(config).student_of(config) is None:
        return model
    if model in BUILT_IN:
        return BUILT_IN[0]
    folder = locate_pipeline(model)
    manifest = read_manifest(folder) if folder.is_dir() else None
    name = manifest.config.get("teacher_name") if manifest is not None else None
    sha256 = manifest.inputs.get("teacher", "") if manifest is not None else ""
    if not isinstance(name, str):
        raise UsageError(
            "is a student, and nothing in its folder names its teacher", where=model, hint="--teacher TEACHER"
        )
    if name in BUILT_IN and hash_pipeline(locate_pipeline(name)) == sha256:
        return name
    if name not in BUILT_IN and is_hub_id(name):
        return name
    raise UsageError(
        f"was distilled from {shorten(name, 80)} ({sha256[:12]}), whose place is not recorded",
        where=model,
        hint="--teacher, with the path of that model",
    )
