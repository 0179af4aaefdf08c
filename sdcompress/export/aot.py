"""The UNet as a package (`.pt2`) that AOTInductor compiled ahead of time for this machine's kind of device."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from sdcompress_engines.graph import weights_path
from sdcompress_engines.manifest import Manifest, cache_folder, write_manifest
from sdcompress_engines.output_folders import staged
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.runners.base import Runner

from sdcompress.export.components import DTYPES, Precision, component_graph, example_of, signature_of, silence
from sdcompress.export.weights import save_module_weights, unet_origins
from sdcompress.models.load import LoadedPipeline

PACKAGE = "unet.pt2"


@dataclass(frozen=True)
class PackageResult:
    """A folder with `unet.pt2`: its manifest, and the seconds that compiling took."""

    folder: Path
    manifest: Manifest
    seconds: float


def compile_unet(
    loaded: LoadedPipeline,
    output: Path,
    *,
    device: str = "cpu",
    precision: Precision = "fp32",
    loras: bool = False,
    force: bool = False,
    report: Reporter = SILENT,
) -> PackageResult:
    """Compile the UNet of a pipeline, with batch, height, width and tokens free.

    Args:
        loaded: the pipeline in torch; it stays unchanged.
        output: the folder to write.
        device: the kind of device to compile for.
        precision: of the weights.
        loras: whether LoRAs can be put into a package for the CPU, which is slower then, see `compile_package`. One for
            a GPU always takes them.
        force: replace an existing output.
        report: gets the progress.

    Raises:
        BackendMissing: there is no C++ compiler. ExportError: torch could not capture or compile the UNet.
            ArtifactError, StorageError: the output.
    """
    started = time.monotonic()
    loras = loras or not _is_cpu(device)
    with staged(output, force, [loaded.folder]) as folder:
        with report.task(f"compiling the UNet of {loaded.name} for {device}"), silence():
            _compile(loaded, folder / PACKAGE, device, precision, loras)
        seconds = time.monotonic() - started
        manifest = write_manifest(
            folder,
            "package",
            config={"precision": precision, "device": device, "components": ["unet"], "loras": loras},
            inputs={"pipeline": loaded.sha256},
            figures={"seconds": round(seconds, 1)},
        )
    return PackageResult(output, manifest, seconds)


def _compile(loaded: LoadedPipeline, path: Path, device: str, precision: Precision, loras: bool) -> None:
    """Compile the UNet, and write its weights beside the package where LoRAs can be put into it.

    Args:
        loaded: the pipeline in torch.
        path: the package to write.
        device, precision, loras: see `compile_unet`.

    Raises:
        EngineError: a weight that a LoRA changes became part of the code.
    """
    from sdcompress_engines.runners.aot_compiler import compile_package

    unet = loaded.pipeline.unet
    wanted = signature_of("unet", unet, precision)
    graph = component_graph("unet", unet, DTYPES[precision], stable=False).to(device)
    if precision != "fp32":
        graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    example = example_of(wanted, unet.config)
    inputs = tuple(value.to(device) for value in example.inputs.values())
    shapes = tuple(example.dynamic_shapes.values())
    compile_package(graph, inputs, shapes, path, wanted.inputs, wanted.outputs, exchangeable=loras)
    if loras:
        save_module_weights(graph, path, unet_origins(unet.config, loaded.plan))
        open_package(path, device).close()  # which finds each weight in the package


def _is_cpu(device: str) -> bool:
    return torch.device(device).type == "cpu"


def cached_package(
    loaded: LoadedPipeline, device: str, precision: Precision, *, loras: bool = False, report: Reporter = SILENT
) -> Path:
    """Returns a model's package in the cache folder, compiled now if it is not there.

    Args:
        loaded: the pipeline in torch.
        device: the kind of device to compile for.
        precision: of the weights.
        loras: see `compile_unet`. On the CPU, a package that takes LoRAs is one of its own, because it is slower.
        report: gets the progress.

    Raises:
        BackendMissing, ExportError, StorageError: as `compile_unet`.
    """
    folder = package_folder(loaded.sha256, device, precision, loras=loras)
    is_complete = not loras or weights_path(folder / PACKAGE).is_file()  # one of an earlier version is not
    if not (folder / PACKAGE).is_file() or not is_complete:
        report.show_line(f"compiling {loaded.name} once to {folder}: this takes minutes")
        compile_unet(loaded, folder, device=device, precision=precision, loras=loras, force=True, report=report)
    return folder / PACKAGE


def package_folder(sha256: str, device: str, precision: Precision, *, loras: bool = False) -> Path:
    """Returns the folder of `cached_package`, whether it is there or not.

    Its name has the version of torch, because only that version loads a package that it compiled.

    Args:
        sha256: of the model.
        device, precision, loras: see `cached_package`.
    """
    name = f"aot-{torch.device(device).type}-{precision}-{torch.__version__.replace('+', '-')}"
    return cache_folder() / "models" / sha256[:16] / (f"{name}-lora" if loras and _is_cpu(device) else name)


def open_package(path: Path, device: str) -> Runner:
    """Returns an open runner of a package. On CUDA it replays CUDA graphs."""
    from sdcompress_engines.runners import open_runner

    return open_runner(path, device=device, cuda_graph=device.startswith("cuda"))
