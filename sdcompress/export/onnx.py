"""A pipeline → ONNX graphs, checked against torch."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from sdcompress_engines.errors import BackendMissing, GateFailed, UsageError
from sdcompress_engines.files import replace_file
from sdcompress_engines.manifest import Manifest, read_manifest, require_space, staged, write_manifest
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.runners import TorchRunner
from sdcompress_engines.runners.onnxruntime import missing as onnxruntime_missing
from sdcompress_engines.signature import COMPONENTS, HOSTS

from sdcompress.export.components import (
    DTYPES,
    Precision,
    Runtime,
    component_graph,
    config_of,
    default_components,
    part_of,
    signature_of,
    stable_precision,
    weights_of,
)
from sdcompress.export.onnx_file import OPSET, write_onnx
from sdcompress.export.parity import Parity, check_parity, compare_onnx
from sdcompress.export.quantize.calibrate import collect_calibration, default_prompts, named_for
from sdcompress.export.quantize.check import check_accuracy, check_quantized
from sdcompress.export.quantize.precisions import INSTALL, Quantized, missing
from sdcompress.export.quantize.precisions import PRECISIONS as QUANTIZED
from sdcompress.export.quantize.quantize import quantize_graph

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["ExportResult", "Parity", "export_onnx", "save_small_parts", "sha256_weights"]


@dataclass(frozen=True)
class ExportResult:
    """An `onnx` folder: its manifest, and by component the parity (None where it was not checked) and the seconds of
    export and check.
    """

    folder: Path
    manifest: Manifest
    parity: dict[str, Parity | None]
    seconds: dict[str, float]


def export_onnx(
    pipeline: DiffusionPipeline,
    output: Path,
    *,
    precision: Precision | Quantized = "fp32",
    components: Iterable[str] | None = None,
    host: str = "diffusers",
    opset: int | None = None,
    runtime: Runtime = "any",
    source: Mapping[str, str] | None = None,
    name: str = "",
    reuse: Path | None = None,
    calibration_prompts: Sequence[str] | None = None,
    keep_failed: bool = False,
    force: bool = False,
    report: Reporter = SILENT,
) -> ExportResult:
    """Write `<component>.onnx`, and in `pipeline/` all a pipeline needs besides weights; the pipeline itself is not
    touched.

    Batch, height, width and the UNet's context tokens are free; text encoders take 77 tokens. With ONNX Runtime
    installed every graph is compared with torch fp32: relative L2 at most 1e-4, in a lower precision at most twice what
    torch is off by in it at the same inputs.

    Args:
        precision: of the weights and of the inputs and outputs (`timestep` stays float32). SDXL's VAE stays fp32 where
            fp16 makes it overflow. `int8` and `fp8` quantize the UNet of an fp16 export, see `sdcompress.export.quantize`;
            that takes a pipeline that can draw.
        components: by default all that text-to-image needs in `host`.
        host: whose names the inputs and outputs have, a key of `HOSTS`; a WebUI takes a UNet only.
        runtime: whose kernels the graphs are written for. `onnxruntime` is faster and more exact there; `any` is what
            TensorRT engines are built of.
        source: name → sha256 of what the pipeline came from, for the manifest. name: the model's, likewise.
        reuse: an `onnx` folder whose graphs of components with equal weights, precision and opset are taken over: a
            student has its teacher's text encoder and VAE.
        calibration_prompts: what a quantized UNet is calibrated with; None is `default_prompts`.
        keep_failed: leave graphs that are too far from torch in `<output>.failed` to be looked at.

    Raises:
        UsageError: an unknown component, precision or host. ModelError: the pipeline lacks one. ExportError: the
            exporter failed.
        GateFailed: a graph is too far from torch. ArtifactError, StorageError: the output. In every case nothing else
            is left on disk.
    """
    if runtime not in get_args(Runtime):
        raise UsageError(f"no runtime {runtime!r}", expected=" or ".join(get_args(Runtime)))
    if precision not in (*DTYPES, *QUANTIZED):
        raise UsageError(f"no precision {precision!r}", expected=" or ".join((*DTYPES, *QUANTIZED)))
    quantized: Quantized | None = precision if precision in QUANTIZED else None
    if quantized and (reason := missing()) is not None:
        raise BackendMissing(reason, hint=INSTALL)
    chosen = checked_components(default_components(pipeline, host) if components is None else components, host)
    parts = {component: part_of(pipeline, component) for component in chosen}
    base: Precision = "fp16" if quantized else precision  # type: ignore[assignment]
    precisions = {component: stable_precision(pipeline, component, base) for component in chosen}
    for component in (name for name in chosen if precisions[name] != base):
        report.say(f"{component} stays {precisions[component]}: in {base} this VAE overflows and makes black pictures")
    require_space(
        output.parent,
        int(1.1 * sum(weights_of(part) * DTYPES[precisions[name]].itemsize for name, part in parts.items())) + 2**24,
        "the ONNX export",
    )
    parity: dict[str, Parity | None] = {}
    seconds: dict[str, float] = {}
    with staged(output, force) as folder:
        save_small_parts(pipeline, folder / "pipeline")
        final = precisions | ({"unet": quantized} if quantized and "unet" in chosen else {})
        config: dict[str, Any] = {
            "precision": precision,
            "opset": opset or OPSET,
            "runtime": runtime,
            "signature": host,
            "components": list(chosen),
            "precisions": final,
            "model_name": name,
        }
        accuracy: dict[str, Any] = {}
        weights_sha256 = {component: sha256_weights(part) for component, part in parts.items()}
        ready = read_manifest(reuse) if reuse else None
        for component, part in parts.items():
            started = time.monotonic()
            if reuse and ready and _same_graph(ready, component, config, weights_sha256):
                for file in reuse.glob(f"{component}.onnx*"):
                    shutil.copy(file, folder / file.name)
                known = ready.figures[component]["parity"]
                parity[component] = Parity(**known) if isinstance(known, dict) else None
                seconds[component] = time.monotonic() - started
                continue
            path = folder / f"{component}.onnx"
            written = folder / "half" / path.name if quantized and component == "unet" else path
            written.parent.mkdir(exist_ok=True)
            with report.task(f"exporting {component}", total=2) as advance:
                wanted = signature_of(component, part, precisions[component], host)
                write_onnx(
                    component_graph(component, part, DTYPES[precisions[component]]),
                    wanted,
                    written,
                    opset or OPSET,
                    runtime,
                )
                advance(note="comparing with torch")
                parity[component] = (
                    None
                    if onnxruntime_missing()
                    else compare_onnx(component, part, precisions[component], written, host)
                )
                advance()
            if quantized and written != path:
                accuracy = _quantize(pipeline, quantized, written, path, host, calibration_prompts, report)
                shutil.rmtree(written.parent)
            seconds[component] = time.monotonic() - started
        figures: dict[str, Any] = {
            name: {
                "parity": "skipped: onnxruntime is not installed" if found is None else asdict(found),
                "seconds": round(seconds[name], 2),
            }
            for name, found in parity.items()
        }
        if accuracy:
            figures["unet"] |= {key: asdict(value) for key, value in accuracy.items()}
        manifest = write_manifest(
            folder, "onnx", config=config | {"weights_sha256": weights_sha256}, inputs=source, figures=figures
        )
        try:
            check_parity(parity, precisions)
            if accuracy:
                check_accuracy(accuracy["accuracy"])
        except GateFailed as error:
            if not keep_failed:
                raise
            kept = output.absolute().with_name(f"{output.name}.failed")
            shutil.rmtree(kept, ignore_errors=True)
            replace_file(folder, kept)
            raise GateFailed(error.what, expected=error.expected, hint=f"the graphs are kept in {kept}") from error
    return ExportResult(output, manifest, parity, seconds)


def _quantize(
    pipeline: Any,
    precision: Quantized,
    half: Path,
    path: Path,
    host: str,
    prompts: Sequence[str] | None,
    report: Reporter,
) -> dict[str, Any]:
    """Quantize the fp16 graph `half` to `path`; what was done, and how far it is from fp32 on trajectories of other
    prompts.
    """
    usual, held_out = default_prompts(pipeline)
    where = pipeline.unet.device
    if torch.cuda.is_available():
        pipeline.to("cuda")
    rows = collect_calibration(pipeline, prompts or usual, report=report)
    feeds = collect_calibration(pipeline, held_out, samples=4 * len(held_out), seed=1000, report=report)
    pipeline.to(where)
    exact = signature_of("unet", pipeline.unet, "fp32", host)
    done = quantize_graph(
        half,
        path,
        precision,
        named_for(rows, exact.names, pipeline.unet),
        high_precision="fp16",
        report=report,
    )
    reference = TorchRunner(component_graph("unet", pipeline.unet, torch.float32), exact.inputs, exact.outputs)
    return {
        "quantized": done,
        "accuracy": check_quantized(path, reference, named_for(feeds, exact.names, pipeline.unet), report=report),
    }


def checked_components(components: Iterable[str], host: str = "diffusers") -> tuple[str, ...]:
    """The components, each once.

    Raises:
        UsageError: none, an unknown one, or one the host runs itself.
    """
    chosen = tuple(dict.fromkeys(components))
    if host not in HOSTS:
        raise UsageError(f"no signature {host!r}", expected=" or ".join(HOSTS))
    if not chosen or set(chosen) - set(COMPONENTS):
        raise UsageError(
            f"no component {', '.join(sorted(set(chosen) - set(COMPONENTS))) or 'given'}",
            expected=f"some of {', '.join(COMPONENTS)}",
        )
    if theirs := set(chosen) - set(HOSTS[host]):
        raise UsageError(
            f"{', '.join(sorted(theirs))} with the signature {host}, which runs its own",
            expected=", ".join(HOSTS[host]),
        )
    return chosen


def sha256_weights(part: torch.nn.Module) -> str:
    """Of a component's config and weights, whatever file they came from."""
    digest = hashlib.sha256(
        json.dumps(
            {k: v for k, v in config_of(part).items() if not k.startswith("_")}, sort_keys=True, default=str
        ).encode()
    )
    for name, value in part.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _same_graph(ready: Manifest, component: str, config: Mapping[str, Any], weights_sha256: Mapping[str, str]) -> bool:
    same = (
        all(ready.config.get(key, "any") == config[key] for key in ("opset", "runtime", "signature"))
        and ready.config.get("precisions", {}).get(component) == config["precisions"][component]
    )
    return same and ready.config.get("weights_sha256", {}).get(component) == weights_sha256[component]


def save_small_parts(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Everything a pipeline needs besides the weights: `model_index.json`, configs, scheduler, tokenizer.

    No safety checker.
    """
    pipeline.save_config(folder)
    index_path = folder / "model_index.json"
    index = json.loads(index_path.read_text(encoding="utf-8"))
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        if name in index:
            index[name] = [None, None]
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    index_path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    parts: dict[str, Any] = pipeline.components
    for name, part in parts.items():
        if index.get(name, [None])[0] is None or part is None:
            continue
        is_module = isinstance(part, torch.nn.Module)
        save = (
            part.save_pretrained if not is_module else getattr(part, "save_config", None) or part.config.save_pretrained
        )
        save(folder / name)
