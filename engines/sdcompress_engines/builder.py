"""ONNX → TensorRT engine, in a process of its own: a crash of the runtime becomes an error here, and a cancel needs no
cooperation.

`python -m sdcompress_engines.builder` is that process: one JSON job on stdin, one JSON event a line on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import EngineError, StorageError, UsageError
from .flavour import FLAVOURS, Flavour
from .graph import read_graph
from .manifest import cache_folder, require_space
from .profiles import Profile
from .progress import SILENT, Reporter
from .resources import available_memory_bytes, peak_rss_mib

_EVENT = "sdcompress:"  # marks our lines among whatever native code prints
_MEMORY_FACTOR, _MEMORY_BASE = (
    3.2,
    2**29,
)  # of the graph's weights; measured on whole and pruned UNets (bench/results/engines-cpu.json), rounded up

# What the build process takes from the library, besides constructors; a test holds each name against the one that is
# installed.
USED_API = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "INetworkDefinition": ("num_inputs", "get_input", "num_layers", "get_layer"),
    "ITensor": ("name", "shape"),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("desc", "node", "node_name", "node_operator"),
    "IBuilderConfig": (
        "add_optimization_profile",
        "progress_monitor",
        "builder_optimization_level",
        "set_flag",
        "set_memory_pool_limit",
        "hardware_compatibility_level",
        "create_timing_cache",
        "set_timing_cache",
        "get_timing_cache",
    ),
    "ITimingCache": ("serialize",),
    "BuilderFlag": ("REFIT", "STRIP_PLAN", "WEIGHT_STREAMING", "VERSION_COMPATIBLE"),
    "MemoryPoolType": ("WORKSPACE",),
    "HardwareCompatibilityLevel": ("AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("phase_start", "phase_finish", "step_complete"),
    "ILogger": ("log", "ERROR", "INTERNAL_ERROR"),
}
USED_API_ATTENTION = {
    "IAttentionInputLayer": ("attention",),
    "IAttention": ("decomposable",),
    "LayerType": ("ATTENTION_INPUT",),
}
USED_API_MEMORY = {"IBuilderConfig": ("set_preview_feature",), "PreviewFeature": ("RUNTIME_ACTIVATION_RESIZE_10_10",)}
USED_API_STREAM = {"Builder": ("build_serialized_network_to_stream",), "IStreamWriter": ("write",)}
USED_API_AHEAD = {"IBuilderConfig": ("num_compute_capabilities", "set_compute_capability")}


@dataclass(frozen=True)
class BuildOptions:
    """What a build trades; the default is what is right for most.

    Attributes:
        optimization_level: 0 (fast build) to 5 (thorough); None is the library's own, 3.
        workspace_mib: upper limit of a layer's scratch memory; None is all there is.
        refit: weights can be exchanged later; `identical` only by equal ones, which costs no speed and exists from
            TensorRT 10.
        strip_plan: the engine carries no weights; they are read from the graph when it is loaded.
        weight_streaming: weights may stay in host memory and be streamed, for cards they do not fit.
        hardware_compatible: run on other cards too, slower: `ampere_plus` or `same_compute_capability`; `tensorrt`
            only.
        version_compatible: run on newer versions of the same major too, slower; `tensorrt` only.
    """

    optimization_level: int | None = None
    workspace_mib: int | None = None
    refit: str | None = None
    strip_plan: bool = False
    weight_streaming: bool = False
    hardware_compatible: str | None = None
    version_compatible: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("refit", self.refit, ("any", "identical")),
            ("hardware compatibility", self.hardware_compatible, ("ampere_plus", "same_compute_capability")),
            ("optimization level", self.optimization_level, range(6)),
        ):
            if value is not None and value not in known:
                raise UsageError(f"{name} {value!r}", expected=" or ".join(map(str, known)))

    def chosen(self) -> dict[str, Any]:
        """Those that are not the default."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}


@dataclass(frozen=True)
class BuildResult:
    """What was built: wall-clock seconds, file size, and what the engine is bound to.

    Attributes:
        compute_capabilities: (major, minor) of the cards it runs on; none is every card from 8.0 on.
        peak_mib: largest resident memory of the build process.
    """

    seconds: float
    bytes: int
    flavour: str
    version: str
    compute_capabilities: tuple[tuple[int, int], ...]
    peak_mib: float


