"""ONNX Runtime on the CPU, on CUDA, and through TensorRT. Tensors are bound by address: no input is copied.

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

import ctypes
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

import torch

from ..errors import BackendMissing, EngineError, SdCompressError, UsageError, storage_errors
from ..manifest import cache_folder, read_manifest, sha256_file
from .base import Runner, TensorSpec
from .cuda_graphs import short, warn_without_graph
from .shapes import Ranges, Shape

INSTALL = "pip install 'sdcompress[cpu]'"
INSTALL_GPU = "pip install 'sdcompress[gpu]'"
REPLACE_BY_GPU = f"pip uninstall -y onnxruntime onnxruntime-gpu && {INSTALL_GPU}"
"""Both packages write the same files, so the one for the CPU has to go first."""
INSTALL_RTX = "pip install onnxruntime-ep-nv-tensorrt-rtx, beside onnxruntime and without onnxruntime-gpu"
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nvtensorrtrtx": "NvTensorRTRTXExecutionProvider",
}
GRAPHS = 4
"""CUDA graphs, each of one shape, of a session, which can let go of none; further shapes run without."""
# Operators that hold the work of these models: a provider that leaves one of them to another has not taken the graph.
# What else is on the CPU computes shapes or works on a few numbers: `Concat`, `Div`, `Mul`, `Reshape`, `ArgMax` of
# token ids, `Sin` and `Cos` of timesteps.
_WORK = {
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

# ONNX's type name → torch dtype and the number of ONNX's TensorProto.DataType (numpy knows no bfloat16, so the numbers
# are what binds).
_DTYPES = {
    "float": (torch.float32, 1),
    "uint8": (torch.uint8, 2),
    "int8": (torch.int8, 3),
    "int32": (torch.int32, 6),
    "int64": (torch.int64, 7),
    "bool": (torch.bool, 9),
    "float16": (torch.float16, 10),
    "double": (torch.float64, 11),
    "bfloat16": (torch.bfloat16, 16),
}
_ELEMENT = dict(_DTYPES.values())


Session = TypeVar("Session")


def require(device: str = "cpu") -> None:
    """Refuse an ONNX Runtime that is not there, or has nothing for this device.

    Args:
        device: `cpu`, or `cuda[:n]` for its CUDA provider. Whether there is a GPU is not asked.

    Raises:
        BackendMissing: the reason, and as its hint the command that mends it.
    """
    on_cuda = device.startswith("cuda")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise BackendMissing("onnxruntime is not installed", hint=INSTALL_GPU if on_cuda else INSTALL) from error
    except (ImportError, OSError) as error:
        again = f"pip install --force-reinstall onnxruntime{'-gpu' if on_cuda else ''}"
        raise BackendMissing(f"onnxruntime does not load ({error})", hint=again) from error
    if not on_cuda:
        return
    if PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        raise BackendMissing(f"this onnxruntime {onnxruntime.__version__} runs on the CPU only", hint=REPLACE_BY_GPU)
    _require_cuda_of_torch(onnxruntime)


def missing(device: str = "cpu") -> str | None:
    """Returns why ONNX Runtime cannot run graphs on this device, with the command that mends it, or None.

    Args:
        device: as of `require`.
    """
    try:
        require(device)
    except BackendMissing as error:
        return f"{error.what}: {error.hint}"
    return None


def _require_cuda_of_torch(onnxruntime: Any) -> None:
    """Refuse a CUDA provider that finds no CUDA libraries beside this torch.

    The libraries are torch's: they are in the process already, and the provider takes those of its own major version.

    Raises:
        BackendMissing: it is built for another.
    """
    needed = str(getattr(onnxruntime, "cuda_version", "") or "").partition(".")[0]
    brought = str(torch.version.cuda or "").partition(".")[0]
    if not needed or not brought or needed == brought:
        return
    with suppress(OSError):
        ctypes.CDLL(f"cudart64_{needed}.dll" if sys.platform == "win32" else f"libcudart.so.{needed}")
        return
    older = int(needed) > int(brought)
    change = "pip install 'onnxruntime-gpu<1.27'" if older else "pip install --upgrade onnxruntime-gpu"
    built = f"onnxruntime-gpu {onnxruntime.__version__} needs CUDA {needed}"
    raise BackendMissing(f"{built}, and torch {torch.__version__} brings CUDA {brought}", hint=change)


def start_session(start: Callable[[bool], Session], cuda_graph: bool) -> tuple[Session, str | None]:
    """Returns a session, with a CUDA graph if that is wanted and possible; and the reason, where it is not possible.

    Args:
        start: makes the session, with a CUDA graph or without.

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


