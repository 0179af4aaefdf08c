"""Few-step models for the tests of the plugins, and their pictures by diffusers' own schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.few_steps import GUIDANCE, STEPS

from ..conftest import BETAS
from .comfyui_cases import SCHEDULER, change, read_config

INDEX = "pipeline/model_index.json"
SEED = 6


def few_step_scheduler(kind: str, prediction: str = "epsilon", **config: Any) -> Any:
    """Returns the scheduler that few-step training saves, DDIM for phases and LCM for one."""
    import diffusers

    given = {"timestep_spacing": "trailing"} if kind == "DDIMScheduler" else {"original_inference_steps": 40}
    settings = {"clip_sample": False, "steps_offset": 1, "prediction_type": prediction, **BETAS, **given, **config}
    return getattr(diffusers, kind)(**settings)


def make_few_step(folder: Path, scheduler: Any, steps: int = 4, guidance_scale: float = 1.0) -> None:
    """Change the configs of an engine folder to those of a few-step model."""
    index = read_config(folder, INDEX) | {STEPS: steps, GUIDANCE: guidance_scale}
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    change(folder, **{INDEX: index, SCHEDULER: {**scheduler.config, "_class_name": type(scheduler).__name__}})


@torch.no_grad()
def draw_by_diffusers(
    unet: Any,
    scheduler: Any,
    noise: torch.Tensor,
    context: torch.Tensor,
    steps: int = 4,
    added: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Returns the final latents of a few-step model without guidance. `LCMScheduler` adds noise of the seed `SEED`."""
    scheduler.set_timesteps(steps)
    x, text, generator = noise, context.expand(len(noise), -1, -1), torch.Generator().manual_seed(SEED)
    for time in scheduler.timesteps:
        output = unet(x, time, text, added_cond_kwargs=added or {}).sample
        options = {"generator": generator} if type(scheduler).__name__ == "LCMScheduler" else {}
        x = scheduler.step(output, time, x, **options, return_dict=False)[0]
    return x
