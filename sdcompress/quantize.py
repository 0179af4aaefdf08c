"""A UNet's graph → the same graph in int8 or fp8: explicit Q/DQ pairs by nvidia-modelopt, calibrated on the model's own
denoising.

An export calls, in this order, `collect_calibration`, `quantize_graph`, `check_quantized`, `check_accuracy`.

modelopt runs in a process of its own: it patches ONNX Runtime, prints a great deal and holds the graph several times
over. `python -m sdcompress.quantize` is that process: one JSON job on stdin, one JSON event a line on stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sdcompress_engines.errors as engines_errors
from sdcompress_engines.errors import BackendMissing, DataError, ExportError, GateFailed, UsageError, storage_errors
from sdcompress_engines.manifest import require_space
from sdcompress_engines.progress import SILENT, Advance, Reporter
from sdcompress_engines.resources import peak_rss_mib

Quantized = Literal["int8", "fp8"]
HighPrecision = Literal["fp16", "fp32"]
PRECISIONS: tuple[Quantized, ...] = ("int8", "fp8")
INSTALL = "pip install 'sdcompress[quantize]'"
FP8_CAPABILITY = (8, 9)
"""The first cards with fp8 arithmetic: Ada and Hopper."""
KEPT = ("timestep only", "first and last", "shortcut")
"""Layers that stay in high precision: those that see only the timestep, which have no work worth quantizing; the first
and the last convolution; the
1×1 shortcuts across resnets, which take the residual stream as it is, without a norm before them."""
LEAST_OPSET = 19
"""The first with Q/DQ nodes for fp16 and fp8."""
ONE_FILE_BYTES = int(1.9e9)
"""Weights over this lie in a file of their own: protobuf ends at 2 GiB."""
CHECK_TIMESTEPS = 4
"""A check over fewer moments of a trajectory says little: the error grows towards the clean end."""


@dataclass(frozen=True)
class Limit:
    """How far a quantized UNet may be from fp32, relative L2 of its prediction: on average over the timesteps, and at
    the worst of them.
    """

    mean: float
    worst: float


LIMITS: dict[str, Limit] = {"int8": Limit(0.035, 0.16), "fp8": Limit(0.06, 0.25)}
"""Twice what was measured on nano (docs/quantization.md). int8 is over it where nothing with weights is left in high
precision.
"""

PROMPTS = (
    "a portrait of an old fisherman with a white beard, natural light, 85mm photograph",
    "a red sports car on a wet city street at night, neon reflections",
    "a bowl of ramen with an egg and spring onions, seen from above",
    "a mountain lake at sunrise, mist over the water, wide landscape photograph",
    "a watercolor painting of a cat asleep on a windowsill",
    "an astronaut riding a horse through a desert, cinematic, highly detailed",
    "the interior of a gothic cathedral, rays of light through stained glass",
    "a flat vector illustration of a small wooden house in a snowy forest",
)
"""What a model is calibrated with where no prompts are given: people, things, places, styles."""
HELD_OUT_PROMPTS = (
    "a young woman with curly hair laughing in a cafe, candid photograph",
    "an oil painting of a sailing ship in a storm",
    "a macro photograph of a dew drop on a green leaf",
    "a futuristic city skyline with flying cars, digital art",
)


def missing() -> str | None:
    """Why nothing can be quantized here, or None."""
    lacking = [
        name
        for name in ("modelopt", "onnx_graphsurgeon", "onnxslim", "lief", "onnxruntime")
        if importlib.util.find_spec(name) is None
    ]
    return f"quantization needs {', '.join(lacking)}, not installed" if lacking else None


def supported(precision: str, compute_capability: tuple[int, int]) -> str | None:
    """Why a card of this (major, minor) has no use for the precision, or None.

    Every card that TensorRT serves computes int8.
    """
    if precision != "fp8" or compute_capability >= FP8_CAPABILITY:
        return None
    major, minor = compute_capability
    return (
        f"fp8 needs compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} (RTX 40, L4, H100) or newer, not"
        f" {major}.{minor}; int8 runs there"
    )


def default_prompts(pipeline: Any) -> tuple[list[str], list[str]]:
    """Prompts to calibrate with and others to check with; for nano and its students, told by their size, captions of
    nano's own kind.
    """
    if int(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor >= 256:
        return list(PROMPTS), list(HELD_OUT_PROMPTS)
    from sdcompress import nano

    return [each.caption for each in nano.prompts("seen", 8)], [each.caption for each in nano.prompts("heldout", 4)]


# Calibration

_INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")
_AT_ONCE = 2  # prompts of one run; each is two rows under guidance


def collect_calibration(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    samples: int = 64,
    guidance_scale: float | None = None,
    size_px: int | None = None,
    seed: int = 0,
    report: Reporter = SILENT,
) -> dict[str, np.ndarray]:
    """What the UNet meets while `pipeline` draws the prompts: `samples` rows by canonical input name, float32.

    `sample` (N, C, H/8, W/8), `timestep` (N,), `encoder_hidden_states` (N, 77·k, D), of SDXL `text_embeds` (N, P) and
    `time_ids` (N, 6). The rows are spread evenly over the UNet's calls, over the prompts, and with guidance over its
    unconditional and conditional half.

    Args:
        pipeline: a diffusers pipeline in torch; it is left as it was. Nothing is decoded.
        guidance_scale: None is `default_guidance_scale`; at 1 or less there is no unconditional half.
        size_px: side of the picture; None is what the UNet was made for.

    Raises:
        DataError: no prompts, or fewer UNet calls times prompts than `samples`.
    """
    import torch

    from sdcompress.pipeline import default_guidance_scale, initial_latents

    if not prompts or samples < 1 or steps < 1:
        raise DataError(f"{len(prompts)} prompts, {samples} samples, {steps} steps", expected="at least one of each")
    own_size_px = int(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor
    size_px = size_px or own_size_px
    guidance_scale = default_guidance_scale(own_size_px) if guidance_scale is None else guidance_scale
    used = list(prompts[: samples if guidance_scale <= 1 else -(-samples // 2)])
    rows: dict[str, list[torch.Tensor]] = {}

    def draw(start: int, advance: Advance) -> None:
        """Draw the prompts from `start` on, and keep those rows of theirs whose turn it is."""
        part = used[start : start + _AT_ONCE]
        calls = itertools.count()

        def keep(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            inputs = dict(zip(("sample", "timestep"), arguments, strict=False)) | options
            inputs |= inputs.pop("added_cond_kwargs", None) or {}
            batch, call, total = inputs["sample"].shape[0], next(calls), len(pipeline.scheduler.timesteps)
            halves = batch // len(part)
            if samples > total * halves * len(used):
                raise DataError(
                    f"{samples} samples of {total} UNet calls for {len(used)} prompts",
                    expected=f"at most {total * halves * len(used)}",
                    hint="more prompts",
                )
            # A sample's number decides its call, and in turn its half of the guided batch and its prompt.
            places = [
                (number % halves, number // halves % len(used) - start)
                for number in range(-(-call * samples // total), -(-(call + 1) * samples // total))
            ]
            chosen = [half * len(part) + prompt for half, prompt in places if 0 <= prompt < len(part)]
            inputs["timestep"] = torch.as_tensor(inputs["timestep"], dtype=torch.float32).reshape(-1).expand(batch)
            for name in _INPUTS:
                if chosen and inputs.get(name) is not None:
                    rows.setdefault(name, []).append(inputs[name][chosen].detach().float().cpu())
            advance()

        latents, generators = initial_latents(pipeline, [seed + start + index for index in range(len(part))], size_px)
        handle = pipeline.unet.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            pipeline(
                part,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=size_px,
                width=size_px,
                latents=latents.to(pipeline.unet.device, pipeline.unet.dtype),
                generator=generators,
                output_type="latent",
            )
        finally:
            handle.remove()

    with report.task(f"drawing {len(used)} prompts to calibrate with") as advance, torch.no_grad(), _still(pipeline):
        for start in range(0, len(used), _AT_ONCE):
            draw(start, advance)
    return {name: torch.cat(parts).numpy() for name, parts in rows.items()}


@contextlib.contextmanager
def _still(pipeline: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def named_for(calibration: Mapping[str, np.ndarray], names: Mapping[str, str], unet: Any) -> dict[str, np.ndarray]:
    """The rows by a host's input names (`Signature.names`); its `y` is SDXL's text embedding beside its embedded sizes."""
    import torch

    rows = dict(calibration)
    if "y" in names and "time_ids" in rows:
        ids = torch.from_numpy(rows.pop("time_ids"))
        sizes = unet.add_time_proj(ids.flatten()).reshape(ids.shape[0], -1).cpu().numpy()
        rows["y"] = np.concatenate([rows.pop("text_embeds"), sizes.astype(np.float32)], axis=1)
    return {names[name]: value for name, value in rows.items()}


# Quantization


@dataclass(frozen=True)
class QuantizeResult:
    """What was quantized.

    Attributes:
        nodes: operator → how many nodes compute in the quantized precision.
        kept: why a node with weights stays in high precision → how many do.
        seconds: wall clock. bytes: of the graph with its external data. peak_mib: highest memory of the process that
            did it.
    """

    nodes: dict[str, int]
    kept: dict[str, int]
    seconds: float
    bytes: int
    peak_mib: float


def quantize_graph(
    source: Path,
    target: Path,
    precision: Quantized,
    calibration: Mapping[str, np.ndarray],
    *,
    high_precision: HighPrecision,
    keep: Collection[str] = KEPT,
    report: Reporter = SILENT,
) -> QuantizeResult:
    """Write `target`: `source` with int8 or fp8 weights, and Q/DQ pairs before its convolutions and linear layers;
    weights over 2 GB go to `<target>.data`.

    Inputs, outputs, norms, attention's softmax and the sums of the residual stream stay as they are. Weights are scaled
    by output channel, activations by tensor.

    Args:
        source: a UNet's graph of opset 19 or later, in `high_precision`. It is only read.
        calibration: rows by the graph's input names, as `collect_calibration` gives them and `named_for` names them.
        keep: which of the layers named in `KEPT` are not quantized.

    Raises:
        UsageError: no such graph, precision or layers, or a graph in another precision. DataError: calibration that
            does not fit the inputs. BackendMissing: no modelopt.
        StorageError: no space. ExportError: modelopt failed or its process died. In every case nothing is left, and an
            older `target` stays.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    if precision not in PRECISIONS:
        raise UsageError(f"no quantized precision {precision!r}", expected=" or ".join(PRECISIONS))
    if unknown := set(keep) - set(KEPT):
        raise UsageError(f"no layers {', '.join(sorted(unknown))} to keep", expected=f"some of {', '.join(KEPT)}")
    if (reason := missing()) is not None:
        raise BackendMissing(reason, hint=INSTALL)
    _check_calibration(source, calibration, high_precision)
    size = _bytes(source)
    require_space(target.parent, 6 * size + 2**26, f"quantizing {source.name}")
    started = time.monotonic()
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as work:
            np.savez(Path(work) / "calibration.npz", **calibration)  # type: ignore[arg-type]
            job = {
                "source": str(source),
                "work": work,
                "name": target.name,
                "precision": precision,
                "keep": list(keep),
                "one_file_bytes": ONE_FILE_BYTES,
            }
            with report.task(f"quantizing {source.name} to {precision}") as advance:
                done = _run_child(job, source, advance)
            made = Path(work) / "made" / target.name
            data = target.with_name(f"{target.name}.data")
            if (held := made.with_name(data.name)).is_file():
                os.replace(held, data)
            else:
                data.unlink(missing_ok=True)
            os.replace(made, target)
    return QuantizeResult(done["nodes"], done["kept"], time.monotonic() - started, _bytes(target), done["peak_mib"])


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.is_file())


