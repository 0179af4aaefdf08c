"""How far two models' outputs are apart.

Two questions, never mixed: the same weights on another backend, and a student against its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from sdcompress_engines.exactness import FP32_LIMIT, HALF_FACTOR, relative_l2

from .metrics import PSNR_CAP_DB, Lpips, psnr, ssim
from .quality import to_pixels


@dataclass(frozen=True)
class StepError:
    """How far a UNet's noise prediction is from another's at one timestep, over all probes at once."""

    timestep: int
    relative_l2: float
    cosine: float
    psnr_db: float


@dataclass(frozen=True)
class PictureError:
    """PSNR and SSIM of one picture against its counterpart of the same seed and prompt; LPIPS where its weights are
    installed.
    """

    psnr_db: float
    ssim: float
    lpips: float | None = None


@dataclass(frozen=True)
class UNetInputs:
    """What a UNet is given besides latents and timestep: `encoder_hidden_states` (B, 77, D), and SDXL's `text_embeds`
    (B, E) and `time_ids` (B, 6).
    """

    encoder_hidden_states: torch.Tensor
    text_embeds: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, pipeline: Any, captions: Sequence[str], size_px: int) -> UNetInputs:
        """Captions as the pipeline's own text encoders see them, on its device and in its UNet's dtype, for pictures of
        a size.
        """
        unet = pipeline.unet
        if getattr(pipeline, "text_encoder_2", None) is None:
            return cls(pipeline.text_encoder(tokens(pipeline.tokenizer, captions, unet.device))[0].to(unet.dtype))
        states, _, pooled, _ = pipeline.encode_prompt(
            list(captions), device=unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        sizes = torch.tensor(
            [[size_px, size_px, 0, 0, size_px, size_px]] * len(captions), device=unet.device, dtype=unet.dtype
        )
        return cls(states.to(unet.dtype), pooled.to(unet.dtype), sizes)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> UNetInputs:
        return self._map(lambda tensor: tensor.to(device, dtype))

    def repeated(self, times: int) -> UNetInputs:
        """The batch end to end `times` times, as classifier-free guidance gives it twice."""
        return self._map(lambda tensor: torch.cat([tensor] * times))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> UNetInputs:
        return UNetInputs(
            function(self.encoder_hidden_states),
            None if self.text_embeds is None else function(self.text_embeds),
            None if self.time_ids is None else function(self.time_ids),
        )

    def call(self, unet: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The UNet's noise prediction, shaped as `sample`; a runner may own its memory until the next call."""
        added = None if self.text_embeds is None else {"text_embeds": self.text_embeds, "time_ids": self.time_ids}
        out: torch.Tensor = unet(
            sample,
            timestep,
            encoder_hidden_states=self.encoder_hidden_states,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return out


@dataclass(frozen=True)
class Probe:
    """Fixed UNet inputs, on the CPU in fp32: every model and backend answers exactly these.

    Attributes:
        latents: noised latents, timestep by timestep, (T, B, C, h, w).
        timesteps: of the scheduler's training range, length T.
        encoder_hidden_states: (B, 77, D); `text_embeds` (B, E) and `time_ids` (B, 6) of SDXL.
    """

    latents: torch.Tensor
    timesteps: tuple[int, ...]
    encoder_hidden_states: torch.Tensor
    text_embeds: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    @property
    def inputs(self) -> UNetInputs:
        return UNetInputs(self.encoder_hidden_states, self.text_embeds, self.time_ids)


def tokens(tokenizer: Any, captions: Sequence[str], device: torch.device | str) -> torch.Tensor:
    """(B, 77) int64, cut and padded as Stable Diffusion does."""
    ids: torch.Tensor = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids.to(device)


def load(
    path: str | Path, backend: str, artifacts: str | Path | None = None, device: str = "cpu", precision: str = "fp32"
) -> Any:
    """A silent pipeline on a device, with TensorRT-RTX's kernels compiled before they run: what is timed first is what
    stays.
    """
    from sdcompress.backends.assemble import open_pipeline

    pipeline = open_pipeline(
        path,
        backend,
        None if artifacts is None else Path(artifacts),
        device=device,
        precision=precision,  # type: ignore[arg-type]
        steady=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def make_probe(
    pipeline: Any, images: Sequence[Image.Image], captions: Sequence[str], timesteps: Sequence[int], seed: int
) -> Probe:
    """The teacher's own pictures, encoded and noised to each timestep: what its UNet meets in use, unlike pure noise at
    a late step.

    `pipeline` is a PyTorch pipeline; its scheduler says how much noise a timestep has.
    """
    vae, device = pipeline.vae, pipeline.unet.device
    pixels = torch.stack([to_pixels(image) for image in images]).to(device, vae.dtype) * 2 - 1
    clean = (vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor).float().cpu()
    return _noised(pipeline, clean, captions, timesteps, seed, images[0].width)


@torch.inference_mode()
def make_random_probe(
    pipeline: Any, size_px: int, captions: Sequence[str], timesteps: Sequence[int], seed: int
) -> Probe:
    """Gaussian latents in the place of pictures, for weights that are random and draw none."""
    side = size_px // pipeline.vae_scale_factor
    clean = torch.randn(
        len(captions), pipeline.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(seed + 1)
    )
    return _noised(pipeline, clean, captions, timesteps, seed, size_px)


def _noised(
    pipeline: Any, clean: torch.Tensor, captions: Sequence[str], timesteps: Sequence[int], seed: int, size_px: int
) -> Probe:
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    noised = torch.stack(
        [pipeline.scheduler.add_noise(clean, noise, torch.full((len(clean),), t, dtype=torch.long)) for t in timesteps]
    )
    given = UNetInputs.of(pipeline, captions, size_px).to("cpu", torch.float32)
    return Probe(noised, tuple(timesteps), given.encoder_hidden_states, given.text_embeds, given.time_ids)


@torch.inference_mode()
def predict(pipeline: Any, probe: Probe) -> torch.Tensor:
    """The UNet's noise prediction for a probe: (T, B, C, h, w), float32, on the CPU."""
    unet = pipeline.unet
    inputs = probe.inputs.to(unet.device, unet.dtype)
    outputs = []
    for sample, timestep in zip(probe.latents, probe.timesteps, strict=True):
        # A runner may own its output buffer, so it is copied before the next call.
        outputs.append(
            inputs.call(unet, sample.to(unet.device, unet.dtype), torch.tensor(timestep, device=unet.device))
            .float()
            .cpu()
            .clone()
        )
    return torch.stack(outputs)


def cosine(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Cosine of the two tensors as vectors."""
    return F.cosine_similarity(output.double().flatten(), reference.double().flatten(), dim=0).item()


def psnr_db(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, at most `PSNR_CAP_DB`, and minus that where a value is not finite; the peak is
    the reference's own range.
    """
    peak = (reference.max() - reference.min()).item()
    mse = (output.double() - reference.double()).square().mean().item()
    if mse == 0:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, 10 * math.log10(peak**2 / mse)) if peak > 0 and math.isfinite(mse) else -PSNR_CAP_DB


def compare_steps(output: torch.Tensor, reference: torch.Tensor, timesteps: Sequence[int]) -> list[StepError]:
    """A `StepError` for each timestep of two predictions (T, B, C, h, w)."""
    return [
        StepError(t, relative_l2(o, r), cosine(o, r), psnr_db(o, r))
        for t, o, r in zip(timesteps, output, reference, strict=True)
    ]


def compare_pictures(
    images: Sequence[Image.Image], references: Sequence[Image.Image], lpips: Lpips | None = None
) -> list[PictureError]:
    """A `PictureError` for each pair of pictures, all of one size."""
    if not images:
        return []
    x, y = (torch.stack([to_pixels(image) for image in pictures]) for pictures in (images, references))
    distances = lpips(x, y).tolist() if lpips else [None] * len(images)
    return [PictureError(*row) for row in zip(psnr(x, y).tolist(), ssim(x, y).tolist(), distances, strict=True)]


def distance(steps: Sequence[StepError], pictures: Sequence[PictureError]) -> dict[str, Any]:
    """The row of a comparison: worst and mean relative L2, lowest cosine, mean picture figures, and the parts they come
    from.
    """
    found: dict[str, Any] = {
        "relative_l2": _worst(s.relative_l2 for s in steps),
        "relative_l2_mean": sum(s.relative_l2 for s in steps) / len(steps),
        "cosine": min(s.cosine for s in steps),
    }
    for name in ("psnr_db", "ssim", "lpips"):
        values = [value for p in pictures if (value := getattr(p, name)) is not None]
        found[f"picture_{name}"] = sum(values) / len(values) if values else None
    return found | {"steps": [asdict(s) for s in steps], "pictures": [asdict(p) for p in pictures]}


def _worst(values: Iterable[float]) -> float:
    """The highest, and not a number where one is not: `max` would pass over it."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found)


def gate(worst_relative_l2: float, noise_floor: float | None) -> dict[str, Any]:
    """Whether a backend is close enough to PyTorch fp32: `passed` and the `limit`; `noise_floor` is PyTorch's own error
    in a lower precision. An error that is not a number never passes.
    """
    limit = FP32_LIMIT if noise_floor is None else HALF_FACTOR * noise_floor
    return {"limit": limit, "passed": math.isfinite(limit) and worst_relative_l2 <= limit}


def gate_steps(steps: Sequence[StepError], floors: Sequence[StepError] | None) -> dict[str, Any]:
    """The gate asked at each timestep, against PyTorch's own error there: `passed`, the `limits`, and of the timestep
    nearest to its limit `timestep`, `error`, `limit`.

    One limit for all would be the widest: half precision is off several times more at timestep 1 than at 500, and a
    fault that shows everywhere would hide under that.
    """
    judged = [gate(step.relative_l2, None if floors is None else floors[i].relative_l2) for i, step in enumerate(steps)]
    nearest = max(
        range(len(steps)),
        key=lambda i: math.inf if not judged[i]["passed"] else steps[i].relative_l2 / (judged[i]["limit"] or math.inf),
    )
    return {
        "passed": all(each["passed"] for each in judged),
        "timestep": steps[nearest].timestep,
        "error": steps[nearest].relative_l2,
        "limit": judged[nearest]["limit"],
        "limits": [each["limit"] for each in judged],
    }
