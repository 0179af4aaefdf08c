"""Calibration data: what the UNet meets while the pipeline draws prompts."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from sdcompress_engines.errors import DataError
from sdcompress_engines.progress import SILENT, Advance, Reporter

from sdcompress.families.registry import family_of

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
"""What a model is calibrated with where no prompts are given: people, things, places, styles."""

HELD_OUT_PROMPTS = (
    "a young woman with curly hair laughing in a cafe, candid photograph",
    "an oil painting of a sailing ship in a storm",
    "a macro photograph of a dew drop on a green leaf",
    "a futuristic city skyline with flying cars, digital art",
)


def default_prompts(pipeline: Any) -> tuple[list[str], list[str]]:
    """Prompts to calibrate with and others to check with; for nano and its students, told by their size, captions of
    nano's own kind.
    """
    if family_of(pipeline.unet.config).captions != "nano":
        return list(PROMPTS), list(HELD_OUT_PROMPTS)
    from sdcompress.data import nano_prompts

    return [each.caption for each in nano_prompts.prompts("seen", 8)], [
        each.caption for each in nano_prompts.prompts("heldout", 4)
    ]


# Calibration

_INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")

_AT_ONCE = 2  # prompts of one run; each is two rows under guidance


def collect_calibration(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    samples: int = 64,
    guidance_scale: float | None = None,
    size_px: int | None = None,
    seed: int = 0,
    report: Reporter = SILENT,
) -> dict[str, np.ndarray]:
    """What the UNet meets while `pipeline` draws the prompts: `samples` rows by canonical input name, float32.

    `sample` (N, C, H/8, W/8), `timestep` (N,), `encoder_hidden_states` (N, 77·k, D), of SDXL `text_embeds` (N, P) and
    `time_ids` (N, 6). The rows are spread evenly over the UNet's calls, over the prompts, and with guidance over its
    unconditional and conditional half.

    Args:
        pipeline: a diffusers pipeline in torch; it is left as it was. Nothing is decoded.
        guidance_scale: None is the family's; at 1 or less there is no unconditional half.
        size_px: side of the picture; None is what the UNet was made for.

    Raises:
        DataError: no prompts, or fewer UNet calls times prompts than `samples`.
    """
    import torch

    from sdcompress.sampling import initial_latents, native_size_px

    if not prompts or samples < 1 or steps < 1:
        raise DataError(f"{len(prompts)} prompts, {samples} samples, {steps} steps", expected="at least one of each")
    size_px = size_px or native_size_px(pipeline)
    guidance_scale = family_of(pipeline.unet.config).guidance_scale if guidance_scale is None else guidance_scale
    used = list(prompts[: samples if guidance_scale <= 1 else -(-samples // 2)])
    rows: dict[str, list[torch.Tensor]] = {}

    def draw(start: int, advance: Advance) -> None:
        """Draw the prompts from `start` on, and keep those rows of theirs whose turn it is."""
        part = used[start : start + _AT_ONCE]
        calls = itertools.count()

        def keep(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            inputs = dict(zip(("sample", "timestep"), arguments, strict=False)) | options
            inputs |= inputs.pop("added_cond_kwargs", None) or {}
            batch, call, total = inputs["sample"].shape[0], next(calls), len(pipeline.scheduler.timesteps)
            halves = batch // len(part)
            if samples > total * halves * len(used):
                raise DataError(
                    f"{samples} samples of {total} UNet calls for {len(used)} prompts",
                    expected=f"at most {total * halves * len(used)}",
                    hint="more prompts",
                )
            # A sample's number decides its call, and in turn its half of the guided batch and its prompt.
            places = [
                (number % halves, number // halves % len(used) - start)
                for number in range(-(-call * samples // total), -(-(call + 1) * samples // total))
            ]
            chosen = [half * len(part) + prompt for half, prompt in places if 0 <= prompt < len(part)]
            inputs["timestep"] = torch.as_tensor(inputs["timestep"], dtype=torch.float32).reshape(-1).expand(batch)
            for name in _INPUTS:
                if chosen and inputs.get(name) is not None:
                    rows.setdefault(name, []).append(inputs[name][chosen].detach().float().cpu())
            advance()

        latents, generators = initial_latents(pipeline, [seed + start + index for index in range(len(part))], size_px)
        handle = pipeline.unet.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            pipeline(
                part,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=size_px,
                width=size_px,
                latents=latents.to(pipeline.unet.device, pipeline.unet.dtype),
                generator=generators,
                output_type="latent",
            )
        finally:
            handle.remove()

    with report.task(f"drawing {len(used)} prompts to calibrate with") as advance, torch.no_grad(), _still(pipeline):
        for start in range(0, len(used), _AT_ONCE):
            draw(start, advance)
    return {name: torch.cat(parts).numpy() for name, parts in rows.items()}


@contextlib.contextmanager
def _still(pipeline: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def named_for(calibration: Mapping[str, np.ndarray], names: Mapping[str, str], unet: Any) -> dict[str, np.ndarray]:
    """The rows by a host's input names (`Signature.names`); its `y` is SDXL's text embedding beside its embedded sizes."""
    import torch

    rows = dict(calibration)
    if "y" in names and "time_ids" in rows:
        ids = torch.from_numpy(rows.pop("time_ids"))
        sizes = unet.add_time_proj(ids.flatten()).reshape(ids.shape[0], -1).cpu().numpy()
        rows["y"] = np.concatenate([rows.pop("text_embeds"), sizes.astype(np.float32)], axis=1)
    return {names[name]: value for name, value in rows.items()}
