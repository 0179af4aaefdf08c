"""Pictures from a pipeline on any backend."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from sdcompress_engines.errors import BackendMissing, DataError, ModelError, UsageError
from sdcompress_engines.progress import SILENT, Reporter

BACKENDS = ("torch", "onnxruntime", "tensorrt")
BACKEND_ALIASES = {"ort": "onnxruntime", "trt": "tensorrt"}


def backend_name(name: str) -> str:
    """The full name of a backend given by name or alias.

    Raises:
        UsageError: no such backend.
    """
    full = BACKEND_ALIASES.get(name, name)
    if full not in BACKENDS:
        raise UsageError(f"no backend {name!r}", expected=f"one of {', '.join([*BACKENDS, *BACKEND_ALIASES])}")
    return full


def load_pipeline(model: str | Path, backend: str = "torch", artifacts: Path | None = None, *, device: str | None = None, report: Reporter = SILENT) -> Any:
    """A diffusers pipeline for `model` whose UNet, text encoder and VAE decoder run on `backend`.

    Args:
        model: what `load_teacher` takes, or a folder written by `sdcompress export`.
        artifacts: the exported graphs or engines; without it they are made once and kept in the cache folder.
        device: for torch; cuda where there is one.

    Raises:
        UsageError: unknown backend or path. BackendMissing: the runtime is not installed, or has no device. ModelError: not a pipeline.
    """
    from sdcompress_engines.manifest import read_manifest

    from sdcompress.teacher import load_teacher

    backend = backend_name(backend)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    manifest = read_manifest(Path(model)) if Path(model).is_dir() else None
    if manifest is not None and manifest.kind in ("onnx", "engine"):
        if backend == "torch":
            raise UsageError(f"holds {manifest.kind} graphs, which torch does not run", where=str(model), hint=f"--backend {'ort' if manifest.kind == 'onnx' else 'trt'}")
        return _assemble(Path(model), device)
    if backend == "tensorrt" and not torch.cuda.is_available():
        raise BackendMissing("TensorRT engines run on an NVIDIA GPU and none is here", hint="--backend ort, or --backend torch")
    if backend == "torch":
        pipeline: Any = load_teacher(model).pipeline
        if device == "cuda":
            pipeline = pipeline.to(device, torch.float16)
        return pipeline
    return _assemble(artifacts or _cached_artifacts(model, backend, report), device)


def _cached_artifacts(model: str | Path, backend: str, report: Reporter) -> Path:
    from sdcompress import nano
    from sdcompress.export import build_engines, export_onnx
    from sdcompress.teacher import load_teacher

    loaded = load_teacher(model)
    precision: Literal["fp32", "fp16"] = "fp16" if backend == "tensorrt" else "fp32"
    folder = nano.cache_folder() / f"{loaded.name}-{loaded.sha256[:12]}"
    graphs = folder / f"onnx-{precision}"
    if not graphs.is_dir():
        report.say(f"no graphs given: exporting {loaded.name} once to {graphs}")
        export_onnx(loaded.pipeline, graphs, precision=precision, source={"pipeline": loaded.sha256}, report=report)
    if backend == "onnxruntime":
        return graphs
    engines = folder / "engine"
    if not engines.is_dir():
        build_engines(graphs, engines, report=report)
    return engines


def _assemble(folder: Path, device: str) -> Any:
    """The exported pipeline's own class around the runners of an export folder."""
    import diffusers
    from sdcompress_engines.runners import open_runner
    from sdcompress_engines.unet import EngineTextEncoder, EngineUNet, EngineVaeDecoder

    from sdcompress.teacher import model_index

    configs = folder / "pipeline"
    index = model_index(configs)
    stand_ins = {"unet": ("unet", EngineUNet), "text_encoder": ("text_encoder", EngineTextEncoder), "vae": ("vae_decoder", EngineVaeDecoder)}
    components: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        library, kind = entry
        if name in stand_ins:
            graph, wrapper = stand_ins[name]
            found = sorted(p for p in folder.glob(f"{graph}.*") if p.suffix in (".onnx", ".engine"))
            if not found:
                raise ModelError(f"has no graph of the {graph}", where=folder, hint="sdcompress export MODEL -o DIR, with every component")
            components[name] = wrapper(open_runner(found[0], device=device), json.loads((configs / name / "config.json").read_text()))
        elif kind is None:
            components[name] = None
        else:
            components[name] = getattr(importlib.import_module(library), kind).from_pretrained(configs / name)
    if "safety_checker" in components:
        components["requires_safety_checker"] = False
    pipeline = getattr(diffusers, index["_class_name"])(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def initial_latents(pipeline: Any, seeds: Sequence[int], size_px: int) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Unit Gaussian latents (B, C, size/f, size/f), fp32 on the CPU, one seed a picture, and the generators that drew them."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    side = size_px // pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, side, side)
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators]), generators


def default_guidance_scale(own_size_px: int) -> float:
    """7.5, as Stable Diffusion is used; 4 for nano and its students, told by the size they were made for: at 7.5 their colours burn out."""
    return 7.5 if own_size_px >= 256 else 4.0


def generate(
    pipeline: Any, prompts: Sequence[str], *, seeds: Sequence[int], steps: int = 25, guidance_scale: float | None = None, size_px: int | None = None, negative_prompt: str | None = None, batch_size: int = 16
) -> list[Image.Image]:
    """One picture a prompt. Noise comes from each picture's own seed and in fp32, so neither batch size nor precision changes what is drawn.

    Args:
        prompts, seeds: of equal length.
        guidance_scale: of classifier-free guidance; None is `default_guidance_scale`.
        size_px: side in pixels; None is what the UNet was made for.

    Raises:
        DataError: prompts and seeds differ in number.
    """
    if len(prompts) != len(seeds):
        raise DataError(f"{len(prompts)} prompts and {len(seeds)} seeds", expected="a seed for each prompt")
    own_size_px = int(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor
    size_px = size_px or own_size_px
    guidance_scale = default_guidance_scale(own_size_px) if guidance_scale is None else guidance_scale
    pipeline.set_progress_bar_config(disable=True)
    pipeline.safety_checker = None
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        latents, generators = initial_latents(pipeline, seeds[start : start + batch_size], size_px)
        negative = [negative_prompt] * len(chunk) if negative_prompt else None
        with torch.no_grad():
            pictures += pipeline(
                chunk, negative_prompt=negative, num_inference_steps=steps, guidance_scale=guidance_scale, height=size_px, width=size_px,
                latents=latents.to(pipeline.unet.device, pipeline.unet.dtype), generator=generators,
            ).images  # fmt: skip
    return pictures


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size side by side, as square as they go unless `columns` is given."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
