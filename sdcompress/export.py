"""A pipeline → ONNX graphs, checked against torch; ONNX graphs → TensorRT engines."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from sdcompress_engines.builder import BuildResult, Profile, build_engine
from sdcompress_engines.errors import ArtifactError, ExportError, GateFailed, ModelError, UsageError
from sdcompress_engines.flavour import choose_flavour
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, read_manifest, require_space, sha256_file, staged, write_manifest
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.runners import OnnxRuntimeRunner, TensorSpec, TorchRunner
from sdcompress_engines.runners.onnxruntime import missing as onnxruntime_missing
from sdcompress_engines.signature import COMPONENTS, CONTEXT_TOKENS, Signature, signature

from sdcompress.teacher import quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Precision = Literal["fp32", "fp16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
OPSET = 23
"""Keeps `Attention` and `GroupNormalization` as one node each; ONNX Runtime ≥ 1.23 and TensorRT ≥ 10.14 read it."""
FP32_LIMIT = 1e-4
HALF_FACTOR = 2.0
_ONE_FILE_BYTES = int(1.9e9)  # protobuf ends at 2 GiB
_PARTS = {"unet": "unet", "text_encoder": "text_encoder", "vae_decoder": "vae"}


@dataclass(frozen=True)
class Parity:
    """How far a graph in ONNX Runtime is from the same component in torch fp32, over several shapes and timesteps.

    Attributes:
        relative_l2: the largest ‖onnx − torch‖ / ‖torch‖ of any output in any case.
        torch_relative_l2: the same for torch at the graph's precision: its noise floor; None for fp32.
        share_of_limit: the worst case's error over its limit; over 1 the export fails.
        cases: how many shapes and timesteps were compared.
    """

    relative_l2: float
    torch_relative_l2: float | None
    share_of_limit: float
    cases: int


@dataclass(frozen=True)
class ExportResult:
    """An `onnx` folder: its manifest, and by component the parity (None where it was not checked) and the seconds of export and check."""

    folder: Path
    manifest: Manifest
    parity: dict[str, Parity | None]
    seconds: dict[str, float]


@dataclass(frozen=True)
class EnginesResult:
    """An `engine` folder: its manifest, and by component what was built."""

    folder: Path
    manifest: Manifest
    builds: dict[str, BuildResult]


def export_onnx(
    pipeline: DiffusionPipeline,
    output: Path,
    *,
    precision: Precision = "fp32",
    components: Iterable[str] = COMPONENTS,
    opset: int | None = None,
    source: Mapping[str, str] | None = None,
    reuse: Path | None = None,
    force: bool = False,
    report: Reporter = SILENT,
) -> ExportResult:
    """Write `<component>.onnx`, and in `pipeline/` all a pipeline needs besides weights; the pipeline itself is not touched.

    Batch, height, width and the UNet's context tokens are free; the text encoder takes 77 tokens. With ONNX Runtime installed every
    graph is compared with torch fp32: relative L2 at most 1e-4, in fp16 at most twice what torch in fp16 is off by at the same inputs.

    Args:
        precision: of the weights and of the inputs and outputs (`timestep` stays float32).
        source: name → sha256 of what the pipeline came from, for the manifest.
        reuse: an `onnx` folder whose graphs of components with equal weights, precision and opset are taken over: a student has its
            teacher's text encoder and VAE.

    Raises:
        UsageError: an unknown component or precision. ModelError: the pipeline lacks one. ExportError: the exporter failed.
        GateFailed: a graph is too far from torch. ArtifactError, StorageError: the output. In every case nothing is left on disk.
    """
    components = _checked(components)
    if precision not in DTYPES:
        raise UsageError(f"no precision {precision!r}", expected=" or ".join(DTYPES))
    parts = {component: _part(pipeline, component) for component in components}
    weights = sum(p.numel() for part in parts.values() for p in part.parameters()) * DTYPES[precision].itemsize
    require_space(output.parent, int(1.1 * weights) + 2**24, "the ONNX export")
    parity: dict[str, Parity | None] = {}
    seconds: dict[str, float] = {}
    with staged(output, force) as folder:
        save_small_parts(pipeline, folder / "pipeline")
        config = {"precision": precision, "opset": opset or OPSET, "signature": "diffusers", "components": list(components)}
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
            with report.task(f"exporting {component}", total=2) as advance:
                wanted = signature(component, _config(part), DTYPES[precision])
                _write_graph(_GRAPHS[component](part, DTYPES[precision]), wanted, folder / f"{component}.onnx", opset or OPSET)
                advance(note="comparing with torch")
                parity[component] = None if onnxruntime_missing() else _compare(component, part, precision, folder / f"{component}.onnx")
                advance()
            seconds[component] = time.monotonic() - started
        figures = {name: {"parity": "skipped: onnxruntime is not installed" if found is None else asdict(found), "seconds": round(seconds[name], 2)} for name, found in parity.items()}
        _gate(parity, precision)
        manifest = write_manifest(folder, "onnx", config=config | {"weights_sha256": weights_sha256}, inputs=source, figures=figures)
    return ExportResult(output, manifest, parity, seconds)


def sha256_weights(part: torch.nn.Module) -> str:
    """Of a component's config and weights, whatever file they came from."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in _config(part).items() if not k.startswith("_")}, sort_keys=True, default=str).encode())
    for name, value in part.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _same_graph(ready: Manifest, component: str, config: Mapping[str, Any], weights_sha256: Mapping[str, str]) -> bool:
    same = all(ready.config.get(key) == config[key] for key in ("precision", "opset", "signature"))
    return same and ready.config.get("weights_sha256", {}).get(component) == weights_sha256[component]