def targets(flavour: Flavour, requested: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...]:
    """The cards an engine will be for, (major, minor) each.

    `tensorrt-rtx` builds for those requested; without a request for none in particular: one engine for 8.0 (Ampere) and
    all later ones. `tensorrt` builds for the card in this machine.

    Raises:
        EngineError: a card the library does not build for, or none in this machine where one is needed.
    """
    if not flavour.builds_ahead():
        return (_present_card(requested, flavour),)
    known = flavour.served_cards() or ()
    for target in requested or ():
        if target not in known:
            raise EngineError(
                f"this {flavour.name} ({flavour.version}) builds for no compute capability {target[0]}.{target[1]}",
                expected="one of " + ", ".join(f"{a}.{b}" for a, b in known),
            )
    return tuple(sorted(set(requested or ())))


def build_engine(
    onnx_path: str | PathLike[str],
    engine_path: str | PathLike[str],
    profiles: Profile | Sequence[Profile],
    flavour: Flavour,
    compute_capabilities: Sequence[tuple[int, int]] | None = None,
    options: BuildOptions = BuildOptions(),
    report: Reporter = SILENT,
) -> BuildResult:
    """Write the engine of an ONNX graph, strongly typed: it computes in the dtypes the graph has.

    Nothing is left where it fails or is stopped.

    Args:
        onnx_path: the graph; external data is read from beside it.
        engine_path: the file to write; an existing one is replaced once the new one is whole.
        profiles: min, opt and max of every input with a free size; several give one engine that is tuned for each.
        compute_capabilities: of the cards to build for, see `targets`.

    Raises:
        UsageError: no such graph. BackendMissing: the library is not installed. StorageError: no space on disk or in
            memory.
        EngineError: the graph is damaged; the parser refused it (all its errors, with node and operator), the build
            failed, or its process died.
    """
    onnx_path, engine_path = Path(onnx_path).absolute(), Path(engine_path).absolute()
    graph = read_graph(onnx_path)
    profiles = [profiles] if isinstance(profiles, Profile) else list(profiles)
    version, cards = flavour.version, targets(flavour, compute_capabilities)
    check_options(flavour, options)
    require_space(engine_path.parent, 2 * graph.bytes + 2**26, f"building {engine_path.name}")
    _require_memory(int(_MEMORY_FACTOR * graph.bytes) + _MEMORY_BASE, engine_path.name)
    engine_path.parent.mkdir(parents=True, exist_ok=True)
    partial = engine_path.with_name(f".{engine_path.name}.{os.getpid()}.partial")
    job = {
        "flavour": flavour.name,
        "onnx": str(onnx_path),
        "out": str(partial),
        "profiles": [dict(profile.shapes) for profile in profiles],
        "targets": list(cards) if flavour.builds_ahead() else [],
        "options": options.chosen(),
        "timing_cache": str(timing_cache(flavour, cards)),
    }
    started = time.monotonic()
    try:
        with report.task(f"building {engine_path.name}") as advance:
            peak_mib = _run_child(job, onnx_path, advance)
        os.replace(partial, engine_path)
    finally:
        partial.unlink(missing_ok=True)
    return BuildResult(time.monotonic() - started, engine_path.stat().st_size, flavour.name, version, cards, peak_mib)


def timing_cache(flavour: Flavour, cards: Sequence[tuple[int, int]]) -> Path:
    """Where what a build has timed on a card is kept for the next one; of one flavour, version and card, as it is worth
    nothing to another.
    """
    return (
        cache_folder()
        / "engines"
        / "timing"
        / f"{flavour.name}-{flavour.version}-sm{'-'.join(f'{a}{b}' for a, b in cards)}.cache"
    )


def newest_opset(flavour: Flavour) -> int:
    """The ONNX opset this library reads best: 23 where it has an attention layer of its own (TensorRT 10.14,
    TensorRT-RTX), else 20.
    """
    return 23 if hasattr(flavour.load(), "IAttentionBoundaryLayer") else 20


def check_options(flavour: Flavour, options: BuildOptions) -> None:
    """Refuse what this flavour does not build.

    Raises:
        UsageError: names the option.
    """
    if not flavour.builds_ahead():
        return
    # An engine ahead of time is portable and compiled on the card: these would change nothing or do not build.
    for name in ("hardware_compatible", "version_compatible", "optimization_level"):
        if name in options.chosen():
            raise UsageError(
                f"--{name.replace('_', '-')} with {flavour.name}",
                expected="the flavour tensorrt",
                hint="leave it out: this engine is tuned on the card that loads it",
            )


def _require_memory(needed_bytes: int, name: str) -> None:
    """Refuse a build that this machine's memory would end, where it tells how much is free."""
    free = available_memory_bytes()
    if free is not None and free < needed_bytes:
        raise StorageError(
            f"building {name} needs about {needed_bytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free",
            hint="close other programs, or build one component at a time with --component",
        )


