"""The files of a pipeline → a diffusers pipeline in torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.errors import ModelError

from sdcompress.models.locate import BUILT_IN, display_name, model_index, resolve, sha256_of
from sdcompress.support.quiet import quiet

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline with where it came from.

    Attributes:
        name: what to call it in reports: a built-in's name, the folder's or file's name, or the hub id.
        pipeline: a diffusers pipeline, fp32 on the CPU, safety checker off.
        sha256: over all its files (of a single file, its own); names the teacher in every later result.
        folder: where it was loaded from; a single-file checkpoint itself.
    """

    name: str
    pipeline: DiffusionPipeline
    sha256: str
    folder: Path = field(repr=False)


def load_pipeline(name_or_path: str | Path, *, as_stored: bool = False) -> LoadedPipeline:
    """Load a pipeline on the CPU: in fp32, or with `as_stored` in half precision where its UNet's file is, which takes
    half the memory.

    Raises:
        UsageError: no such path. ModelError: not a pipeline, or one with missing or broken parts.
    """
    folder = resolve(name_or_path)
    if folder.is_file():
        from sdcompress.checkpoints.read import load_single_file

        with quiet():
            pipeline = load_single_file(folder, as_stored=as_stored)
    else:
        pipeline = _load_folder(folder, as_stored)
    pipeline.set_progress_bar_config(disable=True)
    given = str(name_or_path)
    from_hub = folder.is_dir() and not Path(given).expanduser().exists()
    return LoadedPipeline(
        given if given in BUILT_IN or from_hub else display_name(folder), pipeline, sha256_of(folder), folder
    )


def _load_folder(folder: Path, as_stored: bool) -> DiffusionPipeline:
    import torch
    from diffusers import DiffusionPipeline

    index = model_index(folder)
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
            pipeline: DiffusionPipeline = DiffusionPipeline.from_pretrained(
                folder,
                local_files_only=True,
                low_cpu_mem_usage=as_stored,
                dtype=_stored_dtype(folder) if as_stored else torch.float32,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"does not load: {str(error).splitlines()[0]}", where=folder, expected="a whole diffusers pipeline"
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(
            f"has a broken weight file: {error}", where=folder, hint="copy or download it again"
        ) from error
    return pipeline


def _stored_dtype(folder: Path) -> torch.dtype:
    """float16 or bfloat16 where the first file of the UNet's weights holds that, else float32."""
    import torch
    from safetensors import SafetensorError, safe_open

    found = next(iter(sorted((folder / "unet").glob("*.safetensors"))), None)
    try:
        if found is not None:
            with safe_open(found, "pt") as file:
                stored = file.get_slice(next(iter(file.keys()))).get_dtype()
            return {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored, torch.float32)
    except (SafetensorError, OSError, StopIteration):
        pass  # loading says what is wrong with it
    return torch.float32
