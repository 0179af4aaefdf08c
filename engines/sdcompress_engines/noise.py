"""Noise, targets and latents that a program with its own noise schedule, such as a WebUI, would ignore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Of every published Stable Diffusion, in diffusers' names."""


def find_unusual_noise(scheduler: Mapping[str, Any]) -> str | None:
    """Returns the noise that a scheduler has in place of Stable Diffusion's, which has numbered timesteps, or None.

    Args:
        scheduler: its config.
    """
    if scheduler.get("use_flow_sigmas"):
        return "flow matching"
    is_continuous = (
        scheduler.get("timestep_type") == "continuous" and scheduler.get("prediction_type") == "v_prediction"
    )
    return "EDM" if is_continuous or str(scheduler.get("_class_name")).startswith("EDM") else None


def find_host_difference(scheduler: Mapping[str, Any], vae: Mapping[str, Any], *, schedule: bool) -> str | None:
    """Returns the property of a model that a WebUI or ComfyUI would ignore, as a noun, or None.

    Args:
        scheduler, vae: configs of the model.
        schedule: whether betas other than Stable Diffusion's are such a property; ComfyUI takes those of the model.
    """
    prediction = scheduler.get("prediction_type") or "epsilon"
    betas = scheduler.get("trained_betas"), {name: scheduler.get(name, usual) for name, usual in _SCHEDULE.items()}
    noise = find_unusual_noise(scheduler)
    differences = {
        f"the noise of {noise}": noise is not None,
        f"the prediction type {prediction}": prediction not in ("epsilon", "v_prediction"),
        "a mean of its latents": vae.get("latents_mean") is not None,
        "a small decoder in the place of its VAE": vae.get("_class_name") == "AutoencoderTiny",
        "a noise schedule of its own": schedule and betas != (None, _SCHEDULE),
    }
    return next((what for what, is_there in differences.items() if is_there), None)