def _checked(components: Iterable[str]) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(components))
    if not chosen or set(chosen) - set(COMPONENTS):
        raise UsageError(f"no component {', '.join(sorted(set(chosen) - set(COMPONENTS))) or 'given'}", expected=f"some of {', '.join(COMPONENTS)}")
    return chosen


def _part(pipeline: Any, component: str) -> torch.nn.Module:
    part = getattr(pipeline, _PARTS[component], None)
    if not isinstance(part, torch.nn.Module):
        raise ModelError(f"the pipeline has no {_PARTS[component]}", hint="--component with those it has")
    if component == "text_encoder" and getattr(pipeline, "text_encoder_2", None) is not None:
        raise ModelError("pipelines with two text encoders (SDXL) export their unet and vae_decoder only", hint="--component unet --component vae_decoder")
    return part


def _config(part: Any) -> dict[str, Any]:
    return part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)


def _frozen_copy(part: Any, dtype: torch.dtype) -> Any:
    return copy.deepcopy(part).to("cpu", dtype).requires_grad_(False)


class _Graph(torch.nn.Module):
    """A copy of a component, on the CPU in `dtype`, with the graph's inputs as arguments and its outputs as a tuple."""

    def __init__(self, part: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        with quiet():
            self.part = _frozen_copy(part, dtype)
        if hasattr(self.part, "set_attn_processor"):
            from diffusers.models.attention_processor import AttnProcessor2_0

            self.part.set_attn_processor(AttnProcessor2_0())  # torch's own attention, one node in the graph; slicing or xformers would be traced
        self.eval()


class _UNet(_Graph):
    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, text_embeds: torch.Tensor | None = None, time_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return tuple(self.part(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False))


class _TextEncoder(_Graph):
    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.part(input_ids)
        return found.last_hidden_state, found.pooler_output


class _VaeDecoder(_Graph):
    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.part.decode(latent_sample, return_dict=False))


_GRAPHS: dict[str, type[_Graph]] = {"unet": _UNet, "text_encoder": _TextEncoder, "vae_decoder": _VaeDecoder}


