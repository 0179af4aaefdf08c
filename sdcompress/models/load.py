"""The files of a pipeline → a diffusers pipeline in torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.errors import ModelError
from sdcompress_engines.paths import expand_user

from sdcompress.models.locate import BUILT_IN, display_name, hash_pipeline, locate_pipeline, read_model_index
from sdcompress.support.pipeline import TextToImagePipeline
from sdcompress.support.quiet import quiet

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline and the files that it was loaded from.

    Attributes:
        name: for reports: the name of a built-in model, of the folder or of the file, or the hub id.
        pipeline: a diffusers pipeline, fp32 on the CPU, without a safety checker.
        sha256: hex digest over all files of the folder, or of the single file. Later results name the teacher by it.
        folder: the pipeline folder, or the single-file checkpoint.
    """

    name: str
    pipeline: TextToImagePipeline
    sha256: str
    folder: Path = field(repr=False)


def load_pipeline(name_or_path: str | Path, *, as_stored: bool = False) -> LoadedPipeline:
    """Load a pipeline on the CPU.

    Args:
        name_or_path: the name of a built-in model, a path, or a hub id.
        as_stored: keep half precision where the UNet's file holds it, which takes half the memory; else fp32.

    Raises:
        UsageError: the path does not exist.
        ModelError: there is no pipeline, or a component is missing or broken.
    """
    folder = locate_pipeline(name_or_path)
    pipeline: TextToImagePipeline
    if folder.is_file():
        from sdcompress.checkpoints.read import load_single_file

        with quiet():
            pipeline = load_single_file(folder, as_stored=as_stored)
    else:
        pipeline = _load_folder(folder, as_stored)
    pipeline.set_progress_bar_config(disable=True)
    name = str(name_or_path)
    from_hub = folder.is_dir() and not expand_user(name).exists()
    if name not in BUILT_IN and not from_hub:
        name = display_name(folder)
    return LoadedPipeline(name, pipeline, hash_pipeline(folder), folder)


def _load_folder(folder: Path, as_stored: bool) -> TextToImagePipeline:
    import torch
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    index = read_model_index(folder)
    if not (index.get("unet") or [None])[0]:
        raise ModelError(
            f"{index.get('_class_name', 'the pipeline')} has no UNet",
            where=folder,
            expected="a Stable Diffusion pipeline with a UNet2DConditionModel",
        )
    options: dict[str, Any] = (
        {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    )
    try:
        with quiet():
            pipeline: TextToImagePipeline = DiffusionPipeline.from_pretrained(
                folder,
                local_files_only=True,
                low_cpu_mem_usage=as_stored,
                dtype=_read_stored_dtype(folder) if as_stored else torch.float32,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"does not load: {str(error).splitlines()[0]}", where=folder, expected="a whole diffusers pipeline"
        ) from error
    except SafetensorError as error:
        raise ModelError(
            f"has a broken weight file: {error}", where=folder, hint="copy or download it again"
        ) from error
    return pipeline


def _read_stored_dtype(folder: Path) -> torch.dtype:
    """Returns float16 or bfloat16 where the first file of the UNet's weights holds it, else float32."""
    import torch
    from safetensors import SafetensorError, safe_open

    first = next(iter(sorted((folder / "unet").glob("*.safetensors"))), None)
    try:
        if first is not None:
            with safe_open(first, "pt") as file:
                stored = file.get_slice(next(iter(file.keys()))).get_dtype()
            return {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored, torch.float32)
    except (SafetensorError, OSError, StopIteration):
        pass  # loading the pipeline reports the fault
    return torch.float32
