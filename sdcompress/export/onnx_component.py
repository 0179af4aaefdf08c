"""One component as an ONNX file: taken over from another export, or written, compared with torch and quantized."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdcompress_engines.graph import weights_path
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest
from sdcompress_engines.paths import file_inside
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.runners.onnxruntime_install import missing as onnxruntime_missing

from sdcompress.export.components import DTYPES, component_graph, config_of, part_of, signature_of
from sdcompress.export.graph_folder import read_graph_folder
from sdcompress.export.onnx_file import write_onnx
from sdcompress.export.parity import Parity, compare_onnx
from sdcompress.export.quantize.quantize_unet import QuantizedUNet, quantize_unet
from sdcompress.export.settings import ExportSettings
from sdcompress.export.weights import unet_origins
from sdcompress.lora.model_lora import LORA_COMPONENTS
from sdcompress.prune.plan import PLAN_ENTRY, BlockPlan
from sdcompress.support.pipeline import TextToImagePipeline


@dataclass(frozen=True)
class ExportedComponent:
    """One component in the folder of an export.

    Attributes:
        parity: None where it was not compared.
        seconds: that its export and comparison took.
        quantized: of a quantized UNet.
    """

    parity: Parity | None
    seconds: float
    quantized: QuantizedUNet | None = None

    def to_figures(self) -> dict[str, Any]:
        """Returns it as the manifest of an export holds it."""
        parity = "skipped: onnxruntime is not installed" if self.parity is None else asdict(self.parity)
        figures: dict[str, Any] = {"parity": parity, "seconds": round(self.seconds, 2)}
        return figures | (self.quantized.to_figures() if self.quantized else {})


@dataclass(frozen=True)
class ComponentExporter:
    """Writes the components of a pipeline into the folder of an export.

    Attributes:
        pipeline: in torch.
        settings: of the export.
        weights_sha256: component → hash of its weights.
        folder: the one to write to.
        reuse: folder of an earlier export whose equal graphs are taken over, or None.
        calibration_prompts: for a quantized UNet; None takes `default_prompts`.
        report: gets the progress.
        plan: from the whole model to a student, or None.
    """

    pipeline: TextToImagePipeline
    settings: ExportSettings
    weights_sha256: Mapping[str, str]
    folder: Path
    reuse: Path | None = None
    calibration_prompts: Sequence[str] | None = None
    report: Reporter = field(default=SILENT)
    plan: BlockPlan | None = None

    def export_all(self) -> dict[str, ExportedComponent]:
        """Write every component. Returns them by name, in the order of the settings.

        Raises:
            ExportError: torch or modelopt failed. DataError, StorageError: as `quantize_unet`.
        """
        earlier = read_graph_folder(self.reuse) if self.reuse and self.reuse.is_dir() else None
        return {component: self._export(component, earlier) for component in self.settings.precisions}

    def _export(self, component: str, earlier: Manifest | None) -> ExportedComponent:
        started = time.monotonic()
        if self.reuse and earlier and self._has_equal_graph(earlier, component):
            for name in earlier.files:
                if name.startswith(f"{component}.onnx"):
                    file = file_inside(self.reuse, name, source=self.reuse / MANIFEST_NAME)
                    shutil.copyfile(file, file_inside(self.folder, name, source=self.reuse / MANIFEST_NAME))
            known = earlier.figures[component]["parity"]
            parity = Parity(**known) if isinstance(known, dict) else None
            return ExportedComponent(parity, time.monotonic() - started)
        path = self.folder / f"{component}.onnx"
        if component != "unet" or self.settings.quantized is None:
            return ExportedComponent(self._write(component, path), time.monotonic() - started)
        half = self.folder / "half" / path.name
        half.parent.mkdir()
        parity = self._write(component, half)
        quantized = quantize_unet(
            self.pipeline,
            self.settings.quantized,
            half,
            path,
            host=self.settings.host,
            prompts=self.calibration_prompts,
            report=self.report,
        )
        shutil.rmtree(half.parent)
        return ExportedComponent(parity, time.monotonic() - started, quantized)

    def _write(self, component: str, path: Path) -> Parity | None:
        """Write a component's graph. Returns its parity with torch, or None without ONNX Runtime."""
        settings, part = self.settings, part_of(self.pipeline, component)
        precision = settings.precisions[component]
        with self.report.task(f"exporting {component}", total=2) as advance:
            wanted = signature_of(component, part, precision, settings.host)
            graph = component_graph(component, part, DTYPES[precision])
            origins = unet_origins(config_of(part), self.plan) if component == "unet" else {}
            write_onnx(graph, wanted, path, settings.opset, settings.runtime, origins)
            advance(note="comparing with torch")
            parity = None
            if not onnxruntime_missing():
                parity = compare_onnx(component, part, precision, path, settings.host)
            advance()
        return parity

    def _has_equal_graph(self, earlier: Manifest, component: str) -> bool:
        """Returns whether an earlier export has the graph that this one would write."""
        wanted = self.settings.to_config()
        complete = component not in LORA_COMPONENTS or weights_path(f"{component}.onnx").name in earlier.files
        return (
            complete
            and (component != "unet" or earlier.config.get(PLAN_ENTRY) == (self.plan and self.plan.to_content()))
            and all(earlier.config.get(key, "any") == wanted[key] for key in ("opset", "runtime", "signature"))
            and earlier.config.get("precisions", {}).get(component) == wanted["precisions"][component]
            and earlier.config.get("weights_sha256", {}).get(component) == self.weights_sha256[component]
        )
