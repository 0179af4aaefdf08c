"""Distances between the outputs of two models.

There are two questions, and they are never mixed: the same weights on another backend, and a student against its
teacher.
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
from sdcompress_engines.errors import ModelError
from sdcompress_engines.exactness import FP32_LIMIT, HALF_FACTOR, relative_l2

from sdcompress.sampling import encode_pictures
from sdcompress.support.pipeline import TextToImagePipeline

from .metrics import PSNR_CAP_DB, Lpips, psnr, ssim
from .quality import to_pixels


@dataclass(frozen=True)
class StepError:
    """Distance of a UNet's noise prediction from another's at one timestep, over all probes at once."""

    timestep: int
    relative_l2: float
    cosine: float
    psnr_db: float


@dataclass(frozen=True)
class PictureError:
    """PSNR and SSIM of one picture against the one of the same seed and prompt; LPIPS if its weights are installed."""

    psnr_db: float
    ssim: float
    lpips: float | None = None


@dataclass(frozen=True)
class UNetInputs:
    """The inputs of a UNet besides latents and timestep.

    Attributes:
        encoder_hidden_states: (B, 77, D).
        text_embeds: (B, E), of SDXL.
        time_ids: (B, 6), of SDXL.
    """

    encoder_hidden_states: torch.Tensor
    text_embeds: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, pipeline: TextToImagePipeline, captions: Sequence[str], size_px: int) -> UNetInputs:
        """Returns the inputs for captions, on the pipeline's device and in its UNet's dtype.

        Args:
            pipeline: its text encoders encode the captions.
            captions: B of them.
            size_px: side of the pictures, which SDXL's `time_ids` hold.
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
        """Returns the batch repeated `times` times, as classifier-free guidance repeats it twice."""
        return self._map(lambda tensor: torch.cat([tensor] * times))

    def split(self, size: int) -> list[UNetInputs]:
        """Returns the batch in parts of `size`; the last one may be smaller."""

        def part(rows: slice) -> UNetInputs:
            return self._map(lambda tensor: tensor[rows])

        return [part(slice(at, at + size)) for at in range(0, len(self.encoder_hidden_states), size)]

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> UNetInputs:
        return UNetInputs(
            function(self.encoder_hidden_states),
            None if self.text_embeds is None else function(self.text_embeds),
            None if self.time_ids is None else function(self.time_ids),
        )

    def call(self, unet: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Returns the UNet's noise prediction, of the shape of `sample`; a runner may overwrite it in its next call.

        Args:
            unet: a UNet, in torch or on another backend.
            sample: noisy latents, (B, 4, H/8, W/8), in the UNet's dtype, on its device.
            timestep: a scalar, on the UNet's device.
        """
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
    """Fixed UNet inputs, on the CPU in fp32: every model and backend gets exactly these.

    Attributes:
        latents: noised latents, timestep by timestep, (T, B, C, h, w).
        timesteps: of the scheduler's training range, length T.
        encoder_hidden_states: (B, 77, D).
        text_embeds: (B, E), of SDXL.
        time_ids: (B, 6), of SDXL.
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
    """Returns the token ids of captions, (B, 77), int64, truncated and padded as in Stable Diffusion.

    Args:
        tokenizer: of the pipeline.
        captions: B of them.
        device: of the ids.
    """
    ids: torch.Tensor = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids.to(device)


def load(
    path: str | Path,
    backend: str,
    artifacts: str | Path | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    decoder: str | Path | None = None,
    loras: Sequence[tuple[str, float]] = (),
) -> TextToImagePipeline:
    """Returns a pipeline without a progress bar.

    TensorRT-RTX compiles its kernels before the first call, so that the first timed call is as fast as the later ones.

    Args:
        path: a pipeline folder, a file, or a known name.
        backend: of the UNet or of the whole pipeline.
        artifacts: what the backend runs from; None takes the backend's own choice.
        device: `cpu` or `cuda`.
        precision: fp32, fp16 or bf16.
        decoder: folder of a small decoder in the place of the VAE; graphs and engines were made with it.
        loras: files with their weights, to put into it.
    """
    from sdcompress.backends.assemble import open_pipeline
    from sdcompress.backends.registry import find_backend

    if artifacts is not None and find_backend(backend).artifact is not None:
        decoder = None

    pipeline = open_pipeline(
        path,
        backend,
        None if artifacts is None else Path(artifacts),
        device=device,
        precision=precision,  # type: ignore[arg-type]
        steady=True,
        decoder=None if decoder is None else Path(decoder),
        loras=bool(loras),
    )
    if loras:
        pipeline.set_loras(loras)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def make_probe(
    pipeline: TextToImagePipeline,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    timesteps: Sequence[int],
    seed: int,
) -> Probe:
    """Returns a probe of the teacher's own pictures, encoded and noised to each timestep.

    These are inputs that its UNet meets in use; pure noise at a late step is not.

    Args:
        pipeline: a PyTorch pipeline; its scheduler defines the noise of a timestep.
        images: B pictures.
        captions: B of them.
        timesteps: T of the scheduler's training range.
        seed: of the noise.
    """
    vae, device = pipeline.vae, pipeline.unet.device
    pixels = torch.stack([to_pixels(image) for image in images]).to(device, vae.dtype) * 2 - 1
    clean = encode_pictures(vae, pixels).float().cpu()
    return _noised(pipeline, clean, captions, timesteps, seed, images[0].width)


@torch.inference_mode()
def make_random_probe(
    pipeline: TextToImagePipeline, size_px: int, captions: Sequence[str], timesteps: Sequence[int], seed: int
) -> Probe:
    """Returns a probe of Gaussian latents, for random weights, whose pictures mean nothing.

    Args:
        pipeline: a PyTorch pipeline.
        size_px: side of the pictures that the latents have the size of.
        captions: B of them.
        timesteps: T of the scheduler's training range.
        seed: of the noise.
    """
    side = size_px // pipeline.vae_scale_factor
    clean = torch.randn(
        len(captions), pipeline.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(seed + 1)
    )
    return _noised(pipeline, clean, captions, timesteps, seed, size_px)


def _noised(
    pipeline: TextToImagePipeline,
    clean: torch.Tensor,
    captions: Sequence[str],
    timesteps: Sequence[int],
    seed: int,
    size_px: int,
) -> Probe:
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    noised = torch.stack(
        [pipeline.scheduler.add_noise(clean, noise, torch.full((len(clean),), t, dtype=torch.long)) for t in timesteps]
    )
    inputs = UNetInputs.of(pipeline, captions, size_px).to("cpu", torch.float32)
    return Probe(noised, tuple(timesteps), inputs.encoder_hidden_states, inputs.text_embeds, inputs.time_ids)


@torch.inference_mode()
def predict(pipeline: Any, probe: Probe, at_once: int | None = None) -> torch.Tensor:
    """Returns the UNet's noise prediction for a probe: (T, B, C, h, w), float32, on the CPU.

    Args:
        pipeline: its UNet is called.
        probe: the inputs.
        at_once: latents in one call, at most; None is all B.
    """
    unet = pipeline.unet
    at_once = at_once or probe.latents.shape[1]
    parts = [part.to(unet.device, unet.dtype) for part in probe.inputs.split(at_once)]
    outputs = []
    for latents, step in zip(probe.latents, probe.timesteps, strict=True):
        samples, timestep = latents.to(unet.device, unet.dtype).split(at_once), torch.tensor(step, device=unet.device)
        # The copy is needed because a runner may overwrite its output buffer in the next call.
        calls = zip(parts, samples, strict=True)
        outputs.append(torch.cat([part.call(unet, sample, timestep).float().cpu().clone() for part, sample in calls]))
    return torch.stack(outputs)


def cosine(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the cosine of the two tensors as vectors."""
    return F.cosine_similarity(output.double().flatten(), reference.double().flatten(), dim=0).item()


def psnr_db(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the peak signal-to-noise ratio in dB; the peak is the reference's own range.

    It is at most `PSNR_CAP_DB`, and `-PSNR_CAP_DB` where a value is not finite.
    """
    peak = (reference.max() - reference.min()).item()
    mse = (output.double() - reference.double()).square().mean().item()
    if mse == 0:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, 10 * math.log10(peak**2 / mse)) if peak > 0 and math.isfinite(mse) else -PSNR_CAP_DB


def compare_steps(output: torch.Tensor, reference: torch.Tensor, timesteps: Sequence[int]) -> list[StepError]:
    """Returns a `StepError` for each timestep.

    Args:
        output, reference: noise predictions, (T, B, C, h, w).
        timesteps: T of them.

    Raises:
        ModelError: the predictions have different shapes.
    """
    if output.shape != reference.shape or len(output) != len(timesteps):
        shapes = f"{tuple(output.shape)} and {tuple(reference.shape)}"
        raise ModelError(f"noise predictions of {shapes}", expected=f"one shape, and {len(timesteps)} timesteps")
    return [
        StepError(t, relative_l2(o, r), cosine(o, r), psnr_db(o, r))
        for t, o, r in zip(timesteps, output, reference, strict=True)
    ]


def compare_pictures(
    images: Sequence[Image.Image], references: Sequence[Image.Image], lpips: Lpips | None = None
) -> list[PictureError]:
    """Returns a `PictureError` for each pair.

    Args:
        images, references: pictures, all of one size.
        lpips: None leaves LPIPS out.
    """
    if not images:
        return []
    x, y = (torch.stack([to_pixels(image) for image in pictures]) for pictures in (images, references))
    distances = lpips(x, y).tolist() if lpips else [None] * len(images)
    return [PictureError(*row) for row in zip(psnr(x, y).tolist(), ssim(x, y).tolist(), distances, strict=True)]


def distance(steps: Sequence[StepError], pictures: Sequence[PictureError]) -> dict[str, Any]:
    """Returns the figures of a comparison, and the steps and pictures that they come from.

    The figures are worst and mean relative L2, lowest cosine, and the means over the pictures.
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
    """Returns the highest value, or NaN if one is NaN, which `max` would ignore."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found)


def gate(worst_relative_l2: float, noise_floor: float | None) -> dict[str, Any]:
    """Returns whether a backend is close enough to PyTorch fp32: `passed` and the `limit`.

    An error that is not a number never passes.

    Args:
        worst_relative_l2: the backend's error.
        noise_floor: PyTorch's own error in the same lower precision; None in fp32.
    """
    limit = FP32_LIMIT if noise_floor is None else HALF_FACTOR * noise_floor
    return {"limit": limit, "passed": math.isfinite(limit) and worst_relative_l2 <= limit}


def gate_steps(steps: Sequence[StepError], floors: Sequence[StepError] | None) -> dict[str, Any]:
    """Returns the gate's answer over all timesteps: `passed`, the `limits`, and `timestep`, `error`, `limit`.

    The last three are of the first timestep over its limit, or else of the timestep that is nearest to its limit. Each
    timestep has its own limit, because one for all would be the widest: the error of half precision is several times
    larger at timestep 1 than at 500, and a fault that shows at every timestep would be hidden below it.

    Args:
        steps: the backend's errors.
        floors: PyTorch's own errors in the same lower precision; None in fp32.
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
