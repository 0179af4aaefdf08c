"""The files of a pipeline → a diffusers pipeline in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.paths import expand_user

from sdcompress.models.locate import (
    display_name,
    hash_pipeline,
    locate_pipeline,
    read_config_in,
    read_model_index,
)
from sdcompress.models.nano import BUILT_IN
from sdcompress.models.student_plan import find_plan
from sdcompress.support.pipeline import TextToImagePipeline
from sdcompress.support.quiet import quiet

if TYPE_CHECKING:
    import torch

    from sdcompress.prune.plan import BlockPlan


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline and the files that it was loaded from.

    Attributes:
        name: for reports: the name of a built-in model, of the folder or of the file, or the hub id.
        pipeline: a diffusers pipeline, fp32 on the CPU, without a safety checker.
        sha256: hex digest over all files of the folder, or of the single file. Later results name the teacher by it.
        folder: the pipeline folder, or the single-file checkpoint.
        decoder_sha256: of the small decoder in the place of the VAE; None where the pipeline has its own.
        note: what a user should know about the decoder with this model; may be empty.
        plan: from the whole model to this student; None of a whole model, or where it is not known.
    """

    name: str
    pipeline: TextToImagePipeline
    sha256: str
    folder: Path = field(repr=False)
    decoder_sha256: str | None = None
    note: str = ""
    plan: BlockPlan | None = field(default=None, repr=False)

    @property
    def inputs(self) -> dict[str, str]:
        """The manifest entries of what it was loaded from."""
        return {"pipeline": self.sha256} | ({"decoder": self.decoder_sha256} if self.decoder_sha256 else {})


def load_pipeline(
    name_or_path: str | Path, *, as_stored: bool = False, decoder: str | Path | None = None
) -> LoadedPipeline:
    """Load a pipeline on the CPU.

    Args:
        name_or_path: the name of a built-in model, a path, or a hub id.
        as_stored: keep each weight that a file holds in half precision, which takes half the memory; else fp32.
        decoder: folder of a small decoder to put in the place of the VAE; see `sdcompress.models.decoder`.

    Raises:
        UsageError: the path does not exist.
        ModelError: there is no pipeline, a component is missing or broken, or the decoder is for another VAE.
    """
    if decoder is not None:
        from sdcompress.models.decoder import locate_decoder

        locate_decoder(decoder)  # before the model is read
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
    plan = find_plan(folder, pipeline.unet.config)
    if decoder is None:
        return LoadedPipeline(name, pipeline, hash_pipeline(folder), folder, plan=plan)
    from sdcompress.models.decoder import load_decoder

    small = load_decoder(decoder, pipeline, _choose_dtype(as_stored))
    diffusers_pipeline: Any = pipeline
    diffusers_pipeline.register_modules(vae=small.network)
    return LoadedPipeline(name, pipeline, hash_pipeline(folder), folder, small.sha256, small.note, plan)


def _choose_dtype(as_stored: bool) -> Callable[[torch.dtype], torch.dtype]:
    """Returns the function from the dtype of a stored weight to that of the parameter."""
    import torch

    from sdcompress.checkpoints.component import keep_half

    return keep_half if as_stored else lambda stored: torch.float32


def _load_folder(folder: Path, as_stored: bool) -> TextToImagePipeline:
    from sdcompress.checkpoints.folder import load_component
    from sdcompress.families.build import build_pipeline, build_scheduler, load_tokenizer
    from sdcompress.families.registry import family_of_pipeline
    from sdcompress.families.schemas.check import check_match
    from sdcompress.families.schemas.index import component_classes

    index = read_model_index(folder)
    components = component_classes(index["_class_name"])
    tokenizers = [name for name in components if name.startswith("tokenizer")]
    configs = {name: read_config_in(folder, name) for name in components if name not in tokenizers}
    scheduler = configs.pop("scheduler")
    check_match(configs, folder, index)
    parts: dict[str, Any] = {
        "scheduler": build_scheduler(scheduler, folder / "scheduler", class_name=index["scheduler"][1])
    }
    parts |= {name: load_tokenizer(folder / name) for name in tokenizers}
    family = family_of_pipeline(index["_class_name"], configs["unet"])
    choose_dtype = _choose_dtype(as_stored)
    for name, config in configs.items():
        parts[name] = load_component(folder / name, name, config, choose_dtype, family)
    return build_pipeline(index, parts, folder)
