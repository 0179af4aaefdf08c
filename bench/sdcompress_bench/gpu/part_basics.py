"""Parts 0 and 1: what this machine has installed, and the limits of its device."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from sdcompress_engines.exactness import ieee_fp32, relative_l2

from ..peaks import measure_peaks
from .child import PartRun
from .models import peak_options

PRODUCT = 96
"""Side of the product that tests a device: large enough for its matrix units."""


def environment(run: PartRun) -> None:
    """Write what works and what is installed, one fact a row."""
    forked = run.facts["forked"]
    if run.is_cuda:
        run.row("CUDA in a forked process", **forked, value="works" if "failed" not in forked else "does not work")
    else:
        run.skip("CUDA in a forked process", "needs a CUDA device")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        run.measure(f"a product in {str(dtype).removeprefix('torch.')}", partial(check_product, run, dtype))
    for tool, version in {"nvcc": "--version", "g++": "--version", "ninja": "--version", "ptxas": "--version"}.items():
        found = tool_version(tool, version)
        run.row(f"tool {tool}", value=found) if found else run.skip(f"tool {tool}", "not on the PATH")
    for name in ("triton", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx", "pytest"):
        installed = importlib.util.find_spec(name) is not None
        run.row(f"package {name}", value="installed") if installed else run.skip(f"package {name}", "not installed")
    run.measure("backends", lambda: backends(run))


def check_product(run: PartRun, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the error of a matrix product on the device against one in double precision.

    Raises:
        RuntimeError: it is too large.
    """
    left, right = (torch.randn(PRODUCT, PRODUCT, device=run.device).to(dtype) for _ in range(2))
    with ieee_fp32():
        found = (left @ right).double()
    truth = left.double() @ right.double()
    error = relative_l2(found, truth)
    limit = 4 * torch.finfo(dtype).eps
    if not error <= limit:
        raise RuntimeError(f"off by {error:.2e}, over {limit:.2e}")
    return {"relative_l2": error, "limit_relative_l2": limit}


def tool_version(tool: str, option: str) -> str | None:
    """Returns the line with a tool's version, or None if the tool is not installed."""
    path = shutil.which(tool)
    if path is None:
        return None
    try:
        output = subprocess.run([path, option], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.strip() for line in output.splitlines() if any(letter.isdigit() for letter in line)]
    return next((line for line in lines if "release" in line), lines[0] if lines else "installed")[:80]


def backends(run: PartRun) -> dict[str, Any]:
    """Returns the backends that can run here, and the reasons of the others."""
    from sdcompress_engines.runners import available

    found = available(run.device.type)
    usable = [name for name, reason in found.items() if reason is None]
    return {"value": ", ".join(usable), "reasons": {name: reason for name, reason in found.items() if reason}}


def peaks(run: PartRun) -> None:
    """Write the fastest matrix product of each precision and the fastest copy; shares of the peak refer to them."""
    options = peak_options(run.smoke)
    for precision in ("fp16", "bf16", "fp32"):
        with ieee_fp32():
            run.measure(precision, partial(peak, run, precision, options))
    if run.is_cuda:
        with tf32():
            run.measure("fp32 with TF32", lambda: peak(run, "fp32", options))
    else:
        run.skip("fp32 with TF32", "needs a CUDA device")


def peak(run: PartRun, precision: str, options: Any) -> dict[str, Any]:
    """Returns the limits of the device in a precision.

    Args:
        run: has the device.
        precision: fp32, fp16 or bf16.
        options: of `measure_peaks`.
    """
    found = measure_peaks(str(run.device), precision, **options)
    return {"matmul_tflops": found.matmul_flops_per_s / 1e12, "copy_gb_per_s": found.bandwidth_bytes_per_s / 1e9}


@contextmanager
def tf32() -> Iterator[None]:
    """Compute fp32 matrix products in TF32 inside the block."""
    with ieee_fp32():  # restores the previous settings
        torch.backends.cuda.matmul.allow_tf32 = True
        yield
