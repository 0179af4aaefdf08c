"""Times one setup in this process, in whichever environment, and writes its outputs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from .setups import SETUPS, PeerSetup, artifact_of, output_of

STEADY = 1.1
"""Warm-up ends when three calls in a row agree within this factor, or after 20 calls (2 if calls take seconds)."""
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "optimum-onnx",
    "torch-tensorrt",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


def open_pipeline(setup: PeerSetup, folder: Path, device: str) -> Any:
    """Returns a pipeline, created as the documentation of each library says.

    Args:
        setup: what runs it.
        folder: of the run's model.
        device: `cpu` or `cuda`.
    """
    artifact = artifact_of(setup, folder)
    if setup.kind == "optimum":
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        return ORTStableDiffusionPipeline.from_pretrained(artifact, provider=provider)
    if setup.kind in ("diffusers", "torch_tensorrt"):
        return _open_diffusers(setup, artifact, device)
    from sdcompress.backends.assemble import open_pipeline

    precision: Any = setup.precision
    if setup.kind in ("aot", "compile"):
        package = None if setup.kind == "compile" else artifact
        return open_pipeline(folder / "model", setup.kind, package, device=device, precision=precision)
    return open_pipeline(artifact, setup.kind, device=device, steady=True)


def _open_diffusers(setup: PeerSetup, artifact: Path, device: str) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    if setup.kind == "torch_tensorrt":
        import torch_tensorrt  # registers its backend

        torch_tensorrt.runtime.set_cudagraphs_mode(True)
    if setup.precision == "fp32":  # IEEE fp32: by default torch computes convolutions in TF32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipeline = StableDiffusionPipeline.from_pretrained(artifact, torch_dtype=_dtype(setup)).to(device)
    if setup.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
    if setup.compile is not None:
        pipeline.unet.compile(**setup.compile)
    return pipeline


def _dtype(setup: PeerSetup) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[setup.precision]


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Returns the samples of one setup; its outputs are written beside the model.

    Args:
        case: what `Run.case` returns.

    Raises:
        RuntimeError: the UNet's output is not finite.
    """
    import numpy as np
    import torch

    folder, device = Path(case["folder"]), case["device"]
    setup, cuda = SETUPS[device][case["way"]], device == "cuda"
    free = torch.cuda.mem_get_info()[0] if cuda else 0

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = call()
        if cuda:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - started), result

    load_ms, pipeline = timed(lambda: open_pipeline(setup, folder, device))
    pipeline.set_progress_bar_config(disable=True)
    picture, step = _calls(pipeline, setup, case)
    first_ms, _ = timed(picture)
    with torch.no_grad():
        warm: list[float] = []
        most = 2 if case["samples"] < 3 else 20
        while len(warm) < most and not (len(warm) > 2 and max(warm[-3:]) <= STEADY * min(warm[-3:])):
            warm.append(timed(step)[0])
        steps = [timed(step) for _ in range(case["samples"])]
    pictures = [timed(picture) for _ in range(case["pictures"])]
    output = torch.as_tensor(steps[-1][1]).float().cpu().numpy()
    drawn = np.asarray(pictures[-1][1])
    if not np.isfinite(output).all():
        raise RuntimeError("the UNet's output is not finite")
    np.savez(output_of(case["way"], folder), unet=output, picture=drawn)
    return {
        "load_ms": load_ms,
        "first_picture_ms": first_ms,
        "unet_step_ms": [ms for ms, _ in steps],
        "picture_ms": [ms for ms, _ in pictures],
        "size_px": drawn.shape[0],
        "peak_rss_mib": peak_rss_mib(),
        "device_mib": (free - torch.cuda.mem_get_info()[0]) / 2**20 if cuda else None,
        "versions": versions(),
    }


def _calls(pipeline: Any, setup: PeerSetup, case: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns a call that draws a picture and a call of the UNet."""
    import numpy as np
    import torch

    inputs = np.load(Path(case["folder"]) / "inputs.npz")
    sample, context, latents = (
        torch.from_numpy(inputs[name]).to(case["device"], _dtype(setup)) for name in ("sample", "context", "latents")
    )
    timestep = torch.tensor(501, device=case["device"])
    guidance = 2.5 if case["model"] == "nano" else 7.5

    def picture() -> Any:
        options = {"num_inference_steps": case["steps"], "guidance_scale": guidance}
        return pipeline(case["prompt"], latents=latents.clone(), **options).images[0]

    def step() -> Any:
        # Every argument as the pipeline passes it, because a compiled UNet is compiled again for others.
        return pipeline.unet(
            sample,
            timestep,
            encoder_hidden_states=context,
            timestep_cond=None,
            cross_attention_kwargs=None,
            added_cond_kwargs=None,
            return_dict=False,
        )[0]

    return picture, step


def peak_rss_mib() -> float:
    """Returns the peak resident memory of this process, MiB.

    This is `sdcompress_engines.resources` for a Python without our packages. Linux's getrusage would carry the parent's
    peak across exec.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return next(
            int(line.split()[1]) / 1024
            for line in status.read_text(encoding="utf-8").splitlines()
            if line.startswith("VmHWM:")
        )
    if sys.platform == "win32":
        try:
            import psutil
        except ImportError:
            return 0.0
        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict[str, str]:
    """Returns the installed versions of `PACKAGES`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
