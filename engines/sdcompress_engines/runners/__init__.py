"""Runners: one contract (`base.Runner`) over torch, AOTInductor, ONNX Runtime, TensorRT and TensorRT-RTX."""

from __future__ import annotations

import inspect
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..flavour import FLAVOURS
from . import aot_package, onnxruntime_install, tensorrt
from .aot_compiler import compile_package
from .aot_inductor import AotInductorRunner
from .base import Runner, TensorSpec
from .memory import SharedMemory
from .onnxruntime import OnnxRuntimeRunner
from .tensorrt import TensorRTRunner
from .torch import TorchRunner

__all__ = [
    "AotInductorRunner",
    "OnnxRuntimeRunner",
    "Runner",
    "SharedMemory",
    "TensorRTRunner",
    "TensorSpec",
    "TorchRunner",
    "available",
    "compile_package",
    "open_runner",
]

_BY_SUFFIX: dict[str, type[OnnxRuntimeRunner] | type[TensorRTRunner] | type[AotInductorRunner]] = {
    ".onnx": OnnxRuntimeRunner,
    ".engine": TensorRTRunner,
    ".pt2": AotInductorRunner,
}


def open_runner(path: str | PathLike[str], device: torch.device | str | None = None, **options: Any) -> Runner:
    """Returns an open runner for a graph, chosen by the suffix of its file.

    Args:
        path: ends in `.onnx`, `.engine` or `.pt2`.
        device: by default the CPU for `.onnx`, a GPU for `.engine`, and for `.pt2` the device it was compiled for.
        options: of the runner's own, such as `cuda_graph=True`.

    Raises:
        UsageError: another suffix, no such file, or an option that the runner does not have. BackendMissing,
            EngineError, EngineMismatch: as `Runner.open`.
    """
    kind = _BY_SUFFIX.get(Path(path).suffix)
    if kind is None:
        raise UsageError(
            "nothing runs this kind of file",
            where=path,
            expected=f"{', '.join(list(_BY_SUFFIX)[:-1])} or {list(_BY_SUFFIX)[-1]}",
        )
    known = list(inspect.signature(kind.__init__).parameters)[3:]
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(
            f"{kind.backend if hasattr(kind, 'backend') else 'a TensorRT engine'} takes no {', '.join(unknown)}",
            where=path,
            expected=", ".join(known) or "no options",
        )
    return kind(path, device, **options).open()


def available(device: str = "cpu") -> dict[str, str | None]:
    """Returns backend → None where it is usable here, else the reason.

    Args:
        device: `cpu` or `cuda`, for ONNX Runtime; engines of TensorRT always run on a GPU.
    """
    engines = {name: tensorrt.missing(flavour) for name, flavour in FLAVOURS.items()}
    return {
        "torch": None,
        "aot-inductor": aot_package.missing(),
        "onnxruntime": onnxruntime_install.missing(device),
        **engines,
    }