def save_small_parts(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Everything a pipeline needs besides the weights: `model_index.json`, configs, scheduler, tokenizer. No safety checker."""
    pipeline.save_config(folder)
    index_path = folder / "model_index.json"
    index = json.loads(index_path.read_text())
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        if name in index:
            index[name] = [None, None]
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    index_path.write_text(json.dumps(index, indent=1) + "\n")
    parts: dict[str, Any] = pipeline.components
    for name, part in parts.items():
        if index.get(name, [None])[0] is None or part is None:
            continue
        is_module = isinstance(part, torch.nn.Module)
        save = part.save_pretrained if not is_module else getattr(part, "save_config", None) or part.config.save_pretrained
        save(folder / name)


def _write_graph(graph: _Graph, wanted: Signature, path: Path, opset: int) -> None:
    sizes = {"batch": 2, "height": 2 * wanted.multiple, "width": 3 * wanted.multiple, "tokens": 2 * CONTEXT_TOKENS}
    if wanted.component == "vae_decoder":
        sizes |= {"height": 16, "width": 24}
    example = _inputs(wanted, graph.part.config, sizes, timestep=500)
    # One `Dim` a free axis; a UNet's height and width are multiples, or its skip connections would not fit.
    # diffusers makes batches of 64 and more contiguous before it upsamples: a branch without effect on the graph, which would
    # have torch capture the model a second time were the example's side of it not promised.
    dims = {name: torch.export.Dim(name, max=63 if name == "batch" else None) for name in sizes}
    free = {
        spec.name: {axis: wanted.multiple * dims[size] if size in ("height", "width") and wanted.multiple > 1 else dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in wanted.inputs
    }
    try:
        with _quiet():
            program = torch.onnx.export(
                graph,
                tuple(example.values()),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=free,
                input_names=[spec.name for spec in wanted.inputs],
                output_names=[spec.name for spec in wanted.outputs],
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"torch could not export the {wanted.component} at opset {opset} ({type(error).__name__}: {_first_lines(error)})", hint="--opset 23, or another torch version") from error
    if program is None:
        raise ExportError(f"torch exported nothing for the {wanted.component}")
    _tidy(program.model, wanted)
    large = sum(p.numel() * p.element_size() for p in graph.parameters()) > _ONE_FILE_BYTES
    program.save(str(path), external_data=large)


def _tidy(model: Any, wanted: Signature) -> None:
    """The signature's axis names, and none of the traces that the exporter leaves: paths of this machine, and half of a small file."""
    for value, spec in zip((*model.graph.inputs, *model.graph.outputs), (*wanted.inputs, *wanted.outputs), strict=True):
        value.shape = type(value.shape)(spec.shape)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    kept = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in kept:  # written in the axis names of the trace; every runtime infers them again
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _first_lines(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error.__cause__ or error).split())
    return text if len(text) <= limit else text[:limit] + " ..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what exporting prints, warns and logs; a failure still raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _inputs(wanted: Signature, config: Any, sizes: Mapping[str, int], timestep: int) -> dict[str, torch.Tensor]:
    """Random inputs of a component, the same for the same sizes."""
    generator = torch.Generator().manual_seed(timestep)

    def make(spec: TensorSpec) -> torch.Tensor:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        if spec.name == "input_ids":
            ids = torch.randint(0, config.vocab_size, shape, generator=generator)
            ids[:, -1] = min(config.eos_token_id, config.vocab_size - 1)
            return ids
        if spec.name == "timestep":
            return torch.full(shape, float(timestep)) - torch.arange(shape[0]) / 2  # a different one for each sample
        if spec.name == "time_ids":
            return torch.tensor([1024.0, 1024, 0, 0, 1024, 1024]).expand(shape).contiguous()
        return torch.randn(shape, generator=generator).to(spec.dtype)

    return {spec.name: make(spec) for spec in wanted.inputs}


