"""A model, as a name or path, to ONNX graphs and TensorRT engines, or to a checkpoint in LDM layout."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.build_options import BuildOptions, check_options
from sdcompress_engines.builder import newest_opset, targets
from sdcompress_engines.errors import UsageError
from sdcompress_engines.flavour import Flavour, choose_flavour, present_card
from sdcompress_engines.manifest import sha256_file
from sdcompress_engines.output_folders import check_file, check_free, staged
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.export.components import DTYPES
from sdcompress.export.onnx import ExportResult, export_onnx, failed_place
from sdcompress.export.quantize.precisions import PRECISIONS as QUANTIZED
from sdcompress.export.quantize.precisions import unsupported
from sdcompress.export.settings import check_components
from sdcompress.export.tensorrt import EnginesResult, build_engines, shape_ranges
from sdcompress.lora.apply import apply_loras
from sdcompress.lora.fuse import parse_lora
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.models.locate import local_paths, read_unet_config

if TYPE_CHECKING:
    from sdcompress.export.components import Precision
    from sdcompress.export.quantize.precisions import Quantized

_LEAST_CARD = (8, 0)
"""The oldest GPU that a portable engine is for."""


@dataclass(frozen=True)
class EngineRequest:
    """Which engines to build.

    Attributes:
        flavour: `tensorrt` or `tensorrt-rtx`; None takes the one that serves this machine.
        profiles: presets or texts with ranges; see `sdcompress_engines.profiles`.
        compute_capabilities: (major, minor) of the GPUs to build for.
        options: of the build.
        loras: whether LoRAs can be put into the engines while they run; None is wherever the library can build these.
    """

    flavour: str | None = None
    profiles: Sequence[str] = ()
    compute_capabilities: Sequence[tuple[int, int]] = ()
    options: BuildOptions = field(default_factory=BuildOptions)
    loras: bool | None = None


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        precision: of the weights; None is fp16 with engines and fp32 without.
        host: whose names the inputs and outputs have.
        components: by default all that text-to-image needs.
        loras: LoRAs to add to the weights, `FILE` or `FILE:WEIGHT`.
        opset: of ONNX; None is the newest that the target reads.
        calibration_prompts: for fp8 and int8; None takes the built-in ones.
        keep_failed: keep graphs that are too far from torch.
        force: replace an existing output.
        engines: build these too, in `engine` beside `onnx`.
        files: that the request was read from, such as the calibration prompts.
        decoder: folder of a small decoder to export in the place of the VAE.
    """

    precision: Precision | Quantized | None = None
    host: str = "diffusers"
    components: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    opset: int | None = None
    calibration_prompts: Sequence[str] | None = None
    keep_failed: bool = False
    force: bool = False
    engines: EngineRequest | None = None
    files: Sequence[Path] = ()
    decoder: Path | None = None


@dataclass(frozen=True)
class ModelExport:
    """The result of `export_model`.

    Attributes:
        name: the model's.
        graphs: the ONNX folder.
        engines: the engine folder, if engines were requested.
        seconds: of wall clock.
    """

    name: str
    graphs: ExportResult
    engines: EnginesResult | None
    seconds: float


def export_model(model: str, output: Path, request: ExportRequest, report: Reporter = SILENT) -> ModelExport:
    """Write the ONNX graphs of a model, each checked against torch, and the requested engines.

    Without engines, `output` is the ONNX folder. With engines it holds the folders `onnx` and `engine`. What cannot be
    built is reported before the model is loaded.

    Args:
        model: a name, a path or a hub id.
        output: the folder to write.
        request: what to export.
        report: gets the progress.

    Raises:
        UsageError, BackendMissing, EngineError: the request does not fit the model or this machine.
        ArtifactError: `output` is in the way. What `export_onnx` and `build_engines` raise passes through.
    """
    inputs = [*_inputs(model, request.loras), *request.files, *([request.decoder] if request.decoder else [])]
    check_free(output, request.force, inputs)
    if request.keep_failed:
        check_free(failed_place(output), force=True, inputs=inputs)
    library = None if request.engines is None else _check_engines(model, request.engines, request.precision)
    if request.components:
        check_components(request.components, request.host)
    if request.decoder is not None:
        check_decoder_runs(request)
    loras = [parse_lora(text) for text in request.loras]
    started = time.monotonic()
    # A LoRA is added in fp32, and a calibration draws in fp32.
    as_stored = not loras and request.precision not in QUANTIZED
    loaded = load_pipeline(model, as_stored=as_stored, decoder=request.decoder)
    if loaded.note:
        report.show_line(loaded.note)
    name = loaded.name
    settings: dict[str, Any] = {
        "precision": request.precision or ("fp32" if library is None else "fp16"),
        "components": request.components or None,
        "host": request.host,
        "opset": request.opset or (newest_opset(library) if library else None),
        "source": loaded.inputs | _apply_loras(loaded, loras, report),
        "name": name,
        "plan": loaded.plan,
        "calibration_prompts": request.calibration_prompts,
        "keep_failed": request.keep_failed,
        "report": report,
    }
    if request.engines is None or library is None:
        graphs = export_onnx(loaded.pipeline, output, force=request.force, **settings)
        return ModelExport(name, graphs, None, time.monotonic() - started)
    with staged(output, request.force, inputs) as folder:
        graphs = export_onnx(loaded.pipeline, folder / "onnx", failed_folder=failed_place(output), **settings)
        del loaded  # the build needs the memory
        engines = _build(request.engines, library, folder, report)
    return ModelExport(name, graphs, engines, time.monotonic() - started)


