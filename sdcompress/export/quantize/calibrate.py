"""Calibration data: the inputs of the UNet while the pipeline draws prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sdcompress_engines.errors import DataError
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.export.quantize.recorder import InputRecorder
from sdcompress.families.registry import family_of
from sdcompress.families.sampling_defaults import SamplingDefaults, sampling_defaults
from sdcompress.sampling import check_guidance, initial_latents
from sdcompress.support.pipeline import TextToImagePipeline, native_size_px

PROMPTS = (
    "a portrait of an old fisherman with a white beard, natural light, 85mm photograph",
    "a red sports car on a wet city street at night, neon reflections",
    "a bowl of ramen with an egg and spring onions, seen from above",
    "a mountain lake at sunrise, mist over the water, wide landscape photograph",
    "a watercolor painting of a cat asleep on a windowsill",
    "an astronaut riding a horse through a desert, cinematic, highly detailed",
    "the interior of a gothic cathedral, rays of light through stained glass",
    "a flat vector illustration of a small wooden house in a snowy forest",
)
"""The prompts to calibrate with where none are given: people, things, places, styles."""

HELD_OUT_PROMPTS = (
    "a young woman with curly hair laughing in a cafe, candid photograph",
    "an oil painting of a sailing ship in a storm",
    "a macro photograph of a dew drop on a green leaf",
    "a futuristic city skyline with flying cars, digital art",
)

_STEPS, _SAMPLES = 20, 64
_PROMPTS_AT_ONCE = 2  # with guidance, each is two rows of a batch


def calibration_steps(defaults: SamplingDefaults) -> int:
    """Returns in how many steps a pipeline is calibrated: its own, if it was trained for them."""
    return defaults.num_inference_steps if defaults.is_few_step else _STEPS


def default_prompts(pipeline: TextToImagePipeline) -> tuple[list[str], list[str]]:
    """Returns prompts to calibrate with and others to check with.

    For nano and its students, which are recognized by their UNet, they are captions of nano's own kind.
    """
    if family_of(pipeline.unet.config).captions != "nano":
        return list(PROMPTS), list(HELD_OUT_PROMPTS)
    from sdcompress.data.nano_prompts import draw_prompts

    calibration, held_out = draw_prompts("seen", 8), draw_prompts("heldout", 4)
    return [prompt.caption for prompt in calibration], [prompt.caption for prompt in held_out]


def collect_calibration(
    pipeline: TextToImagePipeline,
    prompts: Sequence[str],
    *,
    steps: int | None = None,
    samples: int | None = None,
    guidance_scale: float | None = None,
    size_px: int | None = None,
    seed: int = 0,
    report: Reporter = SILENT,
) -> dict[str, np.ndarray]:
    """Returns inputs of the UNet while `pipeline` draws the prompts: rows by canonical input name, float32.

    They are `sample` (N, C, H/8, W/8), `timestep` (N,) and `encoder_hidden_states` (N, 77·k, D), and for SDXL
    `text_embeds` (N, P) and `time_ids` (N, 6). The rows are spread evenly over the UNet's calls and over the prompts,
    and with guidance over its unconditional and conditional half.

    Args:
        pipeline: in torch. It stays unchanged, and nothing is decoded.
        prompts: at least one.
        steps: denoising steps; None is 20, or the number that the pipeline was trained for.
        samples: rows to return, N; None is 64, or of a pipeline that was trained for few steps all, if there are fewer.
        guidance_scale: None is the pipeline's own. At 1 or less there is no unconditional half.
        size_px: side of the picture; None is the UNet's own.
        seed: of the first prompt's noise; each further prompt has the next one.
        report: gets the progress.

    Raises:
        DataError: no prompts, or fewer UNet calls times prompts than `samples`.
        UsageError: guidance for a pipeline that was trained to draw without it.
    """
    defaults = sampling_defaults(pipeline)
    check_guidance(defaults, guidance_scale, None)
    guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    steps = calibration_steps(defaults) if steps is None else steps
    if samples is None:
        rows = steps * len(prompts) * (1 if guidance_scale <= 1 else 2)
        samples = min(_SAMPLES, rows) if defaults.is_few_step else _SAMPLES
    if not prompts or samples < 1 or steps < 1:
        raise DataError(f"{len(prompts)} prompts, {samples} samples, {steps} steps", expected="at least one of each")
    used = list(prompts[: samples if guidance_scale <= 1 else -(-samples // 2)])
    label = f"drawing {len(used)} prompts to calibrate with"
    with report.task(label) as advance, torch.no_grad(), _hidden_progress_bar(pipeline):
        recorder = InputRecorder(pipeline, samples, len(used), advance)
        for start in range(0, len(used), _PROMPTS_AT_ONCE):
            part = used[start : start + _PROMPTS_AT_ONCE]
            with recorder.recording(start, len(part)):
                _draw(pipeline, part, seed + start, size_px, num_inference_steps=steps, guidance_scale=guidance_scale)
    return recorder.rows()


def _draw(pipeline: TextToImagePipeline, prompts: list[str], seed: int, size_px: int | None, **options: float) -> None:
    """Draw latents of prompts.

    Args:
        pipeline: in torch.
        prompts: drawn in one batch.
        seed: of the first one's noise.
        size_px: side of the picture; None is the UNet's own.
        options: others of the pipeline's call.
    """
    size_px = size_px or native_size_px(pipeline)
    latents, generators = initial_latents(pipeline, [seed + index for index in range(len(prompts))], size_px)
    pipeline(
        prompts,
        height=size_px,
        width=size_px,
        latents=latents.to(pipeline.unet.device, pipeline.unet.dtype),
        generator=generators,
        output_type="latent",
        **options,
    )


@contextlib.contextmanager
def _hidden_progress_bar(pipeline: TextToImagePipeline) -> Iterator[None]:
    """Hide the pipeline's own progress bar within the block."""
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def rename_for_host(
    calibration: Mapping[str, np.ndarray], names: Mapping[str, str], unet: Any
) -> dict[str, np.ndarray]:
    """Returns calibration rows by the input names of a host.

    The input `y` of a host is SDXL's text embedding and embedded sizes, concatenated.

    Args:
        calibration: rows by canonical input name, float32.
        names: canonical name → the host's name, as in `Signature.names`.
        unet: SDXL's UNet in diffusers, which embeds the sizes; not used where `names` has no `y`.
    """
    rows = dict(calibration)
    if "y" in names and "time_ids" in rows:
        ids = torch.from_numpy(rows.pop("time_ids"))
        sizes = unet.add_time_proj(ids.flatten()).reshape(ids.shape[0], -1).cpu().numpy()
        rows["y"] = np.concatenate([rows.pop("text_embeds"), sizes.astype(np.float32)], axis=1)
    return {names[name]: value for name, value in rows.items()}
