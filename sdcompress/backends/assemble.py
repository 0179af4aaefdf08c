"""A diffusers pipeline that runs on a backend."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import BackendMissing, EngineMismatch, ModelError, UsageError
from sdcompress_engines.exactness import use_ieee_fp32
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.backends.cached import cached_artifacts
from sdcompress.backends.registry import FALLBACKS, backend_name
from sdcompress.export.components import DTYPES, Precision, signature_of


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
) -> Any:
    """A diffusers pipeline for `model` that runs on `backend`.

    | backend | what runs where |
    |---|---|
    | `torch` | PyTorch as it is; channels last in half precision |
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
        steady: with TensorRT-RTX, compile kernels for a shape before its first run, not beside it: what is timed then
            is what stays.
        fallback: `torch` runs the UNet in PyTorch where an engine does not take a shape, and says so; without it that
            is an error.

    Raises:
        UsageError: unknown backend or path. BackendMissing: the runtime is not installed, or has no device. ModelError:
            not a pipeline.
        EngineMismatch: artifacts of another model.
    """
    from sdcompress_engines.manifest import read_manifest

    backend = backend_name(backend)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if fallback is not None and fallback not in FALLBACKS:
        raise UsageError(f"no fallback {fallback!r}", expected=" or ".join(FALLBACKS))
    manifest = read_manifest(Path(model)) if Path(model).is_dir() else None
    if manifest is not None and manifest.kind in ("onnx", "engine"):
        own = "onnxruntime" if manifest.kind == "onnx" else "tensorrt"
        if backend not in (own, "auto"):
            raise UsageError(
                f"holds {manifest.kind} graphs, which {backend} does not run",
                where=str(model),
                hint=f"--backend {'ort' if own == 'onnxruntime' else 'trt'}",
            )
        if fallback:
            raise UsageError(
                f"--fallback {fallback} with an export folder, which has no torch weights",
                where=str(model),
                hint="give the model, and the folder as its artifacts",
            )
        return _assemble(Path(model), device, steady=steady)
    if backend == "auto":
        from sdcompress.backends.fastest import find_fastest

        backend, precision = find_fastest(model, device=device, report=report)
    if backend == "tensorrt" and not torch.cuda.is_available():
        raise BackendMissing(
            "TensorRT engines run on an NVIDIA GPU and none is here", hint="--backend ort, or --backend torch"
        )
    precision = precision or ("fp16" if device.startswith("cuda") else "fp32")
    if precision == "fp32":
        use_ieee_fp32()
    if backend in ("torch", "compile", "aot"):
        pipeline = _torch_pipeline(model, backend, device, precision, artifacts, report)
    else:
        if artifacts is not None:
            _check_same_model(model, artifacts)
        make_unet = _fallback_unet(model, device, precision) if fallback else None
        pipeline = _assemble(
            artifacts or cached_artifacts(model, backend, precision, report), device, make_unet, report, steady
        )
    if device.startswith("cuda"):
        keep_timesteps_on_host(pipeline)
    return pipeline


def _torch_pipeline(
    model: str | Path, backend: str, device: str, precision: Precision, artifacts: Path | None, report: Reporter
) -> Any:
    from sdcompress.models.load import load_pipeline

    loaded = load_pipeline(model)
    pipeline: Any = loaded.pipeline
    # No `dtype` for fp32: diffusers refuses it while a safety checker is off in half precision, and there is nothing to
    # change.
    pipeline = pipeline.to(device) if precision == "fp32" else pipeline.to(device, DTYPES[precision])
    if precision != "fp32":
        for part in (pipeline.unet, pipeline.vae):
            part.to(memory_format=torch.channels_last)
    if backend != "torch":
        from sdcompress_engines.unet import EngineUNet

        pipeline.unet = EngineUNet(
            _unet_runner(loaded, backend, device, precision, artifacts, report), dict(pipeline.unet.config)
        )
    return pipeline


def _unet_runner(
    loaded: Any, backend: str, device: str, precision: Precision, artifacts: Path | None, report: Reporter
) -> Any:
    """Returns the runner of a UNet that torch has compiled: every caller reaches it by the same arguments in the same
    mode, so it compiles once.
    """
    from sdcompress_engines.runners import TorchRunner

    from sdcompress.export.aot import cached_package, open_package

    if backend == "aot":
        return open_package(
            (artifacts / "unet.pt2") if artifacts else cached_package(loaded, device, precision, report), device
        )
    unet = loaded.pipeline.unet
    wanted = signature_of("unet", unet, precision)
    return TorchRunner(
        PositionalUNet(unet), wanted.inputs, wanted.outputs, "compile", cuda_graph=device.startswith("cuda")
    )


class PositionalUNet(torch.nn.Module):
    """A UNet that takes its inputs in the order of its signature and answers with a tuple; its weights are those of
    `unet`.
    """

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Returns the prediction, shaped as `sample`.

        Args:
            sample: noisy latents, (B, 4, H/8, W/8). timestep: (B,) float32. encoder_hidden_states: (B, 77·k, C).
            text_embeds, time_ids: SDXL's, (B, E) and (B, 6).
        """
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        found: tuple[torch.Tensor, ...] = self.unet(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )
        return found


