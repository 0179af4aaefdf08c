"""The process that builds one engine with TensorRT: `python -m sdcompress_engines.build_worker`.

`builder.build_engine` starts it, see `child_process`. Its job has `flavour`, `onnx`, `out`, `profiles`, `targets`,
`options`, `refittable` and `timing_cache`. Its events are `phase` (progress), and at the end `error`, or `done` with
`peak_mib`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .child_process import ignore_interrupts, receive_message, send_event
from .errors import EngineError
from .files import write_atomically
from .flavour import FLAVOURS
from .resources import peak_rss_mib

# What this process uses of the library, besides constructors. A test looks each name up in the installed one.
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
# What exchanges single weights of an engine. A library without it marks all of them.
USED_API_INDIVIDUAL = {"INetworkDefinition": ("mark_weights_refittable",), "BuilderFlag": ("REFIT_INDIVIDUAL",)}
USED_API_MEMORY = {"IBuilderConfig": ("set_preview_feature",), "PreviewFeature": ("RUNTIME_ACTIVATION_RESIZE_10_10",)}
USED_API_STREAM = {"Builder": ("build_serialized_network_to_stream",), "IStreamWriter": ("write",)}
USED_API_AHEAD = {"IBuilderConfig": ("num_compute_capabilities", "set_compute_capability")}

# Operators of opset 23 that no TensorRT before 10.14 reads. Source: operator table of github.com/onnx/onnx-tensorrt.
_NEEDS_10_14 = {"Attention", "RMSNormalization", "RotaryEmbedding", "Swish"}


def main() -> None:
    """Build the engine of the job, and send events about it."""
    ignore_interrupts()
    job = receive_message()
    if job is None:
        return
    errors: list[str] = []
    try:
        build(FLAVOURS[job["flavour"]].load(), job, errors)
    except Exception as error:
        logged = "; ".join(dict.fromkeys(errors))
        send_event(error=f"{error}" + (f" ({logged})" if logged and logged not in str(error) else ""))
    else:
        send_event(done=True, peak_mib=peak_rss_mib())


def build(trt: Any, job: Mapping[str, Any], errors: list[str]) -> None:
    """Build an engine and write it to `job["out"]`.

    Args:
        trt: the library's module.
        job: see the module.
        errors: gets what the library logs as an error.

    Raises:
        EngineError: the graph cannot be read, a profile or an option does not fit, or the build failed.
    """
    log, monitor = _create_log(trt, errors), _create_monitor(trt)
    builder = trt.Builder(log)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # absent where all are
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["onnx"]):
        refusals = [parser.get_error(index) for index in range(parser.num_errors)]
        raise EngineError(_describe_refusals(refusals, trt.__version__))
    _allow_decomposed_attention(trt, network)
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    _set_cards(trt, config, job["targets"])
    _set_options(trt, config, job["options"])
    mark_refittable(trt, network, config, job["refittable"])
    request_exact_memory(trt, config)
    cache = _open_timing_cache(config, Path(job["timing_cache"]))
    for shapes in job["profiles"]:
        if config.add_optimization_profile(_create_profile(builder, network, shapes)) < 0:
            raise EngineError(f"TensorRT does not take the profile {shapes}")
    if not _write_engine(trt, builder, network, config, Path(job["out"])):
        raise EngineError(f"TensorRT could not build an engine of {network.num_layers} layers")
    if cache is not None:
        _save_timing_cache(config, Path(job["timing_cache"]))


def _create_log(trt: Any, errors: list[str]) -> Any:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

    return Log()


def _create_monitor(trt: Any) -> Any:
    """Returns a monitor that sends each step, and cancels the build when the parent is gone."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Sends nothing, because each step of the phase is sent."""

        def phase_finish(self, phase_name: str) -> None:
            """Sends nothing, because each step of the phase was sent."""

        def step_complete(self, phase_name: str, step: int) -> bool:
            return send_event(phase=phase_name)

    return Monitor()


def _write_engine(trt: Any, builder: Any, network: Any, config: Any, path: Path) -> bool:
    """Build and write the engine. Returns whether that worked.

    Where the library can, it writes straight to the file, which saves the memory of a whole engine.
    """
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


def _describe_refusals(errors: Sequence[Any], version: str) -> str:
    reasons = "; ".join(f"node {e.node()} {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors)
    newer = sorted({e.node_operator() for e in errors} & _NEEDS_10_14)
    remedy = (
        f" (TensorRT reads {', '.join(newer)} from 10.14 on, and {version} is installed: export with --opset 20)"
        if newer
        else ""
    )
    return f"TensorRT cannot read the graph: {reasons or 'it gave no reason'}{remedy}"


def _set_options(trt: Any, config: Any, options: Mapping[str, Any]) -> None:
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


def mark_refittable(trt: Any, network: Any, config: Any, names: Sequence[str]) -> None:
    """Let these weights be exchanged in the engine, and where the library can, no others.

    Args:
        trt: the library's module.
        network: parsed from the graph.
        config: the builder's configuration.
        names: of the weights.

    Raises:
        EngineError: the network has no such weight.
    """
    if not names:
        return
    individual = getattr(trt.BuilderFlag, "REFIT_INDIVIDUAL", None)
    if individual is None or not hasattr(network, "mark_weights_refittable"):
        config.set_flag(trt.BuilderFlag.REFIT)
        return
    config.set_flag(individual)
    for name in names:
        if not network.mark_weights_refittable(name):
            raise EngineError(f"TensorRT has no weight {name} of the graph, so no LoRA could change it")


def request_exact_memory(trt: Any, config: Any) -> None:
    """Let execution contexts report the activation memory of the shapes at hand.

    Without this some libraries report the profile's maximum. A library without the feature is left as it is.

    Args:
        trt: the library's module.
        config: the builder's configuration.
    """
    feature = getattr(getattr(trt, "PreviewFeature", None), "RUNTIME_ACTIVATION_RESIZE_10_10", None)
    if feature is not None:
        config.set_preview_feature(feature, True)


def _open_timing_cache(config: Any, path: Path) -> Any:
    """Returns what earlier builds have timed; None where the library times nothing ahead of the card."""
    with warnings.catch_warnings(record=True) as caught:  # recorded, as a binding cannot raise them
        warnings.simplefilter("always")
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        usable = cache is not None and config.set_timing_cache(cache, ignore_mismatch=True)
    return cache if usable and not any(issubclass(w.category, DeprecationWarning) for w in caught) else None


def _save_timing_cache(config: Any, path: Path) -> None:
    with suppress(OSError):  # the engine is complete without its timings
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, bytes(memoryview(config.get_timing_cache().serialize())))


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Let every attention without a fused kernel for its dtype and head size run as its parts.

    Without this such a build fails.
    """
    if not hasattr(trt, "IAttentionBoundaryLayer"):  # before TensorRT 10.14 the parser decomposes it
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _set_cards(trt: Any, config: Any, cards: Sequence[Sequence[int]]) -> None:
    if not cards:  # the card in this machine; ahead of time, all that the library is portable to
        return
    config.num_compute_capabilities = len(cards)
    for index, (major, minor) in enumerate(cards):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), index):
            raise EngineError(f"compute capability {major}.{minor} was refused")


def _create_profile(builder: Any, network: Any, shapes: Mapping[str, Any]) -> Any:
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
    main()
