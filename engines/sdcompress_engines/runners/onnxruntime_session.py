"""ONNX Runtime's sessions: how one starts with a provider, which operators it took, and what its errors say.

What ONNX Runtime does on a GPU, from its source and from the wheels of 1.23 to 1.31.1:

- Its CUDA provider has a kernel for opset-23 `Attention` from 1.25 on, and for `Sin` and `Cos` of opset 22 and newer
  from 1.27 on. No version has one for `GroupNormalization`, which it computes as about 20 operators, or for
  `InstanceNormalization` of opset 22 and newer.
- The wheels are for CUDA 12 up to 1.26, for CUDA 13 from 1.27 on.
- A session with a CUDA graph is refused where a node has a subgraph, where a provider other than CUDA and the CPU has
  a node, or where a tensor is copied between the host and the GPU (`inference_session.cc`). Shapes that are computed on
  the CPU are no reason.
- The wheels are built with TensorRT 10. Up to 1.26 its networks are strongly typed where no precision is announced;
  from 1.27 on none is.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import BackendMissing, EngineError, SdCompressError, StorageError, shorten, storage_errors
from ..manifest import cache_folder, read_manifest
from ..thread_waiting import idle_threads_sleep
from ..verified import sha256_once
from .onnxruntime_install import INSTALL_GPU, INSTALL_RTX, PROVIDERS, import_tensorrt, suggest_fix
from .shapes import Ranges

WORK = {
    "Attention",
    "BatchNormalization",
    "Conv",
    "ConvTranspose",
    "Erf",
    "Gelu",
    "Gemm",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "MatMul",
    "MultiHeadAttention",
    "QuickGelu",
    "ReduceMean",
    "Resize",
    "RMSNormalization",
    "Sigmoid",
    "Softmax",
}
"""Operators that do the work of these models: a provider that leaves one of them to another has not taken the graph.

Other operators on the CPU compute shapes or work on a few numbers: `Concat`, `Div`, `Mul`, `Reshape`, `ArgMax` of token
ids, `Sin` and `Cos` of timesteps.
"""

Started = TypeVar("Started")


@dataclass(frozen=True)
class SessionRequest:
    """A graph, and how its session is to run.

    Attributes:
        path: the `.onnx` file.
        provider: a key of `PROVIDERS`.
        threads: of the CPU; None is as many as torch uses.
        prefer_nhwc: channels last inside convolutions on `cuda`.
        profile: the shapes that `tensorrt` and `nvtensorrtrtx` build for; None is each new shape.
        config: further session entries of ONNX Runtime's, by their keys.
    """

    path: Path
    provider: str
    threads: int | None = None
    prefer_nhwc: bool = False
    profile: Ranges | None = None
    config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StartedSession:
    """A session of ONNX Runtime.

    Attributes:
        native: ONNX Runtime's object.
        names: under which the requested provider may report itself.
    """

    native: Any
    names: frozenset[str]

    def assigned(self) -> list[tuple[str, list[str]]]:
        """Returns provider and operators for each part of the graph; nothing in versions that do not record it."""
        if not hasattr(type(self.native), "get_provider_graph_assignment_info"):
            return []
        parts = self.native.get_provider_graph_assignment_info()
        return [(part.ep_name, [node.op_type for node in part.get_nodes()]) for part in parts]


def create_session(
    request: SessionRequest,
    device: torch.device,
    stream: torch.cuda.Stream | None,
    *,
    cuda_graph: bool,
    weights: Mapping[str, Any] | None = None,
) -> StartedSession:
    """Returns a new session.

    Args:
        request: the graph and how to run it.
        device: the CPU, or a CUDA device with its index.
        stream: the CUDA stream to work on; None on the CPU.
        cuda_graph: capture and replay the graph (`cuda` only).
        weights: initializer → the `OrtValue` that replaces the one in the file beside the graph, on the CPU. Its memory
            must live as long as the session.

    Raises:
        BackendMissing: this ONNX Runtime does not have the provider. StorageError: its cache folder cannot be written.
        Exception: ONNX Runtime refuses the graph or the options.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request.threads or torch.get_num_threads()
    options.log_severity_level = 4  # faults come as exceptions
    if hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if idle_threads_sleep():
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A pipeline has a session for each component. Their threads spin during a call, and not on into the next one's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in request.config.items():
        options.add_session_config_entry(key, str(value))
    if weights:
        options.add_external_initializers(list(weights), list(weights.values()))
    name = PROVIDERS[request.provider]
    names = {name}
    if stream is None:
        providers: list[Any] | None = [name]
    else:
        providers = _gpu_providers(onnxruntime, request, device, stream, cuda_graph)
        if providers is None:  # a plug-in, which is named by the device that it finds
            devices = _rtx_devices(onnxruntime)
            chosen = devices[device.index : device.index + 1] or devices[:1]
            options.add_provider_for_devices(chosen, _rtx_options(request, device, stream))
            names.add(devices[0].ep_name)
    native = onnxruntime.InferenceSession(str(request.path), options, providers=providers, enable_fallback=0)
    return StartedSession(native, frozenset(names))


