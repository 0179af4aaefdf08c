"""ONNX Runtime on the CPU, on CUDA, and through TensorRT. Tensors are bound by address: no input is copied."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from ..errors import BackendMissing, EngineError, SdCompressError, UsageError
from .base import ORIGINAL, Runner, TensorSpec, cuda_device
from .cuda_graphs import warn_without_graph
from .onnxruntime_install import PROVIDERS, require
from .onnxruntime_session import (
    SessionRequest,
    StartedSession,
    check_provider,
    create_session,
    explain_refusal,
    left_out,
    message_of,
    start_session,
)
from .shapes import Ranges, Shape

MAX_SESSIONS = 2
"""Sessions that a runner keeps, each with weights of its own; a new one replaces the one that was used longest ago."""
MAX_SESSION_GRAPHS = 4
"""CUDA graphs, each of one shape, of a session. A session cannot free one, so further shapes run without."""

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


@dataclass
class _Static:
    """Tensors of one shape whose addresses stay, bound once; a run with `options` replays the CUDA graph over them.

    Attributes:
        captured: whether a run has captured the graph.
    """

    feeds: dict[str, torch.Tensor]
    results: dict[str, torch.Tensor]
    binding: Any
    options: Any
    captured: bool = False


@dataclass
class _Session:
    """A session of ONNX Runtime with weights of its own.

    Attributes:
        native: ONNX Runtime's object.
        weights: those that replace the file's; the session may read their memory.
        statics: shapes → the tensors of their CUDA graph.
    """

    native: Any
    weights: Mapping[str, torch.Tensor]
    statics: dict[tuple[Shape, ...], _Static] = field(default_factory=dict)


class OnnxRuntimeRunner(Runner):
    """An `.onnx` file in ONNX Runtime.

    A session cannot change its weights, so `set_weights` starts one with other values for the graph's initializers. The
    last ones are kept, and a key that comes again costs nothing.

    On a GPU it works on a stream of its own, in order with torch's current one, and never makes the host wait.

    Args:
        path: the graph.
        device: `cpu` or `cuda[:n]`; the default is what `provider` runs on, else the CPU.
        provider: `cpu`, `cuda`, `tensorrt` or `nvtensorrtrtx`; the default is `cpu` or `cuda`, as the device says. It
            takes the whole graph or the runner does not open: nothing falls back to another one.
        threads: of the CPU; by default as many as torch uses.
        cuda_graph: replay a captured graph for each shape (`cuda` only), over buffers of the runner's own. Where ONNX
            Runtime refuses or a capture fails, a warning gives the reason once, and the runner goes on without.
        prefer_nhwc: channels last inside convolutions on `cuda`; whether it pays depends on the card and the model.
        profile: the shapes that `tensorrt` and `nvtensorrtrtx` build for; without it they build again for each new
            shape.
        config: further session entries of ONNX Runtime's, by their keys.

    Attributes:
        graph_failure: why it runs without the requested CUDA graphs; None as long as none has failed.

    Raises:
        UsageError: a provider, device, CUDA graph or number of threads that do not go together.
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
        assert self.path is not None
        chosen = provider or self.device.type
        if chosen not in PROVIDERS or (chosen == "cpu") != (self.device.type == "cpu"):
            raise UsageError(
                f"provider {provider!r} on {self.device}",
                expected=f"one of {', '.join(PROVIDERS)}, and all but cpu on cuda",
            )
        if cuda_graph and chosen != "cuda":
            raise UsageError(
                f"a CUDA graph with provider {chosen!r}",
                expected="provider 'cuda'",
                hint="an .engine file, whose runner captures graphs",
            )
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads", expected="at least 1")
        self.provider, self.cuda_graph = chosen, cuda_graph
        self.graph_failure: str | None = None
        self._request = SessionRequest(self.path, chosen, threads, prefer_nhwc, profile, dict(config or {}))
        self._sessions: dict[Hashable, _Session] = {}  # the one used last comes last
        self._session: Any = None
        self._stream: Any = None

    def _load(self) -> None:
        require()
        self.graph_failure = None
        self._stream = None
        if self.provider != "cpu":
            if not torch.cuda.is_available():
                raise BackendMissing(
                    f"ONNX Runtime has no GPU here for provider {self.provider!r}",
                    where=self.path,
                    hint="provider 'cpu'",
                )
            self.device = cuda_device(self.device.index)
            self._stream = torch.cuda.Stream(self.device)
        refusal = self._start(ORIGINAL, {})
        native = self._session.native
        self.inputs = tuple(self._spec(node) for node in native.get_inputs())
        self.outputs = tuple(self._spec(node) for node in native.get_outputs())
        if refusal is not None:
            self._drop_graphs(refusal)

    def _start(self, key: Hashable, weights: Mapping[str, torch.Tensor]) -> str | None:
        """Start a session and run in it from now on. Returns why it has no CUDA graphs, where they are wanted.

        Args:
            key: of the weights.
            weights: initializer → its value, on the CPU; the others are those of the file.
        """

        values = {name: _to_ort_value(value) for name, value in weights.items()}

        def start(cuda_graph: bool) -> StartedSession:
            return create_session(self._request, self.device, self._stream, cuda_graph=cuda_graph, weights=values)

        try:
            session, refusal = start_session(start, self.cuda_graph and self.graph_failure is None)
        except SdCompressError:
            raise
        except Exception as error:  # its exceptions share no base class
            raise explain_refusal(self._request.path, error) from error
        assigned = session.assigned()
        check_provider(self._request, session.names, session.native.get_providers(), left_out(assigned, session.names))
        self._session = self._sessions[key] = _Session(session.native, weights)
        others = sorted({name for provider, names in assigned if provider not in session.names for name in names})
        return refusal if refusal is None or not others else f"{refusal}; elsewhere: {', '.join(others)}"

    def _drop_graphs(self, reason: str) -> None:
        """Go on without CUDA graphs.

        `_load`, `_exchange` or `_run_on_gpu` calls it, so that the warning names a line of the caller.
        """
        self.graph_failure = reason
        if any(session.statics for session in self._sessions.values()):
            torch.cuda.synchronize(self.device)  # earlier replays may still read and write them
        for session in self._sessions.values():
            session.statics.clear()
        warn_without_graph(self.path, reason)

    @property
    def _device_id(self) -> int:
        return self.device.index or 0

    def _spec(self, node: Any) -> TensorSpec:
        name = node.type.removeprefix("tensor(").removesuffix(")")
        if name not in _DTYPES:
            raise EngineError(
                f"{node.name} is a {node.type}", where=self.path, expected=f"a tensor of {', '.join(_DTYPES)}"
            )
        shape = tuple(
            size if isinstance(size, (int, str)) else f"{node.name}.{axis}" for axis, size in enumerate(node.shape)
        )
        return TensorSpec(node.name, shape, _DTYPES[name][0])

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                return self._run_on_gpu(feeds)
        binding = self._infer(self._bind(feeds))
        # A clone, because the values die with the binding.
        return {name: view.clone() for name, view in self._views(binding).items()}

    def _bind(self, feeds: Mapping[str, torch.Tensor], results: Mapping[str, torch.Tensor] | None = None) -> Any:
        """Returns a binding of feeds and results. Without `results` ONNX Runtime allocates them."""
        binding = self._session.native.io_binding()
        place = self.device.type, self._device_id
        for name, tensor in feeds.items():
            binding.bind_input(name, *place, _ELEMENT[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for spec in self.outputs:
            if results is None:
                binding.bind_output(spec.name, *place)
            else:
                tensor = results[spec.name]
                binding.bind_output(spec.name, *place, _ELEMENT[spec.dtype], tuple(tensor.shape), tensor.data_ptr())
        return binding

    def _infer(self, binding: Any, options: Any = None) -> Any:
        try:
            self._session.native.run_with_iobinding(binding, options)
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
            # Allocated on the caller's stream, as they belong to the caller.
            results = {name: torch.empty_like(view) for name, view in views.items()}
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
        """Returns options of a run. `graph` is the number of a CUDA graph to capture and replay; -1 is none."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def _static(self, feeds: Mapping[str, torch.Tensor]) -> _Static | None:
        """Returns the static tensors for these shapes; None for shapes beyond the first `MAX_SESSION_GRAPHS`."""
        key = tuple(tuple(tensor.shape) for tensor in feeds.values())
        if key not in self._session.statics:
            if len(self._session.statics) == MAX_SESSION_GRAPHS:
                return None
            once = self._infer(self._bind(feeds), self._run_options(-1))
            shapes = {name: view.shape for name, view in self._views(once).items()}
            del once
            fixed = {name: tensor.clone() for name, tensor in feeds.items()}
            results = {
                spec.name: torch.empty(shapes[spec.name], dtype=spec.dtype, device=self.device) for spec in self.outputs
            }
            torch.cuda.synchronize(self.device)
            self._session.statics[key] = _Static(
                fixed, results, self._bind(fixed, results), self._run_options(len(self._session.statics) + 1)
            )
        return self._session.statics[key]

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._session = None
        self._sessions.clear()

    def _fixed_weights(self) -> EngineError:
        if self.provider not in ("cpu", "cuda"):
            return EngineError(
                f"takes no LoRA: {PROVIDERS[self.provider]} builds the weights into its engine",
                where=self.path,
                hint="provider 'cuda', or an export with --lora FILE:WEIGHT",
            )
        return super()._fixed_weights()

    def _exchange(self, changes: Mapping[str, torch.Tensor], key: Hashable) -> None:
        if self.provider not in ("cpu", "cuda"):
            raise self._fixed_weights()
        key = object() if key is None else key
        if (kept := self._sessions.pop(key, None)) is not None:
            self._session = self._sessions[key] = kept
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the session that goes may still run
        while len(self._sessions) >= MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        refusal = self._start(key, {name: self._to_stored(name, changes[name]) for name in changes})
        if refusal is not None:
            self._drop_graphs(refusal)

    def _to_stored(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Returns a weight as the graph has it, on the CPU."""
        return (value.t() if self.weights[name].transposed else value).cpu().contiguous()


def _to_ort_value(value: torch.Tensor) -> Any:
    """Returns a contiguous tensor on the CPU as ONNX Runtime holds it, without a copy."""
    import onnxruntime

    if hasattr(onnxruntime.OrtValue, "from_dlpack"):
        return onnxruntime.OrtValue.from_dlpack(value)
    # onnxruntime before 1.24; numpy has no bfloat16
    array = (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ELEMENT[value.dtype])


def _torch_view(value: Any) -> torch.Tensor:
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    # onnxruntime before OrtValue spoke the protocol itself
    return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
