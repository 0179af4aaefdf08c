"""The backends, one entry each.

To add one, write its entry in `_BUILT_IN` and, where it needs one, a runner in the engines package.
Everything else (help texts, `--backend auto`, `doctor`, bench, reports) reads the entries.

Help texts import this module, so it imports neither torch nor diffusers at its top.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdcompress_engines.errors import UsageError
from sdcompress_engines.flavour import FLAVOURS, TENSORRT, TENSORRT_RTX

from sdcompress.backends.backend import Backend, UNetRequest

if TYPE_CHECKING:
    from sdcompress_engines.runners import Runner

    from sdcompress.export.components import Precision

AUTO = "auto"
"""The choice of the fastest backend, by measurement."""
FALLBACKS = ("torch",)
"""What can run the shapes that an engine was not built for."""


def _open_compiled(request: UNetRequest) -> Runner:
    from sdcompress.backends.torch_unet import open_compiled

    return open_compiled(request)


def _open_package(request: UNetRequest) -> Runner:
    from sdcompress.backends.torch_unet import open_packaged

    return open_packaged(request)


def _cached_package(sha256: str, device: str, precision: Precision) -> Path:
    from sdcompress.export.aot import PACKAGE, package_folder

    return package_folder(sha256, device, precision) / PACKAGE


def _missing_aot(device: str) -> str | None:
    from sdcompress_engines.runners import available

    return available(device)["aot-inductor"]


def _missing_onnxruntime(device: str) -> str | None:
    from sdcompress_engines.runners import available

    return available(device)["onnxruntime"]


def _missing_tensorrt(device: str) -> str | None:
    """Returns why no library of TensorRT runs here, or None where one does."""
    from sdcompress_engines.runners import available

    if device != "cuda":
        return "its engines run on an NVIDIA GPU, and the device is the CPU"
    reasons = [available(device)[flavour] for flavour in FLAVOURS]
    return None if None in reasons else reasons[-1]


_BUILT_IN = (
    Backend(
        "torch",
        "PyTorch",
        colors=("#b3ada1", "#7d786e"),
        auto={"cuda": ("fp16",), "cpu": ("bf16",)},
    ),
    Backend(
        "compile",
        "torch.compile",
        colors=("#c2703a", "#dd9a68"),
        open_unet=_open_compiled,
        compiles=True,
        auto={"cuda": ("fp16",)},
    ),
    Backend(
        "aot",
        "AOTInductor",
        colors=("#8a5aa8", "#bb95d4"),
        alias="aoti",
        suffix=".pt2",
        open_unet=_open_package,
        compiles=True,
        cached_unet=_cached_package,
        missing=_missing_aot,
        auto={"cuda": ("fp16",), "cpu": ("bf16",)},
    ),
    Backend(
        "onnxruntime",
        "ONNX Runtime",
        colors=("#3f6fb5", "#7ba5e3"),
        alias="ort",
        artifact="onnx",
        suffix=".onnx",
        missing=_missing_onnxruntime,
        auto={"cuda": ("fp16",), "cpu": ("fp32",)},
        lacks={"cpu": {"bf16": "ONNX Runtime computes no bf16 on a CPU"}},
        graph_runtimes={"cuda": "onnxruntime"},  # it has no CUDA kernel for group norms
        package="onnxruntime",
        gpu_package="onnxruntime-gpu",
    ),
    Backend(
        "tensorrt",
        "TensorRT",
        colors=("#4c8a3a", "#84bd70"),
        alias="trt",
        artifact="engine",
        suffix=".engine",
        missing=_missing_tensorrt,
        devices=("cuda",),
        auto={"cuda": ("fp16",)},
        package="tensorrt",
        libraries={TENSORRT.name: "tensorrt", TENSORRT_RTX.name: "tensorrt-rtx-cu13"},
    ),
)
_REGISTERED: dict[str, Backend] = {backend.name: backend for backend in _BUILT_IN}


def backends() -> dict[str, Backend]:
    """Returns all backends by name, PyTorch first."""
    return dict(_REGISTERED)


def register(backend: Backend) -> Backend:
    """Add a backend for this process, as a plugin or a test does. Returns it.

    Raises:
        UsageError: its name or alias is taken.
    """
    if taken := {backend.name, backend.alias} & {AUTO, *_REGISTERED, *aliases()}:
        raise UsageError(f"the backend {taken.pop()!r} exists already", hint="give it another name")
    _REGISTERED[backend.name] = backend
    return backend


def unregister(name: str) -> None:
    """Remove a backend that `register` added; does nothing for another name."""
    if name not in {backend.name for backend in _BUILT_IN}:
        _REGISTERED.pop(name, None)


def aliases() -> dict[str, str]:
    """Returns alias → name."""
    return {backend.alias: backend.name for backend in _REGISTERED.values() if backend.alias}


def backend_name(name: str) -> str:
    """Returns the full name of a backend given by name or alias; `auto` stays `auto`.

    Raises:
        UsageError: there is no such backend.
    """
    full = aliases().get(name, name)
    if full not in (*_REGISTERED, AUTO):
        raise UsageError(f"no backend {name!r}", expected=f"one of {', '.join([*_REGISTERED, AUTO, *aliases()])}")
    return full


def find_backend(name: str) -> Backend:
    """Returns the backend of a name or alias.

    Raises:
        UsageError: there is no such backend, or it is `auto`, which is a choice among them.
    """
    full = backend_name(name)
    if full == AUTO:
        raise UsageError(
            "the backend 'auto' cannot be used here", expected=f"one of {', '.join([*_REGISTERED, *aliases()])}"
        )
    return _REGISTERED[full]


def backend_of_artifact(kind: str) -> Backend | None:
    """Returns the backend that runs export folders of a manifest kind, or None where none does."""
    return next((backend for backend in _REGISTERED.values() if backend.artifact == kind), None)


def help_text() -> str:
    """Returns the choices of a `--backend` option, in one sentence, for its help."""
    names = [
        backend.short_name
        if backend.title.lower().endswith(backend.short_name)
        else f"{backend.short_name} ({backend.title})"
        for backend in _REGISTERED.values()
    ]
    return f"{', '.join(names)}, or {AUTO}: the fastest here, by measurement."