def start_session(start: Callable[[bool], Started], cuda_graph: bool) -> tuple[Started, str | None]:
    """Returns a session, with a CUDA graph if that is wanted and possible; and the reason, where it is not possible.

    Args:
        start: makes the session, with a CUDA graph or without.
        cuda_graph: whether one is wanted.

    Raises:
        SdCompressError: `start` raised it. Exception: ONNX Runtime refuses the session without a CUDA graph, too.
    """
    if not cuda_graph:
        return start(False), None
    try:
        return start(True), None
    except SdCompressError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        reason = message_of(error)
    return start(False), reason


def check_provider(
    request: SessionRequest, names: Collection[str], started: Collection[str], left: Mapping[str, str]
) -> None:
    """Refuse a session in which the requested provider does not run the whole graph.

    Args:
        request: the graph and its provider.
        names: under which the provider may report itself.
        started: the providers of the session.
        left: operator → other provider, see `left_out`.

    Raises:
        BackendMissing: the provider did not start. EngineError: it left work to another one.
    """
    provider = PROVIDERS[request.provider]
    if not set(names) & set(started):
        raise BackendMissing(
            f"{provider} did not start, and ONNX Runtime would have used {', '.join(started)}",
            where=request.path,
            hint=suggest_fix(request.provider),
        )
    if left:
        elsewhere = ", ".join(f"{operator} on {other}" for operator, other in sorted(left.items()))
        raise EngineError(
            f"{provider} does not take the whole graph: {elsewhere}",
            where=request.path,
            hint="onnxruntime-gpu 1.25 or newer, an export with --opset 20, or another provider",
        )


def left_out(assigned: Iterable[tuple[str, Iterable[str]]], wanted: Collection[str]) -> dict[str, str]:
    """Returns the operators of `WORK` that went to another provider: operator → provider.

    Args:
        assigned: provider and its operators, for each part of the graph.
        wanted: names of the requested provider.
    """
    return {
        operator: provider
        for provider, operators in assigned
        if provider not in wanted
        for operator in operators
        if operator in WORK
    }


def message_of(error: object) -> str:
    """Returns what an error of ONNX Runtime says in one line, without its C++ types, source files and host names."""
    text = " ".join(str(error).split())
    if found := re.search(r"(\w+ failure \d+: [^;]*?) ;.*expr=([^;]+)", text):
        return shorten(f"{found[1]} in {found[2].strip()}")
    return shorten(re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text))


def explain_refusal(path: Path, error: Exception) -> EngineError:
    """Returns the error for a graph that ONNX Runtime does not load: a fault of the file, or else its own message.

    Args:
        path: the `.onnx` file; it is read where onnx is installed.
        error: what ONNX Runtime raised.
    """
    from ..graph import read_graph

    try:
        read_graph(path)
    except EngineError as fault:
        return fault
    except ImportError:
        pass
    if unknown := re.search(r"No Op registered for (\S+) with domain_version of (\d+)", str(error)):
        return EngineError(
            f"this ONNX Runtime knows no operator {unknown[1]} of opset {unknown[2]}",
            where=path,
            hint="a newer onnxruntime, or an export with a lower --opset",
        )
    return EngineError(
        f"not a graph that ONNX Runtime loads ({message_of(error)})",
        where=path,
        hint="export it again, or a newer onnxruntime",
    )


def precision_options(path: Path) -> dict[str, str]:
    """Returns the options that announce a half-precision graph to the `tensorrt` provider.

    Without them TensorRT 10 computes a weakly typed network in fp32. TensorRT 11 has strongly typed networks only, and
    no such options; no ONNX Runtime up to 1.31.1 is built with it.

    Args:
        path: the `.onnx` file, whose precision is in the manifest beside it.
    """
    tensorrt = import_tensorrt()
    if tensorrt is not None and not hasattr(tensorrt.BuilderFlag, "FP16"):
        return {}
    manifest = read_manifest(path.parent)
    precision = "" if manifest is None else str(manifest.config.get("precision"))
    return {f"trt_{precision}_enable": "1"} if precision in ("fp16", "bf16") else {}