def _present_card(wanted: Sequence[tuple[int, int]] | None, flavour: Flavour) -> tuple[int, int]:
    import torch

    if not torch.cuda.is_available():
        raise EngineError(
            f"{flavour.name} builds only for a GPU in this machine, and there is none",
            hint="--flavour tensorrt-rtx: " + FLAVOURS["tensorrt-rtx"].install,
        )
    present: tuple[int, int] = torch.cuda.get_device_capability()
    for major, minor in set(wanted or ()) - {present}:
        raise EngineError(
            f"{flavour.name} builds for the GPU in this machine, of compute capability {present[0]}.{present[1]}, not"
            f" {major}.{minor}",
            hint=f"--compute-capability {present[0]}.{present[1]}",
        )
    return present


def _run_child(job: Mapping[str, Any], onnx_path: Path, advance: Any) -> float:
    """Peak resident memory of the process, MiB."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "sdcompress_engines.builder"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        done, failure, chatter, peak_mib = False, None, [""], 0.0
        try:
            with contextlib.suppress(BrokenPipeError):  # it may die before it reads its job; its exit status tells
                child.stdin.write(json.dumps(job))
                child.stdin.close()
            for line in child.stdout:
                if not line.startswith(_EVENT):
                    chatter = [*chatter[-4:], line.strip()]
                    continue
                event = json.loads(line.removeprefix(_EVENT))
                if "phase" in event:
                    advance(note=event["phase"])
                done, failure, peak_mib = (
                    done or "done" in event,
                    event.get("error", failure),
                    event.get("peak_mib", peak_mib),
                )
        except BaseException:
            child.kill()
            raise
        code = child.wait()
    if failure:
        needs_driver = (
            "CUDA driver version is insufficient" in failure
        )  # said without a driver too, by those few steps of a build that run on the card
        asked = " ".join(f"--{name.replace('_', '-')}" for name in job["options"])
        raise EngineError(
            failure,
            where=onnx_path,
            hint=(
                f"without {asked}, or on a machine with an NVIDIA driver: such an engine is not built ahead of the card"
                if needs_driver and asked
                else None
            ),
        )
    if code or not done:
        died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        raise EngineError(
            f"the build process ended with {died}: {' '.join(chatter).strip() or 'no output'}",
            where=onnx_path,
            hint="a graphics card or container with more memory, or another runtime version",
        )
    return float(peak_mib)


def _emit(**event: Any) -> bool:
    try:
        print(_EVENT + json.dumps(event), flush=True)
    except OSError:  # whoever asked is gone
        return False
    return True


def _child() -> None:
    if hasattr(signal, "SIGINT"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    job = json.loads(sys.stdin.read())
    errors: list[str] = []
    try:
        _build(FLAVOURS[job["flavour"]].load(), job, errors)
    except Exception as error:
        said = "; ".join(dict.fromkeys(errors))
        _emit(error=f"{error}" + (f" ({said})" if said and said not in str(error) else ""))
    else:
        _emit(done=True, peak_mib=peak_rss_mib())


def _build(trt: Any, job: Mapping[str, Any], errors: list[str]) -> None:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """The steps tell enough."""

        def phase_finish(self, phase_name: str) -> None:
            """The steps tell enough."""

        def step_complete(self, phase_name: str, step: int) -> bool:
            return _emit(phase=phase_name)

    log, monitor = Log(), Monitor()
    builder = trt.Builder(log)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # gone where every network is
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["onnx"]):
        raise EngineError(_refusal([parser.get_error(index) for index in range(parser.num_errors)], trt.__version__))
    _allow_decomposed_attention(trt, network)
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    _aim(trt, config, job["targets"])
    _configure(trt, config, job["options"])
    _ask_for_exact_memory(trt, config)
    cache = _open_timing_cache(config, Path(job["timing_cache"]))
    for shapes in job["profiles"]:
        if config.add_optimization_profile(_profile(builder, network, shapes)) < 0:
            raise EngineError(f"TensorRT does not take the profile {shapes}")
    if not _write_engine(trt, builder, network, config, Path(job["out"])):
        raise EngineError(f"TensorRT could not build an engine of {network.num_layers} layers")
    if cache is not None:
        _save_timing_cache(config, Path(job["timing_cache"]))


def _write_engine(trt: Any, builder: Any, network: Any, config: Any, path: Path) -> bool:
    """Build and write; where the library can, straight to the file, which saves the memory of a whole engine."""
    if not hasattr(builder, "build_serialized_network_to_stream"):
        engine = builder.build_serialized_network(network, config)
        return engine is not None and path.write_bytes(engine) > 0

    class Stream(trt.IStreamWriter):
        def __init__(self, file: Any) -> None:
            trt.IStreamWriter.__init__(self)
            self.file = file

        def write(self, data: Any) -> int:
            return int(self.file.write(data))

    with path.open("wb") as file:
        stream = Stream(file)
        return bool(builder.build_serialized_network_to_stream(network, config, stream)) and file.tell() > 0


# Operators of opset 23 that no TensorRT before 10.14 reads. Source: the operator table of
# github.com/onnx/onnx-tensorrt.
_NEEDS_10_14 = {"Attention", "RMSNormalization", "RotaryEmbedding", "Swish"}


def _refusal(errors: Sequence[Any], version: str) -> str:
    told = (
        "; ".join(f"node {e.node()} {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors)
        or "it gave no reason"
    )
    newer = sorted({e.node_operator() for e in errors} & _NEEDS_10_14)
    way_out = (
        f" ({', '.join(newer)}: read from TensorRT 10.14 on; here is {version}: export with --opset 20)"
        if newer
        else ""
    )
    return f"TensorRT cannot read the graph: {told}{way_out}"


def _configure(trt: Any, config: Any, options: Mapping[str, Any]) -> None:
    flags = [name.upper() for name in ("strip_plan", "weight_streaming", "version_compatible") if options.get(name)]
    if refit := options.get("refit"):
        flags.append("REFIT" if refit == "any" else "REFIT_IDENTICAL")
    for name in flags:
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is None:
            raise EngineError(f"this TensorRT ({trt.__version__}) has no {name}")
        config.set_flag(flag)
    if options.get("optimization_level") is not None:
        config.builder_optimization_level = options["optimization_level"]
    if options.get("workspace_mib"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace_mib"] << 20)
    if level := options.get("hardware_compatible"):
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level.upper())


def _ask_for_exact_memory(trt: Any, config: Any) -> None:
    """Let contexts say what activation memory the shapes at hand need; without this some libraries answer with the
    profile's maximum.
    """
    feature = getattr(getattr(trt, "PreviewFeature", None), "RUNTIME_ACTIVATION_RESIZE_10_10", None)
    if feature is not None:
        config.set_preview_feature(feature, True)


def _open_timing_cache(config: Any, path: Path) -> Any:
    """What earlier builds have timed; None where the library times nothing ahead of the card."""
    with warnings.catch_warnings(record=True) as said:  # recorded, as a binding cannot raise them
        warnings.simplefilter("always")
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        usable = cache is not None and config.set_timing_cache(cache, ignore_mismatch=True)
    return cache if usable and not any(issubclass(w.category, DeprecationWarning) for w in said) else None


def _save_timing_cache(config: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):  # an engine without its timings is still an engine
        partial.write_bytes(memoryview(config.get_timing_cache().serialize()))
        os.replace(partial, path)


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Let every attention without a fused kernel of its dtype and head size run as its parts; without this the build
    fails.
    """
    if not hasattr(trt, "IAttentionBoundaryLayer"):  # before TensorRT 10.14 the parser makes its parts of it anyway
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _aim(trt: Any, config: Any, cards: Sequence[Sequence[int]]) -> None:
    if not cards:  # the card in this machine; ahead of time, all the library is portable to
        return
    config.num_compute_capabilities = len(cards)
    for index, (major, minor) in enumerate(cards):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), index):
            raise EngineError(f"compute capability {major}.{minor} was refused")


def _profile(builder: Any, network: Any, shapes: Mapping[str, Any]) -> Any:
    inputs = {
        tensor.name: tuple(tensor.shape) for tensor in (network.get_input(index) for index in range(network.num_inputs))
    }
    free = {name for name, shape in inputs.items() if -1 in shape}
    if wrong := (free - set(shapes)) | (set(shapes) - set(inputs)):
        raise EngineError(
            f"the profile and the graph differ on {', '.join(sorted(wrong))}",
            expected=f"a shape range for each of {', '.join(sorted(free))}",
        )
    profile = builder.create_optimization_profile()
    for name, ranges in shapes.items():
        if any(
            len(shape) != len(inputs[name])
            or any(want not in (-1, size) for size, want in zip(shape, inputs[name], strict=True))
            for shape in ranges
        ):
            raise EngineError(f"the profile of {name} is {ranges}", expected=f"shapes that fit {inputs[name]}")
        profile.set_shape(name, *(tuple(shape) for shape in ranges))
    return profile


if __name__ == "__main__":
    _child()
