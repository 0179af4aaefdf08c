"""ONNX → TensorRT engine, in a process of its own: a crash of the runtime becomes an error here, and a cancel needs no cooperation.

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
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import EngineError, UsageError
from .flavour import FLAVOURS, Flavour
from .manifest import require_space
from .progress import SILENT, Reporter

Shape = tuple[int, ...]
_EVENT = "sdcompress:"  # marks our lines among whatever native code prints

# What the build process takes from the library, besides constructors; a test holds each name against the one that is installed.
USED_API = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "INetworkDefinition": ("num_inputs", "get_input", "num_layers", "get_layer"),
    "ITensor": ("name", "shape"),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("desc", "node", "node_name", "node_operator"),
    "IBuilderConfig": ("add_optimization_profile", "progress_monitor"),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("phase_start", "phase_finish", "step_complete"),
    "ILogger": ("log", "ERROR", "INTERNAL_ERROR"),
}
USED_API_ATTENTION = {"IAttentionInputLayer": ("attention",), "IAttention": ("decomposable",), "LayerType": ("ATTENTION_INPUT",)}
USED_API_AHEAD = {"IBuilderConfig": ("num_compute_capabilities", "set_compute_capability")}


@dataclass(frozen=True)
class Profile:
    """The shapes an engine takes: input → (min, opt, max). TensorRT tunes for opt; min = max makes an input static."""

    shapes: Mapping[str, tuple[Shape, Shape, Shape]]

    def __post_init__(self) -> None:
        for name, (least, best, most) in self.shapes.items():
            if not len(least) == len(best) == len(most) or not all(0 < a <= b <= c for a, b, c in zip(least, best, most, strict=True)):
                raise UsageError(f"profile of {name}: {least} / {best} / {most}", expected="min ≤ opt ≤ max on every axis")


@dataclass(frozen=True)
class BuildResult:
    """What was built: wall-clock seconds, file size, and what the engine is bound to."""

    seconds: float
    bytes: int
    flavour: str
    version: str
    compute_capabilities: tuple[tuple[int, int], ...]


def build_engine(
    onnx_path: str | PathLike[str],
    engine_path: str | PathLike[str],
    profile: Profile,
    flavour: Flavour,
    compute_capability: tuple[int, int] = (8, 9),
    report: Reporter = SILENT,
) -> BuildResult:
    """Write the engine of an ONNX graph, strongly typed: it computes in the dtypes the graph has. Nothing is left where it fails or is stopped.

    Args:
        onnx_path: the graph; external data is read from beside it.
        engine_path: the file to write; an existing one is replaced once the new one is whole.
        profile: min, opt and max of every input with a free size.
        compute_capability: (major, minor) of the card to build for; `tensorrt` builds only for the card in this machine.

    Raises:
        UsageError: no such graph. BackendMissing: the library is not installed. StorageError: no space.
        EngineError: the parser refused the graph (all its errors, with node and operator), the build failed, or its process died.
    """
    onnx_path, engine_path = Path(onnx_path).absolute(), Path(engine_path).absolute()
    if not onnx_path.is_file():
        raise UsageError("no such file", where=onnx_path, hint="make it with: sdcompress export MODEL -o DIR")
    version, ahead = flavour.version, flavour.builds_ahead()
    weights = sum(p.stat().st_size for p in onnx_path.parent.glob(f"{onnx_path.name}*"))
    require_space(engine_path.parent, 2 * weights + 2**26, f"building {engine_path.name}")
    engine_path.parent.mkdir(parents=True, exist_ok=True)
    if not ahead:
        compute_capability = _present_card(compute_capability, flavour)
    partial = engine_path.with_name(f".{engine_path.name}.{os.getpid()}.partial")
    job = {"flavour": flavour.name, "onnx": str(onnx_path), "out": str(partial), "shapes": dict(profile.shapes), "target": compute_capability if ahead else None}
    started = time.monotonic()
    try:
        with report.task(f"building {engine_path.name}") as advance:
            _run_child(job, onnx_path, advance)
        os.replace(partial, engine_path)
    finally:
        partial.unlink(missing_ok=True)
    return BuildResult(time.monotonic() - started, engine_path.stat().st_size, flavour.name, version, (compute_capability,))


def _present_card(wanted: tuple[int, int], flavour: Flavour) -> tuple[int, int]:
    import torch

    if not torch.cuda.is_available():
        raise EngineError(f"{flavour.name} builds only for a GPU in this machine, and there is none", hint="--trt with tensorrt-rtx: " + FLAVOURS["tensorrt-rtx"].install)
    present = torch.cuda.get_device_capability()
    if present != wanted:
        raise EngineError(f"{flavour.name} builds for the GPU in this machine, of compute capability {present[0]}.{present[1]}, not {wanted[0]}.{wanted[1]}", hint=f"--compute-capability {present[0]}.{present[1]}")
    return present


def _run_child(job: Mapping[str, Any], onnx_path: Path, advance: Any) -> None:
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "sdcompress_engines.builder"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        done, failure, chatter = False, None, [""]
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
                done, failure = done or "done" in event, event.get("error", failure)
        except BaseException:
            child.kill()
            raise
        code = child.wait()
    if failure:
        raise EngineError(failure, where=onnx_path)
    if code or not done:
        died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        raise EngineError(f"the build process ended with {died}: {' '.join(chatter).strip() or 'no output'}", where=onnx_path, hint="a graphics card or container with more memory, or another runtime version")


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
        _emit(done=True)


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
        faults = [parser.get_error(index) for index in range(parser.num_errors)]
        raise EngineError("TensorRT cannot read the graph: " + "; ".join(f"node {e.node()} {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in faults))
    _allow_decomposed_attention(trt, network)
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    if job["target"] is not None:
        _aim(trt, config, job["target"])
    config.add_optimization_profile(_profile(builder, network, job["shapes"]))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(f"TensorRT could not build an engine of {network.num_layers} layers")
    Path(job["out"]).write_bytes(engine)


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Let every attention without a fused kernel of its dtype and head size run as its parts; without this the build fails."""
    if not hasattr(trt, "IAttentionBoundaryLayer"):  # before TensorRT 10.14 the parser makes its parts of it anyway
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _aim(trt: Any, config: Any, target: tuple[int, int]) -> None:
    name = f"SM{target[0]}{target[1]}"
    known = trt.ComputeCapability.__members__
    if name not in known:
        raise EngineError(f"this TensorRT-RTX builds for no compute capability {target[0]}.{target[1]}", expected="one of " + ", ".join(f"{n[2:-1]}.{n[-1]}" for n in known if n.startswith("SM")))
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(known[name], 0):
        raise EngineError(f"compute capability {target[0]}.{target[1]} was refused")


def _profile(builder: Any, network: Any, shapes: Mapping[str, Any]) -> Any:
    inputs = {tensor.name: tuple(tensor.shape) for tensor in (network.get_input(index) for index in range(network.num_inputs))}
    free = {name for name, shape in inputs.items() if -1 in shape}
    if wrong := (free - set(shapes)) | (set(shapes) - set(inputs)):
        raise EngineError(f"the profile and the graph differ on {', '.join(sorted(wrong))}", expected=f"a shape range for each of {', '.join(sorted(free))}")
    profile = builder.create_optimization_profile()
    for name, ranges in shapes.items():
        if any(len(shape) != len(inputs[name]) or any(want not in (-1, size) for size, want in zip(shape, inputs[name], strict=True)) for shape in ranges):
            raise EngineError(f"the profile of {name} is {ranges}", expected=f"shapes that fit {inputs[name]}")
        profile.set_shape(name, *(tuple(shape) for shape in ranges))
    return profile


if __name__ == "__main__":
    _child()
