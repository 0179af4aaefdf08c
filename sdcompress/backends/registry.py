"""The backends a pipeline runs on."""

from __future__ import annotations

from sdcompress_engines.errors import UsageError

BACKENDS = ("torch", "compile", "aot", "onnxruntime", "tensorrt", "auto")

BACKEND_ALIASES = {"ort": "onnxruntime", "trt": "tensorrt", "aoti": "aot"}

FALLBACKS = ("torch",)


def backend_name(name: str) -> str:
    """The full name of a backend given by name or alias.

    Raises:
        UsageError: no such backend.
    """
    full = BACKEND_ALIASES.get(name, name)
    if full not in BACKENDS:
        raise UsageError(f"no backend {name!r}", expected=f"one of {', '.join([*BACKENDS, *BACKEND_ALIASES])}")
    return full
