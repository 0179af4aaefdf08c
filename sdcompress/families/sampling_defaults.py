"""The steps and the guidance with which a model draws where nobody chooses others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdcompress_engines.few_steps import GUIDANCE, STEPS, FewStepSampling, read_few_steps

from sdcompress.families.registry import family_of
from sdcompress.support.pipeline import TextToImagePipeline, scheduler_config

USUAL_STEPS = 25


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model draws where nobody chooses otherwise.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1 is none.
        is_few_step: whether the model was trained for these steps and this guidance; else they are the family's.
    """

    num_inference_steps: int
    guidance_scale: float
    is_few_step: bool = False

    @property
    def is_guidance_free(self) -> bool:
        """Whether the model has its guidance in its weights, so that a negative prompt has no effect."""
        return self.is_few_step and self.guidance_scale <= 1


def read_defaults(index: Mapping[str, Any], unet_config: Mapping[str, Any]) -> SamplingDefaults:
    """Returns the sampling defaults of a pipeline: its own, else its family's.

    Args:
        index: the pipeline's `model_index.json`, checked, or its `config`.
        unet_config: of its UNet.
    """
    steps, guidance = index.get(STEPS), index.get(GUIDANCE)
    if steps is None or guidance is None:
        return SamplingDefaults(USUAL_STEPS, family_of(unet_config).guidance_scale)
    return SamplingDefaults(int(steps), float(guidance), is_few_step=True)


def sampling_defaults(pipeline: TextToImagePipeline) -> SamplingDefaults:
    """Returns the sampling defaults of a loaded pipeline, on any backend."""
    return read_defaults(pipeline.config, pipeline.unet.config)


def few_step_sampling(pipeline: TextToImagePipeline) -> FewStepSampling | None:
    """Returns what a loaded few-step pipeline was trained for, and what to choose in each host, or None."""
    return read_few_steps(pipeline.config, scheduler_config(pipeline.scheduler))


def set_defaults(pipeline: Any, num_inference_steps: int, guidance_scale: float) -> None:
    """Make these a pipeline's own sampling defaults; `save_pretrained` writes them.

    Args:
        pipeline: of diffusers; it is changed.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1 is none.
    """
    pipeline.register_to_config(**{STEPS: num_inference_steps, GUIDANCE: guidance_scale})
