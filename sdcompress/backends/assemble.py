"""Opening a diffusers pipeline that runs on a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sdcompress_engines.command import command_line
from sdcompress_engines.errors import BackendMissing, EngineMismatch, UsageError
from sdcompress_engines.exactness import use_ieee_fp32
from sdcompress_engines.export_folder import check_export
from sdcompress_engines.manifest import read_manifest
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.unet import EngineUNet

from sdcompress.backends.backend import Backend, UNetRequest
from sdcompress.backends.cached import cached_artifacts
from sdcompress.backends.exported import artifact_kinds, looks_exported, open_exported
from sdcompress.backends.registry import (
    AUTO,
    FALLBACKS,
    backend_name,
    backend_of_artifact,
    find_backend,
)
from sdcompress.export.components import DTYPES, Precision
from sdcompress.lora.pipeline_loras import enable_loras
from sdcompress.models.decoder import locate_decoder
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
    decoder: Path | None = None,
    loras: bool = False,
    report: Reporter = SILENT,
) -> TextToImagePipeline:
    """Returns a diffusers pipeline for `model` that runs on `backend`; free it with `close_pipeline`.

    Its method `set_loras([(file, weight), ...])` puts LoRAs into it, on every backend: see `PipelineLoras.set`.

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
        backend: a name or alias of the registry, or `auto`.
        artifacts: the exported graphs or engines. Without it they are made once and kept in the cache folder.
        device: by default cuda where there is a GPU.
        precision: of what is computed in torch or exported now; by default fp16 on cuda, fp32 on the CPU. Given
            artifacts have their own. fp32 is IEEE fp32: TF32 is off in this process from then on.
        fallback: `torch` runs the UNet in PyTorch where an engine does not take a shape, and reports it. Without it
            such a shape is an error.
        steady: compile the kernels of TensorRT-RTX for a shape before its first run, not during it.
        decoder: folder of a small decoder to run in the place of the VAE.
        loras: whether LoRAs will be set; on a CPU, the faster package of `aot` takes none.
        report: gets the progress.

    Raises:
        UsageError: unknown backend or path. BackendMissing: no such runtime or device. ModelError: not a pipeline.
            EngineMismatch: artifacts of another model. ArtifactError: an export that is not as its manifest says.
            NotTrusted: an engine or package that was built elsewhere.
    """
    backend = backend_name(backend)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_fallback(fallback)
    if (owner := _find_owner(Path(model))) is not None:
        _check_export_runs(str(model), owner, backend, fallback, has_choice=bool(precision or artifacts or decoder))
        return open_exported(Path(model), device, steady=steady, report=report)
    _check_effect(backend, device, precision, artifacts, fallback)
    _check_decoder(decoder, backend, artifacts)
    if backend == AUTO:
        from sdcompress.backends.fastest import find_fastest

        backend, precision = find_fastest(model, device=device, report=report)
    chosen = find_backend(backend), device, precision or default_precision(device)
    return _open_model(model, _Target(*chosen, artifacts, decoder, loras, report), fallback, steady)


def close_pipeline(pipeline: TextToImagePipeline) -> None:
    """Free the runners of a pipeline. TensorRT-RTX stores the kernels that it compiled only then."""
    for part in pipeline.components.values():
        if callable(close := getattr(part, "close", None)):
            close()


def default_precision(device: str) -> Precision:
    """Returns the precision to compute in where none is requested: fp16 on CUDA, fp32 on the CPU."""
    return "fp16" if device.startswith("cuda") else "fp32"


def _find_owner(model: Path) -> Backend | None:
    """Returns the backend that runs an export folder; None where `model` is none.

    Raises:
        ArtifactError: a folder with graphs or engines whose manifest is missing, damaged or of another kind.
    """
    manifest = read_manifest(model) if model.is_dir() else None
    owner = None if manifest is None else backend_of_artifact(manifest.kind)
    if owner is None and model.is_dir() and looks_exported(model):
        check_export(model, artifact_kinds())
    return owner


def _check_export_runs(model: str, owner: Backend, backend: str, fallback: str | None, *, has_choice: bool) -> None:
    """Refuse an export folder that the chosen backend or fallback cannot run, and choices that it has made.

    Args:
        model: the folder.
        owner: the backend that runs it.
        backend, fallback: the chosen ones.
        has_choice: a precision, artifacts or a decoder were chosen.
    """
    if has_choice:
        what = "is an export folder, which has its own precision and files"
        raise UsageError(what, where=model, hint="leave out --precision, --artifacts and --decoder")
    if backend not in (owner.name, AUTO):
        raise UsageError(
            f"is an export of kind {owner.artifact}, which the backend {backend} does not run",
            where=model,
            hint=f"--backend {owner.short_name}",
        )
    if fallback:
        raise UsageError(
            f"--fallback {fallback} with an export folder, which has no torch weights",
            where=model,
            hint=f"the model itself, with {command_line(['--artifacts', model])}",
        )


@dataclass(frozen=True)
class _Target:
    """What a pipeline is opened for; see `open_pipeline`."""

    backend: Backend
    device: str
    precision: Precision
    artifacts: Path | None
    decoder: Path | None
    loras: bool
    report: Reporter


def _open_model(model: str | Path, target: _Target, fallback: str | None, steady: bool) -> TextToImagePipeline:
    """Returns the pipeline of a model that is no export folder.

    Args:
        model, fallback, steady: see `open_pipeline`.
        target: the rest of its arguments.
    """
    backend, device, precision = target.backend, target.device, target.precision
    if "cpu" not in backend.devices and not torch.cuda.is_available():
        raise BackendMissing(
            f"{backend.title} runs on an NVIDIA GPU and none is here", hint="--backend ort, or --backend torch"
        )
    if precision == "fp32":
        use_ieee_fp32()
    if target.artifacts is not None:
        _check_same_model(model, target.artifacts)
    if backend.artifact is None:
        pipeline = _open_in_torch(model, target)
    else:
        pipeline = _open_graphs(model, target, fallback, steady)
    if device.startswith("cuda"):
        keep_timesteps_on_host(pipeline)
    return pipeline


def _open_graphs(model: str | Path, target: _Target, fallback: str | None, steady: bool) -> TextToImagePipeline:
    """Returns the pipeline of a model whose components are graphs or engines, those given or those in the cache."""
    backend, device, precision = target.backend, target.device, target.precision
    folder = target.artifacts or cached_artifacts(
        model, backend.name, precision, target.report, decoder=target.decoder, loras=target.loras
    )
    make_unet = _fallback_unet(model, device, precision) if fallback else None
    return open_exported(folder, device, make_unet=make_unet, steady=steady, report=target.report)


def _check_fallback(fallback: str | None) -> None:
    if fallback is not None and fallback not in FALLBACKS:
        raise UsageError(f"no fallback {fallback!r}", expected=" or ".join(FALLBACKS))


def _check_effect(
    name: str, device: str, precision: Precision | None, artifacts: Path | None, fallback: str | None
) -> None:
    """Refuse options that have no effect with a backend, and a precision that it does not compute.

    Args:
        name: of the backend, or `auto`.
        device, precision, artifacts, fallback: as of `open_pipeline`.
    """
    if name == AUTO:
        if precision is not None or artifacts is not None:
            what = "a precision or artifacts with the backend auto, which chooses both"
            raise UsageError(what, hint="leave them out, or name a backend")
        return
    backend, kind = find_backend(name), device.partition(":")[0]
    if artifacts is not None and backend.artifact is None and backend.cached_unet is None:
        hint = "the backend that runs them, such as --backend ort, or leave out --artifacts"
        raise UsageError(f"the backend {backend.short_name} runs no artifacts", where=artifacts, hint=hint)
    if fallback is not None and backend.artifact is None:
        what = f"--fallback {fallback} with the backend {backend.short_name}: only graphs and engines fall back"
        raise UsageError(what, hint="leave out --fallback")
    if artifacts is None and (reason := backend.lacks.get(kind, {}).get(precision or default_precision(device))):
        raise BackendMissing(reason, hint="another --precision, or --backend torch")


def _check_decoder(decoder: Path | None, name: str, artifacts: Path | None) -> None:
    """Refuse a folder that is no small decoder, and artifacts that have a decoder already.

    Args:
        decoder: the folder, or None.
        name: of the backend, or `auto`.
        artifacts: as of `open_pipeline`.
    """
    if decoder is None:
        return
    locate_decoder(decoder)
    if artifacts is not None and name != AUTO and find_backend(name).artifact is not None:
        raise UsageError(
            "--decoder with --artifacts, which have their own",
            where=artifacts,
            hint=f"{command_line(['sdcompress', 'export', 'MODEL', '--decoder', str(decoder)])} -o DIR",
        )


def _open_in_torch(model: str | Path, target: _Target) -> TextToImagePipeline:
    """Returns the pipeline in torch, with the backend's runner in the place of the UNet where it has one."""
    backend, device, precision = target.backend, target.device, target.precision
    loaded = load_pipeline(model, decoder=target.decoder)
    if loaded.note:
        target.report.show_line(loaded.note)
    pipeline = loaded.pipeline
    # No `dtype` for fp32: nothing changes, and diffusers refuses a dtype without a safety checker in half precision.
    pipeline = pipeline.to(device) if precision == "fp32" else pipeline.to(device, DTYPES[precision])
    if precision != "fp32":
        for part in (pipeline.unet, pipeline.vae):
            part.to(memory_format=torch.channels_last)
    if backend.open_unet is not None:
        request = UNetRequest(loaded, device, precision, target.artifacts, target.report, target.loras)
        pipeline.unet = EngineUNet(backend.open_unet(request), dict(pipeline.unet.config))
    enable_loras(pipeline, loaded.plan, target.report)
    return pipeline


def _fallback_unet(model: str | Path, device: str, precision: Precision) -> Callable[[], torch.nn.Module]:
    """Returns a function that loads the UNet in torch."""

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
