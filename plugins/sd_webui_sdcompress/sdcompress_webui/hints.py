"""Hints for a few-step model: a picture whose settings are not those that the model was trained for."""

from __future__ import annotations

from typing import Any

from .menu import Model

_NOISE_SCHEDULE, _ZERO_SNR = "sd_noise_schedule", "Zero Terminal SNR"
"""The setting of A1111 and Forge that is needed for a model trained to zero terminal SNR, and its choice."""


def find_hint(model: Model, job: Any, host: str, options: Any) -> str | None:
    """Returns what to set for a picture, or None where everything is as the model was trained.

    A setting that the host does not have counts as right.

    Args:
        model: the chosen entry of the menu.
        job: the picture in progress.
        host: `webui` or `forge`.
        options: the host's settings.
    """
    sampling = model.usable[0].sampling if model.usable else None
    if sampling is None:
        return None
    guidance = float(getattr(job, "cfg_scale", sampling.guidance_scale))
    differences = sampling.find_differences(
        host,
        int(getattr(job, "steps", sampling.steps)),
        guidance,
        str(getattr(job, "sampler_name", "")),
        getattr(job, "scheduler", None),
    )
    noise = getattr(options, _NOISE_SCHEDULE, _ZERO_SNR)
    if sampling.scheduler.get("rescale_betas_zero_snr") and noise != _ZERO_SNR:
        differences.append(f"the noise schedule {noise} (in the settings; its own is {_ZERO_SNR})")
    if not differences:
        return None
    text = (
        f"sdcompress: {model.title} was trained for {sampling.describe(host)}. This picture has"
        f" {', '.join(differences)}, so it is not as good as it can be."
    )
    if guidance > sampling.guidance_scale:
        text += " Its guidance is in its weights: more of it saturates the picture, and each step takes two calls."
    return text
