"""The UNet compiled ahead of time by AOTInductor: a `.pt2` package for this machine's device, which starts without
compiling.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.manifest import Manifest, cache_folder, staged, write_manifest
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.runners.base import Runner

from sdcompress.export.components import DTYPES, Precision, component_graph, example_of, signature_of, silence
from sdcompress.models.load import LoadedPipeline


@dataclass(frozen=True)
class PackageResult:
    """A folder with `unet.pt2`: its manifest, and the seconds it took to compile."""

    folder: Path
    manifest: Manifest
    seconds: float


def compile_unet(
    loaded: LoadedPipeline,
    output: Path,
    *,
    device: str = "cpu",
    precision: Precision = "fp32",
    force: bool = False,
    report: Reporter = SILENT,
) -> PackageResult:
    """Compile the UNet for this kind of device, with batch, height, width and tokens free; the pipeline is left as it
    is.

    Raises:
        BackendMissing: no C++ compiler. ExportError: torch could not capture or compile it. ArtifactError,
            StorageError: the output.
    """
    from sdcompress_engines.runners.aot_compiler import compile_package

    pipeline: Any = loaded.pipeline
    wanted = signature_of("unet", pipeline.unet, precision)
    started = time.monotonic()
    with staged(output, force) as folder:
        with report.task(f"compiling the UNet of {loaded.name} for {device}"), silence():
            graph = component_graph("unet", pipeline.unet, DTYPES[precision], stable=False).to(device)
            if precision != "fp32":
                graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            example = example_of(wanted, pipeline.unet.config)
            inputs = {name: value.to(device) for name, value in example.inputs.items()}
            compile_package(
                graph,
                tuple(inputs.values()),
                tuple(example.dynamic_shapes.values()),
                folder / "unet.pt2",
                wanted.inputs,
                wanted.outputs,
            )
        seconds = time.monotonic() - started
        manifest = write_manifest(
            folder,
            "package",
            config={"precision": precision, "device": device, "components": ["unet"]},
            inputs={"pipeline": loaded.sha256},
            figures={"seconds": round(seconds, 1)},
        )
    return PackageResult(output, manifest, seconds)


def cached_package(loaded: LoadedPipeline, device: str, precision: Precision, report: Reporter = SILENT) -> Path:
    """The package of a model in the cache folder, compiled now where it is not there."""
    folder = package_folder(loaded.sha256, device, precision)
    if not (folder / "unet.pt2").is_file():
        report.say(f"compiling {loaded.name} once to {folder}: this takes minutes")
        compile_unet(loaded, folder, device=device, precision=precision, force=True, report=report)
    return folder / "unet.pt2"


def package_folder(sha256: str, device: str, precision: Precision) -> Path:
    """Where `cached_package` keeps a model's package: by torch version, as a package is loaded by the version that made
    it.
    """
    kind = torch.device(device).type
    return cache_folder() / "models" / sha256[:16] / f"aot-{kind}-{precision}-{torch.__version__.replace('+', '-')}"


def open_package(path: Path, device: str) -> Runner:
    """Returns an open runner of a package; on CUDA it replays CUDA graphs."""
    from sdcompress_engines.runners import open_runner

    return open_runner(path, device=device, cuda_graph=device.startswith("cuda"))
