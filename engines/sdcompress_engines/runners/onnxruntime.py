"""ONNX Runtime, on the CPU or on CUDA. Tensors are bound by address, so nothing is copied on the way in, in any dtype."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

from ..errors import BackendMissing, EngineError
from .base import Runner, TensorSpec

INSTALL = "pip install 'sdcompress[cpu]'"
INSTALL_GPU = "pip install 'sdcompress[gpu]'"

# ONNX's type name → torch dtype and the number of ONNX's TensorProto.DataType (numpy knows no bfloat16, so the numbers are what binds).
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


def missing() -> str | None:
    """Why ONNX Runtime is not usable here, or None."""
    try:
        import onnxruntime  # noqa: F401
    except (ImportError, OSError) as error:
        return f"onnxruntime is not installed ({error}): {INSTALL}"
    return None


class OnnxRuntimeRunner(Runner):
    """An `.onnx` file in ONNX Runtime, with as many threads as torch uses. `device` is `cpu` or `cuda[:n]`; the default is the CPU."""

    backend = "onnxruntime"

    def __init__(self, path: str | PathLike[str], device: torch.device | str | None = None) -> None:
        super().__init__(path, device or "cpu")
        self._session: Any = None

    def _load(self) -> None:
        if missing():
            raise BackendMissing("onnxruntime is not installed", hint=INSTALL)
        import onnxruntime

        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device.type == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not torch.cuda.is_available():
                raise BackendMissing("ONNX Runtime has no CUDA here", hint=f"{INSTALL_GPU} on a machine with an NVIDIA GPU, or device='cpu'")
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": self._device_id}))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(self.path), options, providers=providers)
        except Exception as error:  # its exceptions share no base class
            raise EngineError(f"not a graph that ONNX Runtime loads ({error})", where=self.path, hint="export it again, or a newer onnxruntime") from error
        if self.device.type == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            self._session = None
            raise BackendMissing("ONNX Runtime could not start CUDA and would have used the CPU", where=self.path, hint=f"{INSTALL_GPU} for the installed CUDA, or device='cpu'")
        self.inputs = tuple(self._spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(self._spec(node) for node in self._session.get_outputs())

    @property
    def _device_id(self) -> int:
        return self.device.index or 0

    def _spec(self, node: Any) -> TensorSpec:
        name = node.type.removeprefix("tensor(").removesuffix(")")
        if name not in _DTYPES:
            raise EngineError(f"{node.name} is a {node.type}", where=self.path, expected=f"a tensor of {', '.join(_DTYPES)}")
        return TensorSpec(node.name, tuple(size if isinstance(size, (int, str)) else f"{node.name}.{axis}" for axis, size in enumerate(node.shape)), _DTYPES[name][0])

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        binding = self._session.io_binding()
        for name, tensor in feeds.items():
            binding.bind_input(name, self.device.type, self._device_id, _ELEMENT[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for spec in self.outputs:
            binding.bind_output(spec.name, self.device.type, self._device_id)
        if self.device.type == "cuda":  # ONNX Runtime works on a stream of its own, which knows nothing of torch's pending writes
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed ({error})", where=self.path) from error
        # A clone, because the values die with the binding.
        return {spec.name: _torch_view(value).clone() for spec, value in zip(self.outputs, binding.get_outputs(), strict=True)}

    def _release(self) -> None:
        self._session = None


def _torch_view(value: Any) -> torch.Tensor:
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())  # onnxruntime before OrtValue spoke the protocol itself
