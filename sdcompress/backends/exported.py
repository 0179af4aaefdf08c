"""Opening an export folder as a diffusers pipeline, with a runner in the place of each component."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ModelError
from sdcompress_engines.export_folder import check_export
from sdcompress_engines.manifest import Manifest
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.runners import Runner, SharedMemory, open_runner
from sdcompress_engines.text_encoders import EngineTextEncoder, EngineTextEncoderWithProjection
from sdcompress_engines.trust import check_trusted, code_files
from sdcompress_engines.unet import EngineUNet
from sdcompress_engines.vae import EngineVaeDecoder

from sdcompress.backends.registry import backend_of_artifact, backends
from sdcompress.families.build import build_pipeline, build_scheduler, load_tokenizer
from sdcompress.families.schemas.check import check_match
from sdcompress.lora.pipeline_loras import enable_loras
from sdcompress.models.locate import read_config_in, read_model_index
from sdcompress.prune.plan import PLAN_ENTRY, BlockPlan
from sdcompress.support.pipeline import TextToImagePipeline

_RUN_FROM_GRAPHS = ("unet", "vae", "text_encoder", "text_encoder_2")


def open_exported(
    folder: Path,
    device: str,
    *,
    make_unet: Callable[[], torch.nn.Module] | None = None,
    steady: bool = False,
    report: Reporter = SILENT,
) -> TextToImagePipeline:
    """Returns a pipeline of the exported pipeline's class whose components are the folder's graphs or engines.

    Every file is compared with the folder's manifest first, and every engine has to be built here or allowed.

    Args:
        folder: as `export_onnx` or `build_engines` writes it.
        device: `cpu`, `cuda` or `cuda:N`.
        make_unet: returns a UNet in torch for shapes that the engine does not take; None makes such a shape an error.
        steady: compile the kernels of TensorRT-RTX for a shape before its first run.
        report: gets a line when the UNet in torch is used, and about LoRAs.

    Raises:
        ModelError: `folder` is not an export, or a component's graph is missing. ArtifactError: it is not as its
            manifest says. NotTrusted: an engine was built elsewhere. EngineError, EngineMismatch, BackendMissing: as
            `open_runner`.
    """
    configs = folder / "pipeline"
    if not (configs / "model_index.json").is_file():
        raise ModelError(
            "holds no exported pipeline",
            where=folder,
            expected=(
                "a folder with graphs or engines and pipeline/; of `export --trt -o DIR` it is DIR/onnx or DIR/engine"
            ),
        )
    manifest = check_export(folder, artifact_kinds())
    for name, sha256 in code_files(manifest).items():
        check_trusted(folder / name, sha256)
    index = read_model_index(configs)
    parts = {name: entry for name, entry in index.items() if not name.startswith("_") and isinstance(entry, list)}
    described = {name: read_config_in(configs, name) for name in _RUN_FROM_GRAPHS if parts.get(name, [None])[0]}
    check_match(described, configs, index)
    opener = _GraphOpener(folder, manifest, device, steady)
    pipeline = _assemble(index, parts, described, opener, make_unet, report)
    plan = manifest.config.get(PLAN_ENTRY)
    enable_loras(pipeline, None if plan is None else BlockPlan.from_content(plan, folder), report)
    return pipeline


def artifact_kinds() -> list[str]:
    """Returns the kinds of manifest that an export folder may have."""
    return [backend.artifact for backend in backends().values() if backend.artifact]


def looks_exported(folder: Path) -> bool:
    """Returns whether a folder holds graphs or engines of a pipeline, whatever its manifest says."""
    suffixes = {backend.suffix for backend in backends().values() if backend.artifact}
    names = os.listdir(folder) if (folder / "pipeline" / "model_index.json").is_file() else []
    return any(Path(name).suffix in suffixes for name in names)


def _assemble(
    index: Mapping[str, Any],
    parts: Mapping[str, Sequence[Any]],
    described: Mapping[str, dict[str, Any]],
    open_graph: _GraphOpener,
    make_unet: Callable[[], torch.nn.Module] | None,
    report: Reporter,
) -> TextToImagePipeline:
    """Returns the pipeline.

    Args:
        index: the pipeline's `model_index.json`.
        parts: its components: name → library and class.
        described: the configs of those that run from graphs.
        open_graph: opens the graphs.
        make_unet, report: see `open_exported`.
    """
    components: dict[str, Any] = {}
    configs = open_graph.folder / "pipeline"
    for name, (_, class_name) in parts.items():
        if class_name is None:
            components[name] = None
        elif name == "unet":
            components[name] = EngineUNet(open_graph.open(name), described[name], fallback=make_unet, report=report)
        elif name in ("text_encoder", "text_encoder_2"):
            wrapper = EngineTextEncoder if name == "text_encoder" else EngineTextEncoderWithProjection
            components[name] = wrapper(open_graph.open(name), described[name])
        elif name == "vae":
            decoder, encoder = open_graph.open("vae_decoder"), open_graph.open_optional("vae_encoder")
            components[name] = EngineVaeDecoder(decoder, described[name], encoder=encoder)
        elif name == "scheduler":
            components[name] = build_scheduler(read_config_in(configs, name), configs / name, class_name)
        else:
            components[name] = load_tokenizer(configs / name)
    pipeline = build_pipeline(index, {name: part for name, part in components.items() if part is not None}, configs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _GraphOpener:
    """Opens the graphs of an export folder.

    Engines share one activation memory, because a pipeline runs its components one after another.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: str, steady: bool) -> None:
        backend = backend_of_artifact(manifest.kind)
        self.suffix = None if backend is None else backend.suffix
        self.files = manifest.files
        self.folder, self.device, self.kernels = folder, device, "eager" if steady else "lazy"
        self.memory = SharedMemory(device) if device.startswith("cuda") else None

    def open(self, component: str) -> Runner:
        """Returns the open runner of a component that must be there."""
        runner = self.open_optional(component)
        if runner is None:
            raise ModelError(
                f"has no graph of the {component}",
                where=self.folder,
                hint="sdcompress export MODEL -o DIR, with every component",
            )
        return runner

    def open_optional(self, component: str) -> Runner | None:
        """Returns the open runner of a component, or None where the folder does not hold it."""
        name = f"{component}{self.suffix}"
        if name not in self.files:
            return None
        path = self.folder / name
        if self.suffix != ".engine":
            return open_runner(path, device=self.device)
        return open_runner(
            path, device=self.device, memory=self.memory, cuda_graph=component == "unet", kernels=self.kernels
        )
