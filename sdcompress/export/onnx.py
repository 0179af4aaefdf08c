"""The export of a pipeline to ONNX graphs, each compared with torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdcompress_engines.errors import GateFailed
from sdcompress_engines.manifest import Manifest, write_manifest
from sdcompress_engines.output_folders import check_free, replace_folder, require_space, staged
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.export.components import DTYPES, Precision, Runtime, part_of
from sdcompress.export.layers import find_first_layer
from sdcompress.export.onnx_component import ComponentExporter, ExportedComponent
from sdcompress.export.parity import Parity, check_parity
from sdcompress.export.pipeline_files import save_small_parts, sha256_weights
from sdcompress.export.quantize.check import check_accuracy
from sdcompress.export.quantize.precisions import Quantized
from sdcompress.export.settings import ExportSettings, choose_settings
from sdcompress.models.student_plan import infer_plan
from sdcompress.prune.plan import PLAN_ENTRY, BlockPlan
from sdcompress.support.pipeline import TextToImagePipeline


@dataclass(frozen=True)
class ExportResult:
    """An `onnx` folder.

    Attributes:
        folder: with `<component>.onnx` and `pipeline/`.
        manifest: of the folder.
        parity: component → its error against torch; None where it was not compared.
        seconds: component → seconds of its export and comparison.
    """

    folder: Path
    manifest: Manifest
    parity: dict[str, Parity | None]
    seconds: dict[str, float]

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, exported: Mapping[str, ExportedComponent]) -> ExportResult:
        """Returns the result of an export of these components."""
        parity = {component: each.parity for component, each in exported.items()}
        return cls(folder, manifest, parity, {component: each.seconds for component, each in exported.items()})


def export_onnx(
    pipeline: TextToImagePipeline,
    output: Path,
    *,
    precision: Precision | Quantized = "fp32",
    components: Iterable[str] | None = None,
    host: str = "diffusers",
    opset: int | None = None,
    runtime: Runtime = "any",
    source: Mapping[str, str] | None = None,
    name: str = "",
    plan: BlockPlan | None = None,
    reuse: Path | None = None,
    calibration_prompts: Sequence[str] | None = None,
    keep_failed: bool = False,
    failed_folder: Path | None = None,
    force: bool = False,
    report: Reporter = SILENT,
) -> ExportResult:
    """Write `<component>.onnx`, and in `pipeline/` all that a pipeline needs besides weights.

    Batch, height, width and the UNet's context tokens are free; text encoders take 77 tokens. With ONNX Runtime
    installed, every graph is compared with torch fp32: relative L2 at most 1e-4, in a lower precision at most twice
    torch's own error in it. What fails leaves nothing on disk.

    Args:
        pipeline: in torch; it stays unchanged. For `int8` and `fp8` it has to be able to draw.
        output: the folder to write.
        precision, components, host, opset, runtime: see `choose_settings`. `timestep` stays float32, and SDXL's VAE
            stays fp32 where it would overflow. `int8` and `fp8` quantize the UNet: see `sdcompress.export.quantize`.
            The runtime `onnxruntime` is faster and more exact there; TensorRT engines are built from `any`.
        source: name → sha256 of what the pipeline came from, for the manifest. name: the model's, likewise.
        plan: from the whole model to a student, for its LoRAs; None is what `infer_plan` finds.
        reuse: an `onnx` folder, from which equal graphs are copied: a student has its teacher's text encoder and VAE.
        calibration_prompts: for a quantized UNet; None takes `default_prompts`.
        keep_failed: leave graphs that are too far from torch in `failed_folder`, by default `<output>.failed`.
        force: replace an existing output. report: gets the progress.

    Raises:
        UsageError, ModelError, BackendMissing: as `choose_settings`. ExportError: torch's exporter or modelopt failed.
            GateFailed: a graph is too far from torch. ArtifactError, StorageError: the output.
    """
    settings = choose_settings(pipeline, precision, components, host, runtime, opset)
    plan = plan or infer_plan(pipeline.unet.config)
    _report_kept_precisions(settings, report)
    require_space(output.parent, _needed_bytes(pipeline, settings), "the ONNX export")
    if keep_failed:
        check_free(failed_folder or failed_place(output), force=True)
    with staged(output, force, [reuse] if reuse else []) as folder:
        save_small_parts(pipeline, folder / "pipeline")
        sha256 = {component: sha256_weights(part_of(pipeline, component)) for component in settings.precisions}
        exporter = ComponentExporter(pipeline, settings, sha256, folder, reuse, calibration_prompts, report, plan)
        exported = exporter.export_all()
        described = {"model_name": name, "weights_sha256": sha256, PLAN_ENTRY: plan and plan.to_content()}
        config = settings.to_config() | described
        figures = {component: each.to_figures() for component, each in exported.items()}
        manifest = write_manifest(folder, "onnx", config=config, inputs=source, figures=figures)
        with _kept_where_failed(folder, output, keep_failed, failed_folder):
            _check_gates(pipeline, settings, folder, exported, report)
    return ExportResult.of(output, manifest, exported)


def failed_place(output: Path) -> Path:
    """Returns the folder in which graphs that failed a gate are kept."""
    return output.absolute().with_name(f"{output.absolute().name}.failed")


def _report_kept_precisions(settings: ExportSettings, report: Reporter) -> None:
    """Report the components that stay fp32 because they overflow in half precision."""
    if settings.precision == "fp32":
        return
    for component, precision in settings.precisions.items():
        if precision == "fp32":
            report.show_line(f"{component} stays fp32: in fp16 this VAE overflows and draws black pictures")


def _needed_bytes(pipeline: TextToImagePipeline, settings: ExportSettings) -> int:
    weights = (
        DTYPES[precision].itemsize * sum(weight.numel() for weight in part_of(pipeline, component).parameters())
        for component, precision in settings.precisions.items()
    )
    return int(1.1 * sum(weights)) + 2**24


def _check_gates(
    pipeline: TextToImagePipeline,
    settings: ExportSettings,
    folder: Path,
    exported: Mapping[str, ExportedComponent],
    report: Reporter,
) -> None:
    """Refuse graphs that are too far from torch, and a quantized UNet that is too far from fp32.

    Args:
        pipeline, settings: of the export.
        folder: with the graphs.
        exported: by component.
        report: gets a line before a failed graph is examined.

    Raises:
        GateFailed: the message names the first layer that differs, where it can be found.
    """

    def find_layer(component: str) -> str | None:
        parity = exported[component].parity
        if parity is None or exported[component].quantized is not None:  # its fp16 graph is gone
            return None
        report.show_line(f"{component} is too far from torch: looking for the first layer that differs")
        graph = folder / f"{component}.onnx"
        try:
            layer = find_first_layer(component, part_of(pipeline, component), settings, graph, parity.limit)
        except Exception as error:  # the search must not hide the gate's error, whatever Polygraphy raises
            report.show_line(f"the search failed ({type(error).__name__})")
            return None
        return None if layer is None else str(layer)

    parity = {component: each.parity for component, each in exported.items()}
    check_parity(parity, settings.precisions, find_layer)
    for each in exported.values():
        if each.quantized is not None:
            check_accuracy(each.quantized.accuracy)


@contextmanager
def _kept_where_failed(folder: Path, output: Path, keep: bool, failed_folder: Path | None) -> Iterator[None]:
    """Keep the folder as `failed_folder` or `<output>.failed` where a gate in the block fails and `keep` is true."""
    try:
        yield
    except GateFailed as error:
        if not keep:
            raise
        kept = failed_folder or failed_place(output)
        replace_folder(folder, kept)
        raise GateFailed(error.what, expected=error.expected, hint=f"the graphs are kept in {kept}") from error