def _check_calibration(source: Path, calibration: Mapping[str, np.ndarray], high_precision: str) -> None:
    import onnx
    from sdcompress_engines.graph import load_structure

    names = {"fp16": onnx.TensorProto.FLOAT16, "fp32": onnx.TensorProto.FLOAT}
    if high_precision not in names:
        raise UsageError(
            f"no precision {high_precision!r} around {' or '.join(PRECISIONS)}", expected=" or ".join(names)
        )
    model = load_structure(source)
    graph = model.graph
    if (
        opset := next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    ) < LEAST_OPSET:
        raise UsageError(
            f"a graph of opset {opset}",
            where=source,
            expected=f"at least {LEAST_OPSET}",
            hint="--opset 20 or --opset 23",
        )
    inputs = {value.name: value.type.tensor_type for value in graph.input}
    found = graph.output[0].type.tensor_type.elem_type
    if found != names[high_precision]:
        raise UsageError(
            f"a graph in {onnx.TensorProto.DataType.Name(found).lower()}", where=source, expected=high_precision
        )
    if set(calibration) != set(inputs):
        raise DataError(
            f"calibration of {', '.join(calibration) or 'nothing'}",
            where=source,
            expected=f"an array for each input: {', '.join(inputs)}",
        )
    counts = {name: len(values) for name, values in calibration.items()}
    if len(set(counts.values())) != 1 or not all(counts.values()):
        raise DataError(
            f"calibration rows {counts}", where=source, expected="the same number for each input, at least one"
        )
    for name, values in calibration.items():
        wanted = [size.dim_value or None for size in inputs[name].shape.dim]
        if len(wanted) != values.ndim or any(
            size not in (None, have) for size, have in zip(wanted, values.shape, strict=True)
        ):
            raise DataError(
                f"calibration of {name} with shape {values.shape}",
                where=source,
                expected=f"({', '.join(str(size or 'any') for size in wanted)})",
            )
        if not np.isfinite(values).all():
            raise DataError(
                f"calibration of {name} with values that are not finite",
                where=source,
                hint="calibrate with the pipeline in fp32",
            )


