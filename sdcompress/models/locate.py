"""Name, path or hub id → the files of a pipeline, their sha256 and their configs; no weights are read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ModelError, UsageError
from sdcompress_engines.files import check_regular, check_tree
from sdcompress_engines.json_files import read_json_object
from sdcompress_engines.manifest import sha256_file, sha256_tree
from sdcompress_engines.paths import expand_user

from sdcompress.families.schemas.check import check_config, config_file
from sdcompress.families.schemas.index import check_index
from sdcompress.models import nano
from sdcompress.models.nano import BUILT_IN

DECODER = "decoder"
"""The folder of a small decoder in its training folder, and its kind of artifact."""

_MOST_CONFIG_MIB = 2
"""Largest config that is read: a scheduler's, with a list of 1,000 betas, has 0.03 MiB."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate_pipeline(name_or_path: str | Path) -> Path:
    """Returns the folder of a pipeline, or the file of a single-file checkpoint.

    A hub id that is not in the local cache is downloaded.

    Args:
        name_or_path: the name of a built-in model, a path, or a hub id. Of a training folder, the student in its
            `pipeline/` is taken.

    Raises:
        UsageError: the path does not exist.
        ModelError: the folder or the hub repository holds no pipeline, or the path is no regular file.
    """
    name = str(name_or_path)
    if name in BUILT_IN:
        return nano.pipeline_folder(name)
    path = expand_user(name)
    if path.is_dir():
        for candidate in (path, path / "pipeline"):
            if (candidate / "model_index.json").is_file():
                check_tree(candidate, ModelError)
                return candidate
        raise ModelError(
            "is not a diffusers pipeline: it has no model_index.json",
            where=path,
            expected=(
                "a folder written by DiffusionPipeline.save_pretrained, a single-file checkpoint, a hub id, or nano"
            ),
        )
    if path.is_file():
        return path
    if path.exists():
        check_regular(path, ModelError)
    if is_hub_id(name):
        return _download(name)
    raise UsageError(
        "does not exist", where=name, expected=f"the path of a diffusers pipeline, a hub id, or {' / '.join(BUILT_IN)}"
    )


def is_hub_id(name: str) -> bool:
    """Returns whether a name that is no path of this machine can be a repository of the hub."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith((".", "/", "~"))


def local_paths(*names_or_paths: str | Path) -> list[Path]:
    """Returns the pipeline folders and files on this machine that names and paths lead to; nothing is downloaded.

    Args:
        names_or_paths: as for `locate_pipeline`; those that lead to nothing here are left out. For a built-in model it
            is the folder in the package that holds all of them.
    """
    found = [nano.ASSETS] if any(str(name) in BUILT_IN for name in names_or_paths) else []
    for path in filter(None, map(local_path, names_or_paths)):
        has_pipeline = not (path / "model_index.json").is_file() and (path / "pipeline/model_index.json").is_file()
        found.append(path / "pipeline" if has_pipeline else path)
    return found


def local_path(name_or_path: str | Path) -> Path | None:
    """Returns the file or folder that a model's name is on this machine; None for a built-in model and a hub id."""
    path = expand_user(name_or_path)
    return path if str(name_or_path) not in BUILT_IN and os.path.exists(path) else None


def _download(repository: str) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(repository, safety_checker=None))
    except Exception as error:
        raise ModelError(
            f"is neither a local folder nor a pipeline that the hub provides ({type(error).__name__})",
            where=repository,
            hint="check the path, or the network and the name on the hub",
        ) from error


def hash_pipeline(path: Path) -> str:
    """Returns the hex sha256 of a pipeline: over all files of a folder, or of the single file."""
    return sha256_file(path) if path.is_file() else sha256_tree(path)


def display_name(folder: Path) -> str:
    """Returns the name of a pipeline for reports.

    It is the name of the folder, or of the single file without its suffix. For the `pipeline/` of a training folder it
    is the name of the training folder.
    """
    folder = folder.resolve()
    if folder.is_file():
        return folder.stem
    return folder.parent.name if folder.name == "pipeline" else folder.name


def read_model_index(folder: Path) -> dict[str, Any]:
    """Returns a pipeline's `model_index.json`; for a single file, the one that its weights imply.

    Raises:
        ModelError: the index is broken, or names classes that no known pipeline holds; or the file is no checkpoint.
    """
    if folder.is_file():
        return dict(_read_file_configs(folder)["model_index.json"])
    path = folder / "model_index.json"
    return check_index(_read_config(path), path)


def _read_config(path: Path) -> dict[str, Any]:
    return read_json_object(path, ModelError, most_mib=_MOST_CONFIG_MIB)


def _read_file_configs(path: Path) -> dict[str, Any]:
    from sdcompress.checkpoints.configs import derive_configs
    from sdcompress.checkpoints.weights import open_weights

    return derive_configs(open_weights(path))


def read_component_config(name_or_path: str | Path, component: str) -> dict[str, Any]:
    """Returns the config of one component without loading weights; for a single file, from its header.

    Args:
        name_or_path: as for `locate_pipeline`.
        component: `unet`, `vae`, `text_encoder`, `text_encoder_2` or `scheduler`.

    Raises:
        UsageError: the path does not exist.
        ModelError: there is no pipeline, it has no such component, or the config is broken.
    """
    return read_config_in(locate_pipeline(name_or_path), component)


def read_config_in(folder: Path, component: str) -> dict[str, Any]:
    """Returns what `read_component_config` returns, of a pipeline that `locate_pipeline` has found.

    Args:
        folder: of the pipeline, or its single file.
        component: see `read_component_config`.

    Raises:
        ModelError: it has no such component, or the config is broken.
    """
    name = config_file(component)
    if folder.is_file():
        configs = _read_file_configs(folder)
        if name not in configs:
            raise ModelError(f"has no {component}", where=folder, expected="a whole Stable Diffusion checkpoint")
        return dict(configs[name])
    if not (folder / name).is_file():
        raise ModelError(
            f"has no {name}", where=folder, expected="a Stable Diffusion pipeline with a UNet2DConditionModel"
        )
    return check_config(component, _read_config(folder / name), folder / name)


def read_unet_config(name_or_path: str | Path) -> dict[str, Any]:
    """Returns the config of a pipeline's UNet without loading weights.

    Raises:
        UsageError: the path does not exist.
        ModelError: there is no pipeline, or its UNet is no `UNet2DConditionModel`.
    """
    return read_component_config(name_or_path, "unet")


def refuse_student(unet_config: Mapping[str, Any], where: str | Path) -> None:
    """Refuse a block-pruned student where a whole teacher is needed.

    Args:
        unet_config: of the model in question.
        where: the model's name or path, for the message.

    Raises:
        ModelError: the UNet is a student; the message names the removal and the family.
    """
    from sdcompress.families.registry import family_of

    family = family_of(unet_config)
    removal = family.student_of(unet_config)
    if removal is not None:
        raise ModelError(
            f"is a student already ({removal} of {family.title}): it lacks blocks that a teacher must have",
            where=where,
            expected="a whole teacher",
            hint="sdcompress finetune MODEL --data DATA -o DIR, which trains a student further",
        )
