"""TensorRT and TensorRT-RTX engines on torch CUDA tensors: bound by address, run on torch's current stream, never over the host."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

from ..errors import BackendMissing, EngineError, EngineMismatch
from ..flavour import FLAVOURS, Flavour
from ..manifest import read_manifest
from .base import Runner, TensorSpec

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
# What this file takes from the library, besides constructors; a test holds each name against the one that is installed.
USED_API = {
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": ("num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape", "get_tensor_profile_shape", "create_execution_context"),
    "IExecutionContext": ("set_input_shape", "set_tensor_address", "infer_shapes", "get_tensor_shape", "execute_async_v3"),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "ILogger": ("log", "ERROR", "INTERNAL_ERROR"),
    "DataType": tuple(_DTYPES),
}


def missing(flavour: Flavour) -> str | None:
    """Why engines of this flavour cannot run here, or None."""
    return flavour.missing() or (None if torch.cuda.is_available() else "no CUDA device")


class TensorRTRunner(Runner):
    """An `.engine` file on a GPU. Its flavour is the one its manifest names, else the one installed.

    Free sizes carry the names `input.axis`, as an engine keeps none; their range is the engine's first optimization profile.
    """

    def __init__(self, path: str | PathLike[str], device: torch.device | str | None = None, flavour: Flavour | None = None) -> None:
        super().__init__(path, device or "cuda")
        assert self.path is not None
        self._made = {} if (manifest := read_manifest(self.path.parent)) is None else manifest.config
        self.flavour = flavour or FLAVOURS.get(str(self._made.get("flavour"))) or next((f for f in FLAVOURS.values() if f.missing() is None), FLAVOURS["tensorrt-rtx"])
        self.backend = self.flavour.name
        self._engine: Any = None
        self._context: Any = None
        self._ranges: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def _load(self) -> None:
        trt = self.flavour.load()
        if self.device.type != "cuda" or not torch.cuda.is_available():
            raise BackendMissing(f"a {self.flavour.name} engine runs on an NVIDIA GPU and there is none", where=self.path, hint="run the ONNX graph instead: it needs no GPU")
        self._log = _log_of(trt)
        assert self.path is not None
        with torch.cuda.device(self.device):
            self._runtime = trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(self.path.read_bytes())
            if self._engine is None:
                raise self._mismatch()
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise EngineError(f"no execution context, most often for lack of GPU memory ({self._log.said()})", where=self.path)
        specs: dict[Any, list[TensorSpec]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            mode = self._engine.get_tensor_mode(name)
            shape = tuple(f"{name}.{axis}" if size < 0 else int(size) for axis, size in enumerate(self._engine.get_tensor_shape(name)))
            specs[mode].append(TensorSpec(name, shape, _DTYPES[self._engine.get_tensor_dtype(name).name]))
            if mode == trt.TensorIOMode.INPUT:
                least, _, most = self._engine.get_tensor_profile_shape(name, 0)
                self._ranges[name] = (tuple(least), tuple(most))
        self.inputs, self.outputs = tuple(specs[trt.TensorIOMode.INPUT]), tuple(specs[trt.TensorIOMode.OUTPUT])

    def _mismatch(self) -> EngineMismatch:
        made = self._made
        origin = f"it was built with {made.get('flavour')} {made.get('version')} for compute capability {made.get('compute_capabilities')}" if made else "it has no manifest that says what built it"
        here = f"{self.flavour.name} {self.flavour.version} on {torch.cuda.get_device_name(self.device)} {torch.cuda.get_device_capability(self.device)}"
        return EngineMismatch(f"the engine does not load: {origin}, and here is {here} ({self._log.said()})", where=self.path, hint="build it again here: sdcompress export MODEL --trt -o DIR")

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, tensor in feeds.items():
            shape = tuple(tensor.shape)
            least, most = self._ranges[name]
            if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
                raise EngineMismatch(f"input {name} has shape {shape}", where=self.path, expected=f"between {least} and {most}", hint="build the engine with a wider profile")
            if not self._context.set_input_shape(name, shape) or not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise EngineMismatch(f"input {name} of shape {shape} was refused ({self._log.said()})", where=self.path)
        if lacking := self._context.infer_shapes():
            raise EngineMismatch(f"the shape of {', '.join(lacking)} is not known from the inputs", where=self.path)
        results = {spec.name: torch.empty(tuple(self._context.get_tensor_shape(spec.name)), dtype=spec.dtype, device=self.device) for spec in self.outputs}
        for name, tensor in results.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        # Inputs and outputs live in torch's caching allocator, which reuses memory in the order of this stream: no need to wait.
        with torch.cuda.device(self.device):
            if not self._context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
                raise EngineError(f"the engine failed ({self._log.said()})", where=self.path)
        return results

    def _release(self) -> None:
        torch.cuda.synchronize(self.device)
        self._context = self._engine = self._runtime = None


def _log_of(trt: Any) -> Any:
    """A TensorRT logger that keeps its errors for the message instead of printing them."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def said(self) -> str:
            return "; ".join(self.errors[-3:]) or "it gave no reason"

    return Log()
