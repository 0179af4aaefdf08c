"""A diffusers pipeline that runs on a backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from sdcompress_engines.errors import BackendMissing, EngineMismatch, UsageError
from sdcompress_engines.exactness import use_ieee_fp32
from sdcompress_engines.manifest import read_manifest
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.backends.backend import Backend, UNetRequest
from sdcompress.backends.cached import cached_artifacts
from sdcompress.backends.exported import open_exported
from sdcompress.backends.registry import (
    AUTO,
    FALLBACKS,
    backend_name,
    backend_of_artifact,
    find_backend,
)
from sdcompress.export.components import DTYPES, Precision
from sdcompress.models.load import load_pipeline
from sdcompress.models.locate import hash_pipeline, locate_pipeline
from sdcompress.sampling import keep_timesteps_on_host
from sdcompress.support.pipeline import TextToImagePipeline


def open_pipeline(
    model: str | Path,
    backend: str = "torch",
    artifacts: Path | None = None,
    *,
    device: str | None = None,
    precision: Precision | None = None,
    fallback: str | None = None,
    steady: bool = False,
    report: Reporter = SILENT,
) -> TextToImagePipeline:
    """Returns a diffusers pipeline for `model` that runs on `backend`; free it with `close_pipeline`.

    | backend | what runs where |
    |---|---|
    | `torch` | PyTorch; channels last in half precision |
    | `compile` | the UNet through `torch.compile`, which compiles at the first picture; on CUDA as a CUDA graph |
    | `aot` | the UNet as a package that AOTInductor compiled ahead of time; on CUDA as a CUDA graph |
    | `onnxruntime` | every component as an ONNX graph, on the CPU or CUDA |
    | `tensorrt` | every component as a TensorRT engine |
    | `auto` | the fastest of these for this model on this machine, by measurement; see `sdcompress.backends.fastest` |

    Args:
        model: what `load_pipeline` takes, or a folder written by `sdcompress export`.
        artifacts: the exported graphs or engines; without it they are made once and kept in the cache folder.
        device: by default cuda where there is one.
        precision: of what is computed in torch or exported now; by default fp16 on cuda, fp32 on the CPU. Given
            artifacts have their own. fp32 is IEEE fp32: TF32 is off in this process from then on.
        fallback: `torch` runs the UNet in PyTorch where an engine does not take a shape, and reports it; without it
            such a shape is an error.
        steady: with TensorRT-RTX, compile kernels for a shape before its first run, not beside it, so that the first
            time measured is the final one.

    Raises:
        UsageError: unknown backend or path. BackendMissing: the runtime is not installed, or has no device.
        ModelError: not a pipeline. EngineMismatch: artifacts of another model.
    """
    backend = backend_name(backend)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if fallback is not None and fallback not in FALLBACKS:
        raise UsageError(f"no fallback {fallback!r}", expected=" or ".join(FALLBACKS))
    manifest = read_manifest(Path(model)) if Path(model).is_dir() else None
    if manifest is not None and (owner := backend_of_artifact(manifest.kind)) is not None:
        _check_export_runs(str(model), manifest.kind, owner, backend, fallback)
        return open_exported(Path(model), device, steady=steady)
    if backend == AUTO:
        from sdcompress.backends.fastest import find_fastest

        backend, precision = find_fastest(model, device=device, report=report)
    entry = find_backend(backend)
    if backend == "tensorrt" and not torch.cuda.is_available():
        raise BackendMissing(
            "TensorRT engines run on an NVIDIA GPU and none is here", hint="--backend ort, or --backend torch"
        )
    precision = precision or ("fp16" if device.startswith("cuda") else "fp32")
    if precision == "fp32":
        use_ieee_fp32()
    if entry.artifact is None:
        pipeline = _open_in_torch(entry, model, device, precision, artifacts, report)
    else:
        if artifacts is not None:
            _check_same_model(model, artifacts)
        folder = artifacts or cached_artifacts(model, backend, precision, report)
        make_unet = _fallback_unet(model, device, precision) if fallback else None
        pipeline = open_exported(folder, device, make_unet=make_unet, steady=steady, report=report)
    if device.startswith("cuda"):
        keep_timesteps_on_host(pipeline)
    return pipeline


def close_pipeline(pipeline: TextToImagePipeline) -> None:
    """Free the runners of a pipeline. TensorRT-RTX stores the kernels it compiled only then."""
    for part in pipeline.components.values():
        if callable(close := getattr(part, "close", None)):
            close()


def _check_export_runs(model: str, kind: str, owner: Backend, backend: str, fallback: str | None) -> None:
    """Refuse an export folder that the chosen backend or fallback cannot run."""
    if backend not in (owner.name, AUTO):
        raise UsageError(
            f"holds {kind} graphs, which {backend} does not run", where=model, hint=f"--backend {owner.short_name}"
        )
    if fallback:
        raise UsageError(
            f"--fallback {fallback} with an export folder, which has no torch weights",
            where=model,
            hint="give the model, and the folder as its artifacts",
        )


def _open_in_torch(
    backend: Backend, model: str | Path, device: str, precision: Precision, artifacts: Path | None, report: Reporter
) -> TextToImagePipeline:
    """Returns the pipeline in torch, with the backend's runner in the place of the UNet where it has one."""
    loaded = load_pipeline(model)
    pipeline = loaded.pipeline
    # No `dtype` for fp32: nothing changes, and diffusers refuses a dtype without a safety checker in half precision.
    pipeline = pipeline.to(device) if precision == "fp32" else pipeline.to(device, DTYPES[precision])
    if precision != "fp32":
        for part in (pipeline.unet, pipeline.vae):
            part.to(memory_format=torch.channels_last)
    if backend.open_unet is not None:
        from sdcompress_engines.unet import EngineUNet

        runner = backend.open_unet(UNetRequest(loaded, device, precision, artifacts, report))
        pipeline.unet = EngineUNet(runner, dict(pipeline.unet.config))
    return pipeline


def _fallback_unet(model: str | Path, device: str, precision: Precision) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        unet: torch.nn.Module = load_pipeline(model).pipeline.unet.to(device, DTYPES[precision])
        return unet.eval()

    return make


def _check_same_model(model: str | Path, artifacts: Path) -> None:
    """Refuse artifacts whose manifest names another pipeline than `model`."""
    manifest = read_manifest(artifacts)
    source = None if manifest is None else manifest.inputs.get("pipeline")
    if source is not None and source != (own := hash_pipeline(locate_pipeline(model))):
        raise EngineMismatch(
            f"was made from another model ({source[:12]})",
            where=artifacts,
            expected=f"one made from {model} ({own[:12]})",
            hint="sdcompress export MODEL --trt -o DIR",
        )
