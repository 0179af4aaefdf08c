"""The part of a diffusers text-to-image pipeline that this project uses, as a type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sdcompress_engines.errors import ModelError
from sdcompress_engines.noise import find_host_difference

_SAMPLE_SIZE = 64
"""Side of the latents where the UNet's config has none, as in diffusers."""


class TextToImagePipeline(Protocol):
    """A diffusers pipeline such as `StableDiffusionPipeline`, whatever runs its components.

    The components are diffusers' and transformers' modules, or runners in their place, so their types stay open.

    Attributes:
        unet: predicts noise or velocity; `unet.config` holds its shape.
        vae: encodes pictures to latents and decodes them.
        scheduler: the noise schedule and the steps along it.
        config: the entries of its `model_index.json`.
        components: name → component, None where one is absent.
        vae_scale_factor: side of a picture over the side of its latents.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    safety_checker: Any
    vae_scale_factor: int

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def components(self) -> Mapping[str, Any]: ...

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Draw pictures; the arguments are diffusers'."""
        ...

    def encode_prompt(self, *args: Any, **options: Any) -> Any:
        """Compute the text embeddings that the UNet is conditioned on."""
        ...

    def to(self, *args: Any, **options: Any) -> Any:
        """Move or convert the components in place; returns the pipeline."""
        ...

    def save_config(self, *args: Any, **options: Any) -> None:
        """Write `model_index.json` alone."""
        ...

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Write the pipeline as a diffusers folder."""
        ...

    def set_loras(self, loras: Sequence[tuple[Any, float]]) -> None:
        """Put LoRAs into the pipeline; of those that `open_pipeline` returns. See `PipelineLoras.set`."""
        ...

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set the options of the progress bar over the denoising steps."""
        ...


def native_size_px(pipeline: TextToImagePipeline) -> int:
    """Returns the side of the pictures that the pipeline's UNet was made for."""
    size = pipeline.unet.config.sample_size or _SAMPLE_SIZE
    return int(max(size) if isinstance(size, list | tuple) else size) * pipeline.vae_scale_factor


def latent_scale(vae_config: Mapping[str, Any], index: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the factor and the mean of a UNet's latents: they are the VAE's less the mean, times the factor.

    SDXL's pipeline has a mean and a standard deviation for each channel, where its VAE's config holds them (Playground
    v2.5); others have one factor.

    Args:
        vae_config: of its VAE.
        index: the pipeline's `model_index.json`, or its components by name.

    Returns:
        Two floats, or two tensors, (C, 1, 1) float32.
    """
    import torch

    factor, mean, std = vae_config["scaling_factor"], vae_config.get("latents_mean"), vae_config.get("latents_std")
    if "text_encoder_2" not in index or mean is None or std is None:
        return factor, 0.0
    return factor / torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)


NOISE_OPTIONS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    "rescale_betas_zero_snr",
)
"""Options of a scheduler that belong to the model, not to how it is sampled."""


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Returns the config of a scheduler as its file has it: with the class."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def vae_config(vae: Any) -> dict[str, Any]:
    """Returns the config of a VAE in torch as its file has it: with the class."""
    return {**vae.config, "_class_name": type(vae).__name__}


def check_host_noise(pipeline: TextToImagePipeline, what: str, *, schedule: bool = True) -> None:
    """Refuse a model of which a WebUI or ComfyUI would draw other pictures.

    Args:
        pipeline: of diffusers.
        what: what is written for the host, as a noun, for the message.
        schedule: as of `find_host_difference`.

    Raises:
        ModelError: names the property that the host would ignore.
    """
    config = scheduler_config(pipeline.scheduler)
    if difference := find_host_difference(config, vae_config(pipeline.vae), schedule=schedule):
        raise ModelError(
            f"the model has {difference}, which {what} does not tell the program that loads it",
            expected="the noise schedule, targets and latents of Stable Diffusion",
        )