def _build(request: EngineRequest, library: Flavour, folder: Path, report: Reporter) -> EnginesResult:
    """Build the engines of the graphs in `folder/onnx` into `folder/engine`."""
    return build_engines(
        folder / "onnx",
        folder / "engine",
        profiles=request.profiles,
        flavour=library.name,
        compute_capabilities=request.compute_capabilities or None,
        options=request.options,
        loras=request.loras,
        report=report,
    )


def check_decoder_runs(request: ExportRequest) -> None:
    """Refuse a small decoder in an export that does not hold the graph of it.

    Raises:
        UsageError: names the option that leaves it out.
    """
    if request.host != "diffusers":
        raise UsageError(
            f"--decoder with --signature {request.host}: this export holds the UNet alone; the host has its own VAE",
            expected="an export without --decoder; docs/webui.md and docs/comfyui.md say where its files go",
        )
    if request.components and not any(name.startswith("vae_") for name in request.components):
        raise UsageError(
            f"--decoder with --component {request.components[0]}", expected="--component vae_decoder beside it"
        )


def _inputs(model: str, loras: Sequence[str]) -> list[Path]:
    return [*local_paths(model), *(parse_lora(text)[0] for text in loras)]


def _check_engines(model: str, request: EngineRequest, precision: str | None) -> Flavour:
    """Returns the library that builds the engines, after checking that it can build them for this model.

    Raises:
        BackendMissing: no library builds here. EngineError: it builds for none of the GPUs. UsageError: an option, the
            precision or a profile is not possible.
    """
    cards = request.compute_capabilities
    library = choose_flavour(request.flavour, present_card(), cards)
    check_options(library, request.options)
    for card in targets(library, cards) or (_LEAST_CARD,):
        if reason := unsupported(precision or "fp16", card):
            raise UsageError(
                f"--precision {precision} is not possible: {reason}",
                hint="--compute-capability 8.9, or --precision int8",
            )
    shape_ranges(request.profiles, read_unet_config(model))
    return library


def export_checkpoint(
    model: str,
    output: Path,
    precision: Precision = "fp16",
    loras: Sequence[str] = (),
    *,
    force: bool = False,
    report: Reporter = SILENT,
) -> tuple[str, Path]:
    """Write one `.safetensors` file in LDM layout; returns the model's name and the file.

    Args:
        model: a name, a path or a hub id.
        output: the file to write.
        precision: of the weights.
        loras: LoRAs to add to the weights, `FILE` or `FILE:WEIGHT`.
        force: replace an existing file.
        report: gets a line about each LoRA of the whole model that was carried over to a student.

    Raises:
        UsageError, ArtifactError, ModelError, StorageError: as `sdcompress.checkpoints.write.export_ldm`.
    """
    from sdcompress.checkpoints.write import export_ldm

    check_file(output, _inputs(model, loras), replace=force)
    loaded = load_pipeline(model)
    _apply_loras(loaded, [parse_lora(text) for text in loras], report)
    metadata = {"sdcompress.pipeline_sha256": loaded.sha256}
    return loaded.name, export_ldm(loaded.pipeline, output, DTYPES[precision], metadata=metadata, force=force)


def _apply_loras(loaded: LoadedPipeline, loras: Sequence[tuple[Path, float]], report: Reporter) -> dict[str, str]:
    """Add LoRAs to a pipeline's weights, in place.

    Returns name → sha256 of the files, for the manifest.
    """
    apply_loras(loaded.pipeline, loras, loaded.plan, report)
    return {f"lora {file.name}:{weight:g}": sha256_file(file) for file, weight in loras}