def _compare(component: str, part: torch.nn.Module, precision: Precision, path: Path) -> Parity:
    """Two batch sizes × two resolutions × (UNet) 77 and 154 tokens, another timestep each."""
    wanted, exact = (signature(component, _config(part), dtype) for dtype in (DTYPES[precision], torch.float32))
    side = wanted.multiple * max(1, -(-_sample_size(part) // wanted.multiple)) if component == "unet" else 16
    cases = [(batch, height, tokens) for batch in (1, 2) for height in ((side, side + wanted.multiple) if component != "text_encoder" else (0,)) for tokens in ((77, 154) if component == "unet" else (77,))]
    references = [TorchRunner(_GRAPHS[component](part, torch.float32), exact.inputs, exact.outputs)]
    if precision != "fp32":
        references.append(TorchRunner(_GRAPHS[component](part, DTYPES[precision]), wanted.inputs, wanted.outputs))
    found = []
    with OnnxRuntimeRunner(path) as onnx, contextlib.ExitStack() as stack:
        for runner in references:
            stack.enter_context(runner)
        for index, (batch, height, tokens) in enumerate(cases):
            timestep = 1 + 998 * index // max(1, len(cases) - 1)
            feeds = _inputs(wanted, part.config, {"batch": batch, "height": height, "width": side, "tokens": tokens}, timestep)
            truth = references[0].infer({spec.name: feeds[spec.name].to(spec.dtype) for spec in exact.inputs})
            error = relative_l2(onnx.infer(feeds), truth)
            floor = relative_l2(references[1].infer(feeds), truth) if precision != "fp32" else None
            found.append((error, floor, error / (FP32_LIMIT if floor is None else HALF_FACTOR * floor)))
    return Parity(max(f[0] for f in found), None if precision == "fp32" else max(f[1] or 0.0 for f in found), max(f[2] for f in found), len(found))


def relative_l2(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> float:
    """The largest ‖found − truth‖ / ‖truth‖ over the outputs, in float64; infinite where anything is not finite."""
    errors = [((found[name].double() - want.double()).norm() / want.double().norm()).item() for name, want in truth.items()]
    return max(error if error == error else float("inf") for error in errors)


def _gate(parity: Mapping[str, Parity | None], precision: Precision) -> None:
    over = {name: p for name, p in parity.items() if p is not None and not p.share_of_limit <= 1}
    if over:
        told = "; ".join(f"{name} is off by {p.relative_l2:.2e}" + (f", torch {precision} by {p.torch_relative_l2:.2e}" if p.torch_relative_l2 is not None else "") for name, p in over.items())
        limit = f"relative L2 ≤ {FP32_LIMIT:g}" if precision == "fp32" else f"at most {HALF_FACTOR:g} × torch {precision}"
        raise GateFailed(f"the exported graph does not match torch fp32: {told}", expected=limit, hint="--precision fp32" if precision != "fp32" else "another torch or onnxruntime version")


def _sample_size(part: Any) -> int:
    size = part.config["sample_size"] if isinstance(part.config, dict) else part.config.sample_size
    return int(size if isinstance(size, int) else max(size))


def build_engines(
    onnx_folder: Path,
    output: Path,
    *,
    flavour: str | None = None,
    compute_capability: tuple[int, int] | None = None,
    batch: tuple[int, int, int] = (1, 2, 8),
    size_px: tuple[int, int, int] | None = None,
    tokens: tuple[int, int, int] = (77, 77, 154),
    components: Iterable[str] | None = None,
    force: bool = False,
    report: Reporter = SILENT,
) -> EnginesResult:
    """Write `<component>.engine` for the graphs of an `onnx` folder, and `pipeline/` beside them.

    Args:
        flavour: `tensorrt` or `tensorrt-rtx`; by default the first with a GPU, the second, ahead of time, without.
        compute_capability: (major, minor) of the card to build for; by default the one here, without a GPU 8.9.
        batch, size_px, tokens: min, opt, max; pictures are size_px square up to any aspect within it, by default from half to one and a
            half of what the UNet was trained on. A UNet sees twice the pictures of a batch under guidance, so its batch counts both.
        components: by default those the folder has.

    Raises:
        ArtifactError: no `onnx` folder. UsageError: a size the model has no latents for. BackendMissing, EngineError: as `build_engine`.
    """
    manifest = read_manifest(onnx_folder)
    if manifest is None or manifest.kind != "onnx":
        raise ArtifactError("is not an exported ONNX folder", where=onnx_folder, hint="sdcompress export MODEL -o DIR")
    chosen = _checked(components if components is not None else manifest.config["components"])
    library = choose_flavour(flavour, torch.cuda.is_available())
    target = compute_capability or (torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 9))
    configs = {component: json.loads((onnx_folder / "pipeline" / _PARTS[component] / "config.json").read_text()) for component in {*chosen, "unet", "vae_decoder"}}
    profiles = _profiles(chosen, configs, batch, size_px, tokens)
    builds = {}
    with staged(output, force) as folder:
        for component in chosen:
            builds[component] = build_engine(onnx_folder / f"{component}.onnx", folder / f"{component}.engine", profiles[component], library, target, report)
        shutil.copytree(onnx_folder / "pipeline", folder / "pipeline")
        config = {
            "flavour": library.name,
            "version": library.version,
            "compute_capabilities": [list(cc) for cc in next(iter(builds.values())).compute_capabilities],
            "precision": manifest.config["precision"],
            "signature": manifest.config["signature"],
            "components": list(chosen),
            "profile": {component: profile.shapes for component, profile in profiles.items()},
        }
        figures = {component: {"seconds": round(built.seconds, 2), "bytes": built.bytes} for component, built in builds.items()}
        written = write_manifest(folder, "engine", config=config, inputs={"onnx": sha256_file(onnx_folder / MANIFEST_NAME)}, figures=figures)
    return EnginesResult(output, written, builds)


def _profiles(
    components: Iterable[str], configs: Mapping[str, Any], batch: tuple[int, int, int], size_px: tuple[int, int, int] | None, tokens: tuple[int, int, int]
) -> dict[str, Profile]:
    scale = 2 ** (len(configs["vae_decoder"]["block_out_channels"]) - 1)
    step = signature("unet", configs["unet"]).multiple * scale
    if size_px is None:
        native = configs["unet"]["sample_size"] * scale
        size_px = (max(step, native // 2 // step * step), native, max(native, native * 3 // 2 // step * step))
    if any(size % step for size in size_px):
        raise UsageError(f"picture sizes {size_px}", expected=f"multiples of {step} px")
    if any(count % CONTEXT_TOKENS for count in tokens):
        raise UsageError(f"context tokens {tokens}", expected=f"multiples of {CONTEXT_TOKENS}")
    latent = tuple(size // scale for size in size_px)
    ranges = {"batch": batch, "height": latent, "width": latent, "tokens": tokens}
    profiles = {}
    for component in components:
        shapes = {spec.name: tuple(tuple(ranges[size][at] if isinstance(size, str) else size for size in spec.shape) for at in range(3)) for spec in signature(component, configs[component]).inputs}
        profiles[component] = Profile(shapes)  # type: ignore[arg-type]
    return profiles
