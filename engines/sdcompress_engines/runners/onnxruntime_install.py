"""Whether ONNX Runtime can run here on the CPU, on CUDA or through TensorRT, and the command where it cannot."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from typing import Any

import torch

from ..errors import BackendMissing

INSTALL = 'pip install "sdcompress[cpu]"'
INSTALL_GPU = 'pip install "sdcompress[gpu]"'
REPLACE_BY_GPU = f"pip uninstall -y onnxruntime onnxruntime-gpu && {INSTALL_GPU}"
"""Both packages write the same files, so the one for the CPU has to go first."""
INSTALL_RTX = "pip install onnxruntime-ep-nv-tensorrt-rtx, beside onnxruntime and without onnxruntime-gpu"
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nvtensorrtrtx": "NvTensorRTRTXExecutionProvider",
}


def require(device: str = "cpu") -> None:
    """Refuse an ONNX Runtime that is not installed, or has nothing for this device.

    Args:
        device: `cpu`, or `cuda[:n]` for its CUDA provider. Whether there is a GPU is not checked.

    Raises:
        BackendMissing: the reason, and as its hint the command that helps.
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
    """Returns why ONNX Runtime cannot run graphs on this device, with the command that helps; None where it can.

    Args:
        device: see `require`.
    """
    try:
        require(device)
    except BackendMissing as error:
        return f"{error.what}: {error.hint}"
    return None


def _require_cuda_of_torch(onnxruntime: Any) -> None:
    """Refuse a CUDA provider for which no CUDA libraries are here.

    It takes torch's libraries, which are in the process already, if they are of its own major version.

    Raises:
        BackendMissing: it is built for another major version, and that is not installed.
    """
    needed = str(getattr(onnxruntime, "cuda_version", "") or "").partition(".")[0]
    brought = str(torch.version.cuda or "").partition(".")[0]
    if not needed or not brought or needed == brought:
        return
    with suppress(OSError):
        ctypes.CDLL(f"cudart64_{needed}.dll" if sys.platform == "win32" else f"libcudart.so.{needed}")
        return
    older = int(needed) > int(brought)
    change = 'pip install "onnxruntime-gpu<1.27"' if older else "pip install --upgrade onnxruntime-gpu"
    built = f"onnxruntime-gpu {onnxruntime.__version__} needs CUDA {needed}"
    raise BackendMissing(f"{built}, and torch {torch.__version__} brings CUDA {brought}", hint=change)


def import_tensorrt() -> Any:
    """Returns TensorRT's Python package, or None. Its import loads the libraries that ONNX Runtime's provider needs."""
    try:
        import tensorrt
    except (ImportError, OSError):
        return None
    return tensorrt


def suggest_fix(provider: str) -> str:
    """Returns what to type where a provider did not start: most often a library that it needs is missing.

    Args:
        provider: a key of `PROVIDERS`.
    """
    tensorrt = import_tensorrt()
    version = "no TensorRT" if tensorrt is None else str(tensorrt.__version__)
    if provider == "tensorrt" and not version.startswith("10."):
        built = "because the provider is built with TensorRT 10"
        return f'pip install "tensorrt<11", {built}, and {version} is installed; or provider "cuda"'
    return f"{missing('cuda') or f'{INSTALL_GPU} for the installed CUDA'}; or provider 'cpu'"