def profile_options(request: SessionRequest, prefix: str) -> dict[str, str]:
    """Returns the options with the shapes that a provider builds for.

    Args:
        request: with the profile.
        prefix: of the option names: `trt` or `nv`.
    """
    if request.profile is None:
        return {}
    return {
        f"{prefix}_profile_{which}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, shapes[at]))}" for name, shapes in request.profile.items()
        )
        for at, which in enumerate(("min", "opt", "max"))
    }


def _gpu_providers(
    onnxruntime: Any, request: SessionRequest, device: torch.device, stream: torch.cuda.Stream, cuda_graph: bool
) -> list[Any] | None:
    """Returns the providers of a session, each with its options; None for a provider that is a plug-in."""
    name = PROVIDERS[request.provider]
    if request.provider != "cuda":
        _refuse_engine(request.path)
    common = _common_options(device, stream)
    # No TF32: a graph in fp32 is compared with torch's fp32, and in half precision little is fp32.
    own = {"do_copy_in_default_stream": "1", "use_tf32": "0", "prefer_nhwc": str(int(request.prefer_nhwc))}
    cuda = (PROVIDERS["cuda"], common | own | {"enable_cuda_graph": str(int(cuda_graph))})
    installed = onnxruntime.get_available_providers()
    if request.provider == "nvtensorrtrtx":
        if name not in installed:
            return None
        return [(name, _rtx_options(request, device, stream)), cuda, PROVIDERS["cpu"]]
    if name not in installed:
        raise BackendMissing(
            f"this ONNX Runtime has no {name}: it has {', '.join(installed)}",
            where=request.path,
            hint=f"{INSTALL_GPU} on a machine with an NVIDIA GPU, or provider 'cpu'",
        )
    if request.provider == "cuda":
        return [cuda, PROVIDERS["cpu"]]
    folder = _make_cache(request)
    kept = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }
    engine = common | kept | precision_options(request.path) | profile_options(request, "trt")
    return [(name, engine), cuda, PROVIDERS["cpu"]]


def _refuse_engine(path: Path) -> None:
    """Refuse a graph in which an engine lies: these providers would run that code.

    Raises:
        EngineError: it has a node `EPContext`, on any level.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"EPContext") != -1:
            raise EngineError(
                "holds an engine of TensorRT (EPContext), which is executable code",
                where=path,
                expected="a graph of ONNX's operators",
                hint="sdcompress export MODEL -o DIR",
            )


def _common_options(device: torch.device, stream: torch.cuda.Stream) -> dict[str, str]:
    return {"device_id": str(device.index), "user_compute_stream": str(stream.cuda_stream)}


def _rtx_options(request: SessionRequest, device: torch.device, stream: torch.cuda.Stream) -> dict[str, str]:
    own = {"has_user_compute_stream": "1", "nv_runtime_cache_path": _make_cache(request)}
    return _common_options(device, stream) | own | profile_options(request, "nv")


def _make_cache(request: SessionRequest) -> str:
    """Returns the folder for what the provider keeps of this graph alone, and creates it.

    The providers name their files by the graph's structure, which students of one shape share.
    """
    folder = cache_folder() / "onnxruntime" / sha256_once(request.path)[:24] / request.provider
    try:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except StorageError as error:
        raise StorageError(error.what, where=error.where, hint="set SDCOMPRESS_CACHE to another folder") from error
    return str(folder)


def _rtx_devices(onnxruntime: Any) -> list[Any]:
    """Returns the GPUs of the TensorRT-RTX provider, a library of its own that is registered once in a process."""
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin

        name = plugin.get_ep_name()
        devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
        if not devices:
            onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
            devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    except (ImportError, OSError, AttributeError) as error:
        raise BackendMissing(f"ONNX Runtime has no TensorRT-RTX provider ({error})", hint=INSTALL_RTX) from error
    except Exception as error:  # ONNX Runtime's own, which share no base class
        raise BackendMissing(f"the TensorRT-RTX provider does not load ({shorten(error)})", hint=INSTALL_RTX) from error
    if not devices:
        raise BackendMissing(
            "the TensorRT-RTX provider finds no GPU it runs on", expected="an RTX card", hint="provider 'cuda'"
        )
    return devices
