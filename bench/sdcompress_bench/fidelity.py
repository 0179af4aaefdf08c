"""How far two models' outputs are apart. Two questions, never mixed: the same weights on another backend, and a student against its teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from .quality import to_pixels

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GATE_FP32 = 1e-4
"""Highest relative L2 of an fp32 backend to PyTorch fp32."""
GATE_FACTOR = 2.0
"""In a lower precision: how many times PyTorch's own error in that precision a backend may be off."""
PSNR_CAP_DB = 100.0
"""PSNR of equal tensors, which has no finite value."""


@dataclass(frozen=True)
class StepError:
    """How far a UNet's noise prediction is from another's at one timestep, over all probes at once."""

    timestep: int
    relative_l2: float
    cosine: float
    psnr_db: float


@dataclass(frozen=True)
class PictureError:
    """PSNR and SSIM of one picture against its counterpart of the same seed and prompt."""

    psnr_db: float
    ssim: float


@dataclass(frozen=True)
class Probe:
    """Fixed UNet inputs, on the CPU in fp32: every model and backend answers exactly these.

    Attributes:
        latents: noised latents, timestep by timestep, (T, B, C, h, w).
        timesteps: of the scheduler's training range, length T.
        encoder_hidden_states: (B, 77, D).
    """

    latents: torch.Tensor
    timesteps: tuple[int, ...]
    encoder_hidden_states: torch.Tensor


def load(path: str | Path, backend: str, artifacts: str | Path | None = None, device: str = "cpu", precision: str = "fp32") -> Any:
    """A silent pipeline on a device; a PyTorch one in the precision asked for, the others in their graph's."""
    from sdcompress.pipeline import load_pipeline

    if backend == "torch":  # load_pipeline halves the precision on a GPU, and fp32 would not come back from that
        pipeline = load_pipeline(path, backend, device="cpu").to(device)
        if precision != "fp32":
            pipeline = pipeline.to(DTYPES[precision])
    else:
        pipeline = load_pipeline(path, backend, None if artifacts is None else Path(artifacts), device=device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def precision_of(pipeline: Any) -> str:
    """`fp32`, `fp16` or `bf16`: what the UNet computes its output in."""
    return next(name for name, dtype in DTYPES.items() if dtype == pipeline.unet.dtype)


@torch.inference_mode()
def make_probe(pipeline: Any, images: Sequence[Image.Image], captions: Sequence[str], timesteps: Sequence[int], seed: int) -> Probe:
    """The teacher's own pictures, encoded and noised to each timestep: what its UNet meets in use, unlike pure noise at a late step.

    `pipeline` is a PyTorch pipeline; its scheduler says how much noise a timestep has.
    """
    vae, device = pipeline.vae, pipeline.unet.device
    pixels = torch.stack([to_pixels(image) for image in images]).to(device, vae.dtype) * 2 - 1
    clean = (vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor).float().cpu()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    noised = torch.stack([pipeline.scheduler.add_noise(clean, noise, torch.full((len(clean),), t, dtype=torch.long)) for t in timesteps])
    ids = pipeline.tokenizer(list(captions), padding="max_length", max_length=pipeline.tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids
    return Probe(noised, tuple(timesteps), pipeline.text_encoder(ids.to(device))[0].float().cpu())


@torch.inference_mode()
def predict(pipeline: Any, probe: Probe) -> torch.Tensor:
    """The UNet's noise prediction for a probe: (T, B, C, h, w), float32, on the CPU."""
    unet = pipeline.unet
    context = probe.encoder_hidden_states.to(unet.device, unet.dtype)
    outputs = []
    for sample, timestep in zip(probe.latents, probe.timesteps, strict=True):
        moment = torch.tensor(timestep, device=unet.device)
        # A runner may own its output buffer, so it is copied before the next call.
        outputs.append(unet(sample.to(unet.device, unet.dtype), moment, encoder_hidden_states=context, return_dict=False)[0].float().cpu().clone())
    return torch.stack(outputs)


def relative_l2(output: torch.Tensor, reference: torch.Tensor) -> float:
    """‖output − reference‖ / ‖reference‖, over all elements; 0 for equal tensors. Unlike cosine it sees a wrong scale."""
    return ((output.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)).item()


def cosine(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Cosine of the two tensors as vectors."""
    return F.cosine_similarity(output.double().flatten(), reference.double().flatten(), dim=0).item()


def psnr_db(output: torch.Tensor, reference: torch.Tensor, data_range: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB, at most `PSNR_CAP_DB`; the peak is `data_range`, or the reference's own range."""
    peak = data_range if data_range is not None else (reference.max() - reference.min()).item()
    mse = (output.double() - reference.double()).square().mean().item()
    return PSNR_CAP_DB if mse == 0 else min(PSNR_CAP_DB, 10 * math.log10(peak**2 / mse)) if peak > 0 else -PSNR_CAP_DB


def ssim(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity of two pictures, (C, H, W) float in [0, 1], at least 11×11: 1 for equal pictures.

    Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural similarity", equation 13
    averaged over valid windows and channels: Gaussian window 11×11 with σ 1.5, K1 = 0.01, K2 = 0.03.
    """
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (torch.outer(line, line) / line.sum() ** 2)[None, None]
    x, y = (t.double()[:, None] for t in (image, reference))
    blur_x, blur_y, xx, yy, xy = F.conv2d(torch.cat([x, y, x * x, y * y, x * y]), window).chunk(5)
    var_x, var_y, covariance = xx - blur_x**2, yy - blur_y**2, xy - blur_x * blur_y
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * blur_x * blur_y + c1) * (2 * covariance + c2)) / ((blur_x**2 + blur_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def compare_steps(output: torch.Tensor, reference: torch.Tensor, timesteps: Sequence[int]) -> list[StepError]:
    """A `StepError` for each timestep of two predictions (T, B, C, h, w)."""
    return [StepError(t, relative_l2(o, r), cosine(o, r), psnr_db(o, r)) for t, o, r in zip(timesteps, output, reference, strict=True)]


def compare_pictures(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> list[PictureError]:
    """A `PictureError` for each pair of pictures of one size."""
    pairs = [(to_pixels(i), to_pixels(r)) for i, r in zip(images, references, strict=True)]
    return [PictureError(psnr_db(i, r, data_range=1.0), ssim(i, r)) for i, r in pairs]


def distance(steps: Sequence[StepError], pictures: Sequence[PictureError]) -> dict[str, Any]:
    """The row of a comparison: worst and mean relative L2, lowest cosine, mean picture figures, and the parts they come from."""
    return {
        "relative_l2": max(s.relative_l2 for s in steps),
        "relative_l2_mean": sum(s.relative_l2 for s in steps) / len(steps),
        "cosine": min(s.cosine for s in steps),
        "picture_psnr_db": sum(p.psnr_db for p in pictures) / len(pictures) if pictures else None,
        "picture_ssim": sum(p.ssim for p in pictures) / len(pictures) if pictures else None,
        "steps": [asdict(s) for s in steps],
        "pictures": [asdict(p) for p in pictures],
    }


def gate(worst_relative_l2: float, noise_floor: float | None) -> dict[str, Any]:
    """Whether a backend is close enough to PyTorch fp32: `passed` and the `limit`; `noise_floor` is PyTorch's own error in a lower precision."""
    limit = GATE_FP32 if noise_floor is None else GATE_FACTOR * noise_floor
    return {"limit": limit, "passed": worst_relative_l2 <= limit}
