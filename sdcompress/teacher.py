"""Load a Stable Diffusion pipeline by name or path, and say what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.errors import ModelError, UsageError
from sdcompress_engines.manifest import sha256_tree

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BUILT_IN = ("nano", "nano-tiny")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers without their own bars and notices, for the block."""
    import diffusers
    import transformers

    states = []
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        states.append((logging, logging.get_verbosity(), logging.is_progress_bar_enabled()))
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, verbosity, bars in states:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline with where it came from.

    Attributes:
        name: what to call it in reports: a built-in's name, the folder's name, or the hub id.
        pipeline: a diffusers pipeline, fp32 on the CPU, safety checker off.
        sha256: over all its files; names the teacher in every later result.
        folder: where it was loaded from.
    """

    name: str
    pipeline: DiffusionPipeline
    sha256: str
    folder: Path = field(repr=False)


def resolve(name_or_path: str | Path) -> Path:
    """The folder of a pipeline given by a built-in's name, a path or a hub id.

    Raises:
        UsageError: no such path. ModelError: no pipeline there.
    """
    name = str(name_or_path)
    if name in BUILT_IN:
        from sdcompress import nano

        return nano.folder(name)
    path = Path(name).expanduser()
    if path.is_dir():
        for candidate in (path, path / "pipeline"):  # a training folder holds its student under pipeline/
            if (candidate / "model_index.json").is_file():
                return candidate
        raise ModelError("is no diffusers pipeline: it has no model_index.json", where=path, expected="a folder written by DiffusionPipeline.save_pretrained, a hub id, or nano")
    if path.is_file():
        raise ModelError("is a single file", where=path, expected="a diffusers folder", hint="StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)")
    if _HUB_ID.fullmatch(name) and not name.startswith((".", "/", "~")):
        return _download(name)
    raise UsageError("does not exist", where=name, expected=f"the path of a diffusers pipeline, a hub id, or {' / '.join(BUILT_IN)}")


def _download(repository: str) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(repository, safety_checker=None))
    except Exception as error:
        raise ModelError(f"is neither a folder here nor a pipeline the hub gives ({type(error).__name__})", where=repository, hint="check the path, or the network and the name on the hub") from error


def load_teacher(name_or_path: str | Path) -> LoadedPipeline:
    """Load a pipeline in fp32 on the CPU.

    Raises:
        UsageError: no such path. ModelError: not a pipeline, or one with missing or broken parts.
    """
    import torch
    from diffusers import DiffusionPipeline

    folder = resolve(name_or_path)
    index = model_index(folder)
    if "unet" not in index:
        raise ModelError(f"{index.get('_class_name', 'the pipeline')} has no UNet", where=folder, expected="a Stable Diffusion pipeline with a UNet2DConditionModel")
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    try:
        with quiet():
            pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False, dtype=torch.float32, **options)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(f"does not load: {str(error).splitlines()[0]}", where=folder, expected="a whole diffusers pipeline") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(f"has a broken weight file: {error}", where=folder, hint="copy or download it again") from error
    pipeline.set_progress_bar_config(disable=True)
    name = str(name_or_path) if str(name_or_path) in BUILT_IN else display_name(folder)
    return LoadedPipeline(name, pipeline, sha256_tree(folder), folder)


def display_name(folder: Path) -> str:
    """The folder's name; for a training folder's `pipeline/`, the training folder's."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "pipeline" else folder.name


def model_index(folder: Path) -> dict[str, Any]:
    """The pipeline's `model_index.json`.

    Raises:
        ModelError: it is not JSON.
    """
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"is not JSON ({error})", where=path) from error
    if not isinstance(index, dict):
        raise ModelError("is not a pipeline's index", where=path)
    return index


def unet_config(name_or_path: str | Path) -> dict[str, Any]:
    """A pipeline's UNet config, without loading weights.

    Raises:
        UsageError, ModelError: as `load_teacher`.
    """
    folder = resolve(name_or_path)
    path = folder / "unet/config.json"
    if not path.is_file():
        raise ModelError("has no unet/config.json", where=folder, expected="a Stable Diffusion pipeline with a UNet2DConditionModel")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"is not JSON ({error})", where=path) from error
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ModelError(f"is a {config['_class_name']}", where=path, expected="a UNet2DConditionModel")
    return config
