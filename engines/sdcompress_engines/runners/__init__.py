"""Runners: one contract (`base.Runner`) over torch, ONNX Runtime, TensorRT and TensorRT-RTX."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from ..errors import UsageError
from ..flavour import FLAVOURS
from . import onnxruntime, tensorrt
from .base import Runner, TensorSpec
from .onnxruntime import OnnxRuntimeRunner
from .tensorrt import TensorRTRunner
from .torch import TorchRunner

__all__ = ["OnnxRuntimeRunner", "Runner", "TensorRTRunner", "TensorSpec", "TorchRunner", "available", "open_runner"]

_BY_SUFFIX: dict[str, type[OnnxRuntimeRunner] | type[TensorRTRunner]] = {".onnx": OnnxRuntimeRunner, ".engine": TensorRTRunner}


def open_runner(path: str | PathLike[str], device: torch.device | str | None = None) -> Runner:
    """An open runner for a graph, chosen by its suffix: `.onnx` runs on the CPU unless told otherwise, `.engine` on the GPU.

    Raises:
        UsageError: another suffix, or no such file. BackendMissing, EngineError, EngineMismatch: as `Runner.open`.
    """
    kind = _BY_SUFFIX.get(Path(path).suffix)
    if kind is None:
        raise UsageError("nothing runs this kind of file", where=path, expected=" or ".join(_BY_SUFFIX))
    return kind(path, device).open()


def available() -> dict[str, str | None]:
    """Backend → None where it is usable here, else the reason it is not."""
    return {"torch": None, "onnxruntime": onnxruntime.missing(), **{name: tensorrt.missing(flavour) for name, flavour in FLAVOURS.items()}}
