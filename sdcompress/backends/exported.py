"""Opening an export folder as a diffusers pipeline, with a runner in the place of each component."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ModelError
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.runners import Runner, SharedMemory, open_runner
from sdcompress_engines.text_encoders import EngineTextEncoder, EngineTextEncoderWithProjection
from sdcompress_engines.unet import EngineUNet
from sdcompress_engines.vae import EngineVaeDecoder

from sdcompress.backends.registry import backends
from sdcompress.families.build import build_scheduler, load_tokenizer
from sdcompress.models.locate import read_component_config, read_model_index
from sdcompress.support.pipeline import TextToImagePipeline


def open_exported(
    folder: Path,
    device: str,
    *,
    make_unet: Callable[[], torch.nn.Module] | None = None,
    steady: bool = False,
    report: Reporter = SILENT,
) -> TextToImagePipeline:
    """Returns a pipeline of the exported pipeline's class whose components are the folder's graphs or engines.

    Args:
        folder: as `export_onnx` or `build_engines` writes it.
        device: `cpu`, `cuda` or `cuda:N`.
        make_unet: returns a UNet in torch for shapes that the engine does not take; None makes such a shape an error.
        steady: compile the kernels of TensorRT-RTX for a shape before its first run.
        report: gets a line when the UNet in torch is used.

    Raises:
        ModelError: `folder` is not an export, or a component's graph is missing. EngineError, EngineMismatch,
            BackendMissing: as `open_runner`.
    """
    import diffusers

    configs = folder / "pipeline"
    if not (configs / "model_index.json").is_file():
        raise ModelError(
            "holds no exported pipeline",
            where=folder,
            expected=(
                "a folder with graphs or engines and pipeline/; of `export --trt -o DIR` it is DIR/onnx or DIR/engine"
            ),
        )
    index = read_model_index(configs)
    open_graph = _GraphOpener(folder, device, steady)
    components: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        class_name = entry[1]
        if class_name is None:
            components[name] = None
        elif name == "unet":
            config = read_component_config(configs, name)
            components[name] = EngineUNet(open_graph.open(name), config, fallback=make_unet, report=report)
        elif name in ("text_encoder", "text_encoder_2"):
            wrapper = EngineTextEncoder if name == "text_encoder" else EngineTextEncoderWithProjection
            components[name] = wrapper(open_graph.open(name), read_component_config(configs, name))
        elif name == "vae":
            decoder, encoder = open_graph.open("vae_decoder"), open_graph.open_optional("vae_encoder")
            components[name] = EngineVaeDecoder(decoder, read_component_config(configs, name), encoder=encoder)
        elif name == "scheduler":
            components[name] = build_scheduler(read_component_config(configs, name), configs / name, class_name)
        else:
            components[name] = load_tokenizer(configs / name)
    if "safety_checker" in components:
        components["requires_safety_checker"] = False
    pipeline: TextToImagePipeline = getattr(diffusers, index["_class_name"])(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _GraphOpener:
    """Opens the graphs of an export folder.

    Engines share one activation memory, because a pipeline runs its components one after another.
    """

    def __init__(self, folder: Path, device: str, steady: bool) -> None:
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
        suffixes = {backend.suffix for backend in backends().values() if backend.artifact}
        paths = sorted(path for path in self.folder.glob(f"{component}.*") if path.suffix in suffixes)
        if not paths:
            return None
        if paths[0].suffix != ".engine":
            return open_runner(paths[0], device=self.device)
        return open_runner(
            paths[0], device=self.device, memory=self.memory, cuda_graph=component == "unet", kernels=self.kernels
        )
