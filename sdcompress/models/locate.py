"""Name, path or hub id → the files of a pipeline, their sha256 and their configs; no weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.errors import ModelError, UsageError
from sdcompress_engines.manifest import sha256_file, sha256_tree

if TYPE_CHECKING:
    pass

BUILT_IN = ("nano", "nano-tiny")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(name_or_path: str | Path) -> Path:
    """The folder of a pipeline given by a built-in's name, a path or a hub id; of a single-file checkpoint, the file.

    Raises:
        UsageError: no such path. ModelError: no pipeline there.
    """
    name = str(name_or_path)
    if name in BUILT_IN:
        from sdcompress.models import nano

        return nano.folder(name)
    path = Path(name).expanduser()
    if path.is_dir():
        for candidate in (path, path / "pipeline"):  # a training folder holds its student under pipeline/
            if (candidate / "model_index.json").is_file():
                return candidate
        raise ModelError(
            "is no diffusers pipeline: it has no model_index.json",
            where=path,
            expected=(
                "a folder written by DiffusionPipeline.save_pretrained, a single-file checkpoint, a hub id, or nano"
            ),
        )
    if path.is_file():
        return path
    if _HUB_ID.fullmatch(name) and not name.startswith((".", "/", "~")):
        return _download(name)
    raise UsageError(
        "does not exist", where=name, expected=f"the path of a diffusers pipeline, a hub id, or {' / '.join(BUILT_IN)}"
    )


def _download(repository: str) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(repository, safety_checker=None))
    except Exception as error:
        raise ModelError(
            f"is neither a folder here nor a pipeline the hub gives ({type(error).__name__})",
            where=repository,
            hint="check the path, or the network and the name on the hub",
        ) from error


def sha256_of(path: Path) -> str:
    """Hex sha256 of a pipeline: over all files of a folder, or of the single file."""
    return sha256_file(path) if path.is_file() else sha256_tree(path)


def display_name(folder: Path) -> str:
    """The folder's name; for a training folder's `pipeline/`, the training folder's; a single file's without its
    ending.
    """
    folder = folder.resolve()
    if folder.is_file():
        return folder.stem
    return folder.parent.name if folder.name == "pipeline" else folder.name


def model_index(folder: Path) -> dict[str, Any]:
    """The pipeline's `model_index.json`; of a single file, the one its weights stand for.

    Raises:
        ModelError: it is not JSON, or the file is no checkpoint.
    """
    if folder.is_file():
        return dict(_file_configs(folder)["model_index.json"])
    return _json(folder / "model_index.json", "a pipeline's index")


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"is not JSON ({error})", where=path) from error
    if not isinstance(content, dict):
        raise ModelError(f"is not {what}", where=path)
    return content


def _file_configs(path: Path) -> dict[str, Any]:
    from sdcompress.checkpoints.identify import configs_of
    from sdcompress.checkpoints.weights import open_weights

    return configs_of(open_weights(path))


def component_config(name_or_path: str | Path, component: str) -> dict[str, Any]:
    """The config of `unet`, `vae`, `text_encoder`, `text_encoder_2` or `scheduler`, without loading weights; of a
    single file, from its header.

    Raises:
        UsageError, ModelError: as `load_pipeline`; the pipeline has no such component.
    """
    folder = resolve(name_or_path)
    name = f"{component}/{'scheduler_config' if component == 'scheduler' else 'config'}.json"
    if folder.is_file():
        configs = _file_configs(folder)
        if name not in configs:
            raise ModelError(f"has no {component}", where=folder, expected="a whole Stable Diffusion checkpoint")
        return dict(configs[name])
    if not (folder / name).is_file():
        raise ModelError(
            f"has no {name}", where=folder, expected="a Stable Diffusion pipeline with a UNet2DConditionModel"
        )
    return _json(folder / name, "a config")


def unet_config(name_or_path: str | Path) -> dict[str, Any]:
    """A pipeline's UNet config, without loading weights.

    Raises:
        UsageError, ModelError: as `load_pipeline`.
    """
    config = component_config(name_or_path, "unet")
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ModelError(f"is a {config['_class_name']}", where=name_or_path, expected="a UNet2DConditionModel")
    return config


def refuse_student(unet_config: Mapping[str, Any], where: str | Path) -> None:
    """Refuse a block-removed student where a whole teacher is needed.

    Raises:
        ModelError: the UNet is a student; says which and of what.
    """
    from sdcompress.families.registry import family_of

    family = family_of(unet_config)
    kind = family.student_of(unet_config)
    if kind is not None:
        raise ModelError(
            f"is a student already ({kind} of {family.title}): blocks are missing that a teacher must have",
            where=where,
            expected="a whole teacher",
            hint="sdcompress finetune trains a student further as it is",
        )