def keep_timesteps_on_host(pipeline: Any) -> None:
    """Keep the scheduler's timesteps on the CPU, so that a denoising loop on a GPU never waits for the device.

    diffusers puts them on the device; then every scheduler that looks a timestep up in a table (PNDM, DDIM, DDPM, LCM:
    `alphas_cumprod[t]`) copies it back at each step, and the host falls behind.
    """
    scheduler = pipeline.scheduler
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def on_host(*args: Any, **options: Any) -> Any:
        bound = inspect.signature(set_timesteps).bind(*args, **options)
        if "device" in inspect.signature(set_timesteps).parameters:
            bound.arguments["device"] = "cpu"
        return set_timesteps(*bound.args, **bound.kwargs)

    def to_device(
        module: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > 1 and isinstance(args[1], torch.Tensor):  # as every pipeline passes it
            args = (args[0], args[1].to(args[0].device, non_blocking=True), *args[2:])
        return args, options

    scheduler.set_timesteps = on_host
    pipeline.unet.register_forward_pre_hook(to_device, with_kwargs=True)


def _fallback_unet(model: str | Path, device: str, precision: Precision) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        from sdcompress.models.load import load_pipeline

        pipeline: Any = load_pipeline(model).pipeline
        unet: torch.nn.Module = pipeline.unet.to(device, DTYPES[precision])
        return unet.eval()

    return make


def _check_same_model(model: str | Path, artifacts: Path) -> None:
    """Refuse artifacts whose manifest names another pipeline than `model`."""
    from sdcompress_engines.manifest import read_manifest

    from sdcompress.models.locate import resolve, sha256_of

    manifest = read_manifest(artifacts)
    made_from = None if manifest is None else manifest.inputs.get("pipeline")
    if made_from is not None and made_from != (here := sha256_of(resolve(model))):
        raise EngineMismatch(
            f"was made from another model ({made_from[:12]})",
            where=artifacts,
            expected=f"one made from {model} ({here[:12]})",
            hint="sdcompress export MODEL --trt -o DIR",
        )


def _assemble(
    folder: Path,
    device: str,
    make_unet: Callable[[], torch.nn.Module] | None = None,
    report: Reporter = SILENT,
    steady: bool = False,
) -> Any:
    """The exported pipeline's own class around the runners of an export folder."""
    import diffusers
    from sdcompress_engines.unet import EngineTextEncoder, EngineTextEncoderWithProjection, EngineUNet, EngineVaeDecoder

    from sdcompress.models.locate import model_index

    configs = folder / "pipeline"
    index = model_index(configs)
    open_graph = _GraphOpener(folder, device, steady)
    components: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        library, kind = entry
        if kind is None:
            components[name] = None
        elif name == "unet":
            components[name] = EngineUNet(open_graph("unet"), _read(configs / name), fallback=make_unet, report=report)
        elif name in ("text_encoder", "text_encoder_2"):
            wrapper = EngineTextEncoder if name == "text_encoder" else EngineTextEncoderWithProjection
            components[name] = wrapper(open_graph(name), _read(configs / name))
        elif name == "vae":
            components[name] = EngineVaeDecoder(
                open_graph("vae_decoder"), _read(configs / name), encoder=open_graph("vae_encoder", optional=True)
            )
        else:
            components[name] = getattr(importlib.import_module(library), kind).from_pretrained(configs / name)
    if "safety_checker" in components:
        components["requires_safety_checker"] = False
    pipeline = getattr(diffusers, index["_class_name"])(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _GraphOpener:
    """Opens the graphs of an export folder; engines share their activation memory, as one pipeline runs them one after
    another.
    """

    def __init__(self, folder: Path, device: str, steady: bool) -> None:
        from sdcompress_engines.runners import SharedMemory

        self.folder, self.device, self.kernels = folder, device, "eager" if steady else "lazy"
        self.memory = SharedMemory(device) if device.startswith("cuda") else None

    def __call__(self, component: str, optional: bool = False) -> Any:
        from sdcompress_engines.runners import open_runner

        found = sorted(p for p in self.folder.glob(f"{component}.*") if p.suffix in (".onnx", ".engine"))
        if not found and optional:
            return None
        if not found:
            raise ModelError(
                f"has no graph of the {component}",
                where=self.folder,
                hint="sdcompress export MODEL -o DIR, with every component",
            )
        options: dict[str, Any] = (
            {"memory": self.memory, "cuda_graph": component == "unet", "kernels": self.kernels}
            if found[0].suffix == ".engine"
            else {}
        )
        return open_runner(found[0], device=self.device, **options)


def _read(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def close_pipeline(pipeline: Any) -> None:
    """Free the runners of a pipeline; TensorRT-RTX keeps the kernels it has compiled only then."""
    for part in pipeline.components.values():
        if callable(close := getattr(part, "close", None)):
            close()