def message_of(error: object) -> str:
    """Returns what an error of ONNX Runtime says in one line, without its C++ types, source files and host names."""
    text = " ".join(str(error).split())
    if found := re.search(r"(\w+ failure \d+: [^;]*?) ;.*expr=([^;]+)", text):
        return short(f"{found[1]} in {found[2].strip()}")
    return short(re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text))


@dataclass
class _Static:
    """Tensors whose addresses stay, for one shape, bound once; the run that has `options` replays the CUDA graph over
    them.

    Attributes:
        captured: whether a run has captured the graph.
    """

    feeds: dict[str, torch.Tensor]
    results: dict[str, torch.Tensor]
    binding: Any
    options: Any
    captured: bool = False


class OnnxRuntimeRunner(Runner):
    """An `.onnx` file in ONNX Runtime.

    On a GPU it works on a stream of its own, in order with torch's current one, and never makes the host wait.

    Args:
        device: `cpu` or `cuda[:n]`; the default is what `provider` runs on, else the CPU.
        provider: `cpu`, `cuda`, `tensorrt` or `nvtensorrtrtx`; the default is `cpu` or `cuda`, as the device says. It
            takes the whole graph or the runner does not open: nothing falls back to another one.
        threads: of the CPU; by default as many as torch uses.
        cuda_graph: replay a captured graph for each shape (`cuda` only), over buffers of the runner's own. Where ONNX
            Runtime refuses or a capture fails, a warning gives the reason once, and the runner goes on without.
        prefer_nhwc: channels last inside convolutions on `cuda`; whether it pays depends on the card and the model.
        profile: the shapes that `tensorrt` and `nvtensorrtrtx` build for; without it they build again for each shape
            that is new.
        config: further session entries of ONNX Runtime's, by their keys.

    Attributes:
        graph_failure: why it runs without the CUDA graphs that it was asked for; None as long as none has failed.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        path: str | PathLike[str],
        device: torch.device | str | None = None,
        *,
        provider: str | None = None,
        threads: int | None = None,
        cuda_graph: bool = False,
        prefer_nhwc: bool = False,
        profile: Ranges | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(path, device or ("cpu" if provider in (None, "cpu") else "cuda"))
        self.provider = provider or self.device.type
        if self.provider not in PROVIDERS or (self.provider == "cpu") != (self.device.type == "cpu"):
            raise UsageError(
                f"provider {provider!r} on {self.device}",
                expected=f"one of {', '.join(PROVIDERS)}, and all but cpu on cuda",
            )
        if cuda_graph and self.provider != "cuda":
            raise UsageError(
                f"a CUDA graph with provider {self.provider!r}",
                expected="provider 'cuda'",
                hint="an .engine file, whose runner captures graphs",
            )
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads", expected="at least 1")
        self.cuda_graph = cuda_graph
        self._threads, self._nhwc, self._profile, self._extra = threads, prefer_nhwc, profile, dict(config or {})
        self._session: Any = None
        self._statics: dict[tuple[Shape, ...], _Static] = {}
        self.graph_failure: str | None = None

    def _load(self) -> None:
        require()
        import onnxruntime

        self.graph_failure = None
        recorded = hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")
        names: set[str] = set()

        def start(cuda_graph: bool) -> Any:
            options = self._session_options(onnxruntime, recorded)
            providers, wanted = self._providers(onnxruntime, options, cuda_graph)
            names.update(wanted)
            return onnxruntime.InferenceSession(str(self.path), options, providers=providers, enable_fallback=0)

        try:
            self._session, refusal = start_session(start, self.cuda_graph)
        except SdCompressError:
            raise
        except Exception as error:  # its exceptions share no base class
            raise self._unreadable(error) from error
        try:
            parts = self._session.get_provider_graph_assignment_info() if recorded else []
            assigned = [(part.ep_name, [node.op_type for node in part.get_nodes()]) for part in parts]
            self._check_provider(names, self._session.get_providers(), left_out(assigned, names))
            self.inputs = tuple(self._spec(node) for node in self._session.get_inputs())
            self.outputs = tuple(self._spec(node) for node in self._session.get_outputs())
        except BaseException:
            self._session = None
            raise
        if refusal is not None:
            others = sorted({operator for name, operators in assigned if name not in names for operator in operators})
            self._drop_graphs(f"{refusal}; elsewhere: {', '.join(others)}" if others else refusal)

    def _session_options(self, onnxruntime: Any, recorded: bool) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads or torch.get_num_threads()
        options.log_severity_level = 4  # what goes wrong comes as an exception
        for key, value in (
            {"session.record_ep_graph_assignment_info": "1"} if recorded else {}
        ).items() | self._extra.items():
            options.add_session_config_entry(key, str(value))
        return options

    def _drop_graphs(self, reason: str) -> None:
        """Go on without CUDA graphs.

        `_load` or `_run_on_gpu` calls it, so that the warning names a line of the caller.
        """
        self.graph_failure = reason
        if self._statics:
            torch.cuda.synchronize(self.device)  # earlier replays may still read and write them
            self._statics.clear()
        warn_without_graph(self.path, reason)

    def _providers(self, onnxruntime: Any, options: Any, cuda_graph: bool) -> tuple[list[Any] | None, set[str]]:
        """What `InferenceSession` gets as providers, and the names under which the wanted one may report itself."""
        name = PROVIDERS[self.provider]
        if self.provider == "cpu":
            return [name], {name}
        if not torch.cuda.is_available():
            raise BackendMissing(
                f"ONNX Runtime has no GPU here for provider {self.provider!r}", where=self.path, hint="provider 'cpu'"
            )
        self.device = torch.device(
            "cuda", torch.cuda.current_device() if self.device.index is None else self.device.index
        )
        self._stream = torch.cuda.Stream(self.device)
        common = {"device_id": str(self.device.index), "user_compute_stream": str(self._stream.cuda_stream)}
        # No TF32: a graph in fp32 is held against torch's fp32, and in half precision little is fp32.
        own = {"do_copy_in_default_stream": "1", "use_tf32": "0", "prefer_nhwc": str(int(self._nhwc))}
        cuda = (PROVIDERS["cuda"], common | own | {"enable_cuda_graph": str(int(cuda_graph))})
        there = onnxruntime.get_available_providers()
        if self.provider == "nvtensorrtrtx":
            given = (
                common | {"has_user_compute_stream": "1", "nv_runtime_cache_path": self._cache()} | self._shapes("nv")
            )
            if name in there:
                return [(name, given), cuda, PROVIDERS["cpu"]], {name}
            devices = _rtx_devices(onnxruntime)
            options.add_provider_for_devices(devices[self.device.index : self.device.index + 1] or devices[:1], given)
            return None, {name, devices[0].ep_name}
        if name not in there:
            raise BackendMissing(
                f"this ONNX Runtime has no {name}: it has {', '.join(there)}",
                where=self.path,
                hint=f"{INSTALL_GPU} on a machine with an NVIDIA GPU, or provider 'cpu'",
            )
        if self.provider == "cuda":
            return [cuda, PROVIDERS["cpu"]], {name}
        folder = self._cache()
        kept = {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        }
        return [(name, common | kept | self._precision() | self._shapes("trt")), cuda, PROVIDERS["cpu"]], {name}

    def _cache(self) -> str:
        """A folder for this very graph: the providers name what they keep by the graph's structure, which students of
        one shape share.
        """
        assert self.path is not None
        manifest = read_manifest(self.path.parent)
        entry = None if manifest is None else manifest.files.get(self.path.name)
        folder = (
            cache_folder() / "onnxruntime" / (entry.sha256 if entry else sha256_file(self.path))[:24] / self.provider
        )
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def _precision(self) -> dict[str, str]:
        """Returns what announces a half-precision graph: TensorRT 10 computes a weakly typed network in fp32 without.

        TensorRT 11 has strongly typed networks only, and no such flags. No ONNX Runtime up to 1.31.1 is built with it.
        """
        assert self.path is not None
        tensorrt = _tensorrt()
        if tensorrt is not None and not hasattr(tensorrt.BuilderFlag, "FP16"):
            return {}
        manifest = read_manifest(self.path.parent)
        precision = "" if manifest is None else str(manifest.config.get("precision"))
        return {f"trt_{precision}_enable": "1"} if precision in ("fp16", "bf16") else {}

    def _shapes(self, prefix: str) -> dict[str, str]:
        if self._profile is None:
            return {}
        return {
            f"{prefix}_profile_{which}_shapes": ",".join(
                f"{name}:{'x'.join(map(str, shapes[at]))}" for name, shapes in self._profile.items()
            )
            for at, which in enumerate(("min", "opt", "max"))
        }

    def _check_provider(self, names: set[str], started: Iterable[str], left: Mapping[str, str]) -> None:
        if not names & set(started):
            raise BackendMissing(
                f"{PROVIDERS[self.provider]} did not start, and ONNX Runtime would have used {', '.join(started)}",
                where=self.path,
                hint=_start_hint(self.provider),
            )
        if left:
            told = ", ".join(f"{operator} on {provider}" for operator, provider in sorted(left.items()))
            raise EngineError(
                f"{PROVIDERS[self.provider]} does not take the whole graph: {told}",
                where=self.path,
                hint="onnxruntime-gpu 1.25 or newer, an export with --opset 20, or another provider",
            )

    def _unreadable(self, error: Exception) -> EngineError:
        """What is wrong with the graph: by looking at it where onnx is installed, else in ONNX Runtime's words."""
        from ..graph import read_graph

        assert self.path is not None
        try:
            read_graph(self.path)
        except EngineError as found:
            return found
        except ImportError:
            pass
        if unknown := re.search(r"No Op registered for (\S+) with domain_version of (\d+)", str(error)):
            return EngineError(
                f"this ONNX Runtime knows no operator {unknown[1]} of opset {unknown[2]}",
                where=self.path,
                hint="a newer onnxruntime, or an export with a lower --opset",
            )
        return EngineError(
            f"not a graph that ONNX Runtime loads ({message_of(error)})",
            where=self.path,
            hint="export it again, or a newer onnxruntime",
        )

    @property
    def _device_id(self) -> int:
        return self.device.index or 0

    def _spec(self, node: Any) -> TensorSpec:
        name = node.type.removeprefix("tensor(").removesuffix(")")
        if name not in _DTYPES:
            raise EngineError(
                f"{node.name} is a {node.type}", where=self.path, expected=f"a tensor of {', '.join(_DTYPES)}"
            )
        return TensorSpec(
            node.name,
            tuple(
                size if isinstance(size, (int, str)) else f"{node.name}.{axis}" for axis, size in enumerate(node.shape)
            ),
            _DTYPES[name][0],
        )

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                return self._run_on_gpu(feeds)
        binding = self._infer(self._bind(feeds))
        # A clone, because the values die with the binding.
        return {name: view.clone() for name, view in self._views(binding).items()}

    def _bind(self, feeds: Mapping[str, torch.Tensor], results: Mapping[str, torch.Tensor] | None = None) -> Any:
        """A binding of feeds, and of results where they are given; ONNX Runtime makes room for them where not."""
        binding = self._session.io_binding()
        for name, tensor in feeds.items():
            binding.bind_input(
                name, self.device.type, self._device_id, _ELEMENT[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
            )
        for spec in self.outputs:
            given = (
                ()
                if results is None
                else (_ELEMENT[spec.dtype], tuple(results[spec.name].shape), results[spec.name].data_ptr())
            )
            binding.bind_output(spec.name, self.device.type, self._device_id, *given)
        return binding

    def _infer(self, binding: Any, options: Any = None) -> Any:
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed ({message_of(error)})", where=self.path) from error
        return binding

    def _views(self, binding: Any) -> dict[str, torch.Tensor]:
        return {spec.name: _torch_view(value) for spec, value in zip(self.outputs, binding.get_outputs(), strict=True)}

    def _run_on_gpu(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            static = self._static(feeds) if self.cuda_graph and self.graph_failure is None else None
            failure = None if static is None else self._replay(static, feeds)
            if static is not None and failure is None:
                binding, views = static.binding, static.results
            else:
                binding = self._infer(self._bind(feeds), self._run_options(-1))
                views = self._views(binding)
            if failure is not None:  # of the graph alone, as the same call has worked without
                self._drop_graphs(failure)
            results = {
                name: torch.empty_like(view) for name, view in views.items()
            }  # on the caller's stream, whose they are
            with torch.cuda.stream(self._stream):
                for name, tensor in results.items():
                    tensor.copy_(views[name])
            del binding  # the values die with it; their memory is used again in the order of the stream
            return results
        finally:
            current.wait_stream(self._stream)

    def _replay(self, static: _Static, feeds: Mapping[str, torch.Tensor]) -> str | None:
        """Run over the static tensors. Returns why the graph could not be captured, or None."""
        with torch.cuda.stream(self._stream):
            for name, tensor in feeds.items():
                static.feeds[name].copy_(tensor)
        try:
            self._infer(static.binding, static.options)
        except EngineError as error:
            if static.captured:
                raise
            return message_of(error.__cause__)
        static.captured = True
        return None

    def _run_options(self, graph: int) -> Any:
        """`graph` is the number of a CUDA graph to capture and replay; -1 is none."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def _static(self, feeds: Mapping[str, torch.Tensor]) -> _Static | None:
        """Buffers for these shapes; None for a shape more than `GRAPHS`."""
        key = tuple(tuple(tensor.shape) for tensor in feeds.values())
        if key not in self._statics:
            if len(self._statics) == GRAPHS:
                return None
            shapes = {
                name: view.shape
                for name, view in self._views(self._infer(self._bind(feeds), self._run_options(-1))).items()
            }
            fixed = {name: tensor.clone() for name, tensor in feeds.items()}
            results = {
                spec.name: torch.empty(shapes[spec.name], dtype=spec.dtype, device=self.device) for spec in self.outputs
            }
            torch.cuda.synchronize(self.device)
            self._statics[key] = _Static(
                fixed, results, self._bind(fixed, results), self._run_options(len(self._statics) + 1)
            )
        return self._statics[key]

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._session = None
        self._statics.clear()


def left_out(assigned: Iterable[tuple[str, Iterable[str]]], wanted: set[str]) -> dict[str, str]:
    """The operators with work in them that went to a provider not `wanted`: operator → provider.

    Args:
        assigned: provider and its operators, for each part of the graph.
    """
    return {
        operator: provider
        for provider, operators in assigned
        if provider not in wanted
        for operator in operators
        if operator in _WORK
    }


def _rtx_devices(onnxruntime: Any) -> list[Any]:
    """The GPUs of the TensorRT-RTX provider, which is a library of its own that is registered once a process."""
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin

        name = plugin.get_ep_name()
        find = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
        if not find:
            onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
            find = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    except (ImportError, OSError, AttributeError) as error:
        raise BackendMissing(f"ONNX Runtime has no TensorRT-RTX provider ({error})", hint=INSTALL_RTX) from error
    except Exception as error:  # ONNX Runtime's own, which share no base class
        raise BackendMissing(f"the TensorRT-RTX provider does not load ({short(error)})", hint=INSTALL_RTX) from error
    if not find:
        raise BackendMissing(
            "the TensorRT-RTX provider finds no GPU it runs on", expected="an RTX card", hint="provider 'cuda'"
        )
    return find


def _tensorrt() -> Any:
    """Returns TensorRT's Python package, or None. Importing it loads the libraries that the provider asks for."""
    try:
        import tensorrt
    except (ImportError, OSError):
        return None
    return tensorrt


def _start_hint(provider: str) -> str:
    """Returns what to type where a provider did not start: most often a library that it needs is missing."""
    tensorrt = _tensorrt()
    version = "none" if tensorrt is None else str(tensorrt.__version__)
    if provider == "tensorrt" and not version.startswith("10."):
        built = "as the provider is built with TensorRT 10"
        return f"pip install 'tensorrt<11', {built}, and installed is {version}; or provider 'cuda'"
    return f"{missing('cuda') or f'{INSTALL_GPU} for the installed CUDA'}; or provider 'cpu'"


def _torch_view(value: Any) -> torch.Tensor:
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    return torch.utils.dlpack.from_dlpack(
        value._ortvalue.to_dlpack()
    )  # onnxruntime before OrtValue spoke the protocol itself