# The process

_EVENT = "sdcompress:"  # marks our lines among what modelopt and ONNX Runtime print


def _run_child(job: Mapping[str, Any], source: Path, advance: Any) -> dict[str, Any]:
    paths = [str(Path(file).parents[1]) for file in (__file__, engines_errors.__file__)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH", "")])),
        "TMPDIR": job["work"],
    }
    command = [sys.executable, "-m", "sdcompress.quantize"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=job["work"],
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        done: dict[str, Any] | None = None
        failure, chatter = None, [""]
        try:
            with contextlib.suppress(BrokenPipeError):  # it may die before it reads its job; its exit status tells
                child.stdin.write(json.dumps(job))
                child.stdin.close()
            for line in child.stdout:
                if not line.startswith(_EVENT):
                    chatter = [*chatter[-2:], line.strip()]
                    continue
                event = json.loads(line.removeprefix(_EVENT))
                done, failure = event.get("done", done), event.get("error", failure)
                if "note" in event:
                    advance(note=event["note"])
        except BaseException:
            child.kill()
            raise
        code = child.wait()
    if failure:
        raise ExportError(
            failure, where=source, hint="another version of nvidia-modelopt; 0.47 is the one that was tested"
        )
    if code or done is None:
        died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        raise ExportError(
            f"the quantization process ended with {died}: {' '.join(chatter).strip() or 'no output'}",
            where=source,
            hint="a machine with more memory, or fewer calibration samples",
        )
    return done


def _emit(**event: Any) -> None:
    print(_EVENT + json.dumps(event), flush=True)


def _child() -> None:
    if hasattr(signal, "SIGINT"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    job = json.loads(sys.stdin.read())
    try:
        _emit(done=_quantize(job))
    except BrokenPipeError:  # whoever asked is gone
        sys.exit(1)
    except Exception as error:
        _emit(
            error=(
                f"modelopt could not quantize the graph to {job['precision']} ({type(error).__name__}:"
                f" {' '.join(str(error).split())[:300]})"
            )
        )


def _quantize(job: Mapping[str, Any]) -> dict[str, Any]:
    import onnx

    work, precision = Path(job["work"]), job["precision"]
    _emit(note="reading the graph")
    model = onnx.load(job["source"])
    large = model.ByteSize() > job["one_file_bytes"]
    chosen, kept = choose_nodes(model.graph, job["keep"])
    if not chosen:
        raise ValueError("it has no convolution or linear layer to quantize")
    _mark_types(model.graph)
    _save(model, work / "source" / job["name"], large)
    batches = _batches(work / "calibration.npz", model.graph)
    del model
    _calibrate(work / "source" / job["name"], work / "quantized.onnx", precision, chosen, batches, large)
    _emit(note="writing the graph")
    made = onnx.load(work / "quantized.onnx")
    nodes = _finish(made.graph, set(chosen), precision)
    declined = len(chosen) - sum(nodes.values())
    _save(made, work / "made" / job["name"], made.ByteSize() > job["one_file_bytes"])
    return {
        "nodes": nodes,
        "kept": kept | ({"declined by modelopt": declined} if declined else {}),
        "peak_mib": peak_rss_mib(),
    }


def _save(model: Any, path: Path, external: bool) -> None:
    import onnx

    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path, **({"save_as_external_data": True, "location": f"{path.name}.data"} if external else {}))


def choose_nodes(graph: Any, keep: Collection[str] = KEPT) -> tuple[list[str], dict[str, int]]:
    """The names of the nodes to quantize, and why how many others with weights are not; told from the graph's
    structure, whatever its names are.

    Args:
        graph: an `onnx.GraphProto` of a UNet: its picture and its context are the inputs of more than two dimensions.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    large = {value.name for value in graph.input if len(value.type.tensor_type.shape.dim) > 2}
    depends, plain = set(large), set(large)  # what the picture or the context decides; what is an input, at most cast
    readers: Counter[str] = Counter()
    producer: dict[str, Any] = {}
    for node in graph.node:
        readers.update(node.input)
        producer |= dict.fromkeys(node.output, node)
        if node.op_type != "Shape" and depends.intersection(node.input):
            depends.update(node.output)
        if node.op_type == "Cast" and node.input[0] in plain:
            plain.update(node.output)
    last = {value.name for value in graph.output}
    last |= {producer[name].input[0] for name in last if name in producer and producer[name].op_type == "Cast"}
    chosen: list[str] = []
    kept: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm") or node.input[1] not in weights:
            continue
        is_conv = node.op_type == "Conv"
        found = {
            "timestep only": node.input[0] not in depends,
            "first and last": is_conv and (node.input[0] in plain or node.output[0] in last),
            "shortcut": is_conv and set(weights[node.input[1]].dims[2:]) == {1} and readers[node.input[0]] > 1,
        }
        if (reason := next((name for name in keep if found[name]), None)) is None:
            chosen.append(node.name)
        else:
            kept[reason] += 1
    return chosen, dict(kept)


_TYPED = ".typed"


def _mark_types(graph: Any) -> None:
    """A Cast to its own type behind each GroupNormalization.

    ONNX infers no type for that operator's output. modelopt forgets the types the file gives, knows none behind the
    first of these nodes, and then leaves every activation there unquantized with nothing but a warning in its log.
    """
    from onnx import helper

    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "GroupNormalization":
            name = node.output[0]
            node.output[0] = name + _TYPED
            nodes.append(helper.make_node("Cast", [name + _TYPED], [name], name=name + _TYPED, to=types[node.input[1]]))
    graph.ClearField("node")
    graph.node.extend(nodes)


def _batches(path: Path, graph: Any) -> list[dict[str, np.ndarray]]:
    """The calibration rows in the graph's dtypes, as many at once as 2,048 latent places are."""
    from onnx import helper

    with np.load(path) as arrays:
        dtypes = {
            value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in graph.input
        }
        rows = {name: arrays[name].astype(dtypes[name]) for name in dtypes}
    places = max(int(np.prod(values.shape[2:])) for values in rows.values() if values.ndim == 4)
    count, step = len(next(iter(rows.values()))), max(1, 2048 // places)
    return [{name: values[start : start + step] for name, values in rows.items()} for start in range(0, count, step)]


class _Reader:
    """What modelopt asks for batches, and our progress."""

    def __init__(self, batches: Sequence[dict[str, np.ndarray]]) -> None:
        self._batches = batches
        self.rewind()

    def get_first(self) -> dict[str, np.ndarray]:
        return self._batches[0]

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self._at == len(self._batches):
            return None
        self._at += 1
        _emit(note=f"calibrating, {self._at} of {len(self._batches)}")
        return self._batches[self._at - 1]

    def rewind(self) -> None:
        self._at = 0


def _calibrate(
    source: Path,
    target: Path,
    precision: str,
    nodes: Sequence[str],
    batches: Sequence[dict[str, np.ndarray]],
    large: bool,
) -> None:
    import re

    importlib.import_module("modelopt.onnx.quantization").quantize(
        str(source),
        quantize_mode=precision,
        calibration_data_reader=_Reader(batches),
        calibration_method="max",
        calibration_eps=["cpu"],
        nodes_to_quantize=[f"{re.escape(name)}$" for name in nodes],  # it takes patterns, and those by their beginning
        output_path=str(target),
        use_external_data_format=large,
        high_precision_dtype="fp32",  # converts nothing: what is not quantized stays in the precision the graph has
        # attention in its parts has no weights to quantize; looking for it would run the model once more
        disable_mha_qdq=True,
        enable_gemv_detection_for_trt=False,  # needs shapes that a graph of free sizes does not have
        passes=[],  # one scale for all that a Concat joins would widen each of them
        log_level="WARNING",
    )


def _finish(graph: Any, chosen: Collection[str], precision: str) -> dict[str, int]:
    """Clean modelopt's graph in place; operator → how many of the chosen nodes are quantized.

    It declines some of itself: fp8 with few channels.

    Raises:
        ValueError: a chosen node has only one of its two inputs quantized, or most have none.
    """
    _drop_casts(graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    done: Counter[str] = Counter()
    stored: dict[str, tuple[Any, Any, int]] = {}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        pairs = {}  # position → its Q and DQ node
        for at, name in enumerate(node.input):
            after = producer.get(name)
            if after is not None and after.op_type == "DequantizeLinear":
                pairs[at] = producer[after.input[0]], after
        if node.name in chosen and len(pairs) == 1:
            raise ValueError(f"node {node.name!r} has only one of its two inputs quantized")
        if node.name in chosen and len(pairs) == 2:
            done[node.op_type] += 1
            stored[pairs[1][1].name] = (*pairs[1], _output_axis(node))
            continue
        # modelopt gives the dequantized value to whoever reads the tensor. Norms and sums beside a chosen node get back
        # what was meant for them.
        for at, (quantize, _) in pairs.items():
            node.input[at] = quantize.input[0]
    if sum(done.values()) < len(chosen) / 2:
        raise ValueError(f"only {sum(done.values())} of {len(chosen)} layers were quantized")
    for quantize, dequantize, axis in stored.values():
        _store_weight(tensors, quantize, dequantize, axis, precision)
    _drop_unused(graph)
    graph.ClearField("value_info")  # shapes with names of modelopt's making; every runtime infers them again
    return dict(done)


def _output_axis(node: Any) -> int:
    """Which axis of a node's weight its output channels are."""
    transposed = any(each.name == "transB" and each.i for each in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def _drop_casts(graph: Any) -> None:
    own = {node.output[0]: node.input[0] for node in graph.node if node.name.endswith(_TYPED)}
    back = {before: after for after, before in own.items()}
    nodes = [node for node in graph.node if not node.name.endswith(_TYPED)]
    for node in nodes:
        node.input[:] = [back.get(name, name) for name in node.input]
        node.output[:] = [back.get(name, name) for name in node.output]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _store_weight(tensors: Mapping[str, Any], quantize: Any, dequantize: Any, axis: int, precision: str) -> None:
    """Put the quantized weight in the place of the weight and its Q node, which halves the file and what a build reads.

    Scaled anew, by output channel, over the whole range of the precision: modelopt's fp8 weights reach 36 of 448. Its
    activations do too, and keep that room: a value twelve times what was calibrated with does not saturate.
    """
    import ml_dtypes
    from onnx import helper, numpy_helper

    weight, scale, zero = (tensors[name] for name in quantize.input)
    values = numpy_helper.to_array(weight).astype(np.float32)
    dtype = numpy_helper.to_array(scale).dtype
    largest = np.float32(127 if precision == "int8" else 448)
    amax = np.abs(values).max(axis=tuple(at for at in range(values.ndim) if at != axis), keepdims=True)
    scales = np.maximum(amax / largest, np.finfo(dtype).smallest_subnormal).astype(dtype)
    scaled = np.clip(values / scales.astype(np.float32), -largest, largest)
    found: Any = np.rint(scaled).astype(np.int8) if precision == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn)
    weight.CopyFrom(numpy_helper.from_array(found, weight.name))
    scale.CopyFrom(numpy_helper.from_array(scales.reshape(-1), scale.name))
    zero.CopyFrom(numpy_helper.from_array(np.zeros(scales.size, found.dtype), zero.name))
    dequantize.input[0] = weight.name
    dequantize.ClearField("attribute")
    dequantize.attribute.append(helper.make_attribute("axis", axis))


def _drop_unused(graph: Any) -> None:
    """Drop nodes whose outputs nobody reads, from the end on, and then tensors nobody reads."""
    read = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            nodes.append(node)
            read.update(node.input)
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    graph.ClearField("node")
    graph.node.extend(reversed(nodes))
    graph.ClearField("initializer")
    graph.initializer.extend(tensors)


# Check


@dataclass(frozen=True)
class Accuracy:
    """How far a quantized UNet's prediction is from fp32's.

    Attributes:
        precision: `int8` or `fp8`.
        relative_l2: timestep → ‖quantized − fp32‖ / ‖fp32‖ over all rows of that timestep.
        mean, worst: of those. rows: how many there were in all.
    """

    precision: str
    relative_l2: dict[float, float]
    mean: float
    worst: float
    rows: int


def check_quantized(
    quantized: Path, reference: Any, feeds: Mapping[str, np.ndarray], *, report: Reporter = SILENT
) -> Accuracy:
    """Run a quantized graph in ONNX Runtime on the CPU beside its fp32 original; the figures, which `check_accuracy`
    judges.

    Args:
        reference: a `Runner` with the same input names in fp32, or the path of an fp32 `.onnx` graph. It answers all
            rows before the quantized graph is loaded.
        feeds: rows by input name of trajectories that were not calibrated with, of at least four timesteps, as
            `collect_calibration` gives them.

    Raises:
        DataError: fewer than four timesteps. UsageError: a graph that is not quantized. EngineError, EngineMismatch: as
            `Runner.infer`.
    """
    import torch
    from sdcompress_engines.runners import OnnxRuntimeRunner, Runner

    precision = _precision_of(Path(quantized))
    times = next(values for values in feeds.values() if values.ndim == 1)
    moments = {float(time): np.flatnonzero(times == time) for time in sorted(set(times.tolist()), reverse=True)}
    if len(moments) < CHECK_TIMESTEPS:
        raise DataError(f"{len(moments)} timesteps to check at", expected=f"at least {CHECK_TIMESTEPS}")

    def answers(runner: Runner) -> list[torch.Tensor]:
        found = []
        with runner, report.task(f"checking {precision}: {runner.backend}", total=len(moments)) as advance:
            for rows in moments.values():
                chunks = [
                    {
                        spec.name: torch.from_numpy(feeds[spec.name][rows[at : at + 4]]).to(runner.device, spec.dtype)
                        for spec in runner.inputs
                    }
                    for at in range(0, len(rows), 4)
                ]
                found.append(
                    torch.cat([runner.infer(chunk)[runner.outputs[0].name].double().cpu() for chunk in chunks])
                )
                advance()
        return found

    truths = answers(reference if isinstance(reference, Runner) else OnnxRuntimeRunner(reference))
    found = answers(OnnxRuntimeRunner(quantized))
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, truths, strict=True)]
    errors = [error if error == error else float("inf") for error in errors]
    return Accuracy(
        precision, dict(zip(moments, errors, strict=True)), sum(errors) / len(errors), max(errors), len(times)
    )


def _precision_of(path: Path) -> str:
    from onnx import TensorProto
    from sdcompress_engines.graph import load_structure

    held = {tensor.data_type for tensor in load_structure(path).graph.initializer}
    if not held & {TensorProto.INT8, TensorProto.FLOAT8E4M3FN}:
        raise UsageError("is not quantized", where=path, expected="a graph written by quantize_graph")
    return "fp8" if TensorProto.FLOAT8E4M3FN in held else "int8"


def check_accuracy(accuracy: Accuracy) -> None:
    """Refuse a quantized UNet that is too far from fp32.

    Raises:
        GateFailed: by how much, and the limit.
    """
    limit = LIMITS[accuracy.precision]
    if not (accuracy.mean <= limit.mean and accuracy.worst <= limit.worst):
        moment = max(accuracy.relative_l2, key=lambda time: accuracy.relative_l2[time])
        raise GateFailed(
            f"the {accuracy.precision} UNet is too far from fp32: relative L2 {accuracy.mean:.3f} on average,"
            f" {accuracy.worst:.3f} at timestep {moment:g}",
            expected=f"at most {limit.mean:g} and {limit.worst:g}",
            hint="--calibration-prompts with prompts of the kind the model is used for, or --precision fp16",
        )


if __name__ == "__main__":
    _child()
