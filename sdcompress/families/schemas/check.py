"""The schema of each component, by its name in a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ModelError
from sdcompress_engines.signature import context_width

from sdcompress.families.schemas.base import ComponentSchema, check_content
from sdcompress.families.schemas.scheduler import SCHEDULERS, SchedulerSchema
from sdcompress.families.schemas.text_encoder import TextEncoderSchema
from sdcompress.families.schemas.tiny_vae import TINY_VAE, VAES, TinyVaeSchema
from sdcompress.families.schemas.unet import UNetSchema
from sdcompress.families.schemas.vae import VaeSchema

_SCHEMAS: Mapping[str, tuple[type[ComponentSchema], tuple[str, ...]]] = {
    "unet": (UNetSchema, ("UNet2DConditionModel",)),
    "vae": (VaeSchema, VAES),
    "text_encoder": (TextEncoderSchema, ()),
    "text_encoder_2": (TextEncoderSchema, ()),
    "scheduler": (SchedulerSchema, SCHEDULERS),
}


def config_file(component: str) -> str:
    """Returns the path of a component's config in its pipeline's folder."""
    return f"{component}/{'scheduler_config' if component == 'scheduler' else 'config'}.json"


def check_config(component: str, content: Any, where: str | Path) -> dict[str, Any]:
    """Returns the known entries of a component's config, as they are written.

    Args:
        component: `unet`, `vae`, `text_encoder`, `text_encoder_2` or `scheduler`.
        content: of the file, or the config of a diffusers module.
        where: the file, for the message.

    Raises:
        ModelError: one line that names every fault.
    """
    schema, classes = _SCHEMAS[component]
    if component == "vae" and is_tiny_vae(content):
        schema = TinyVaeSchema
    kept, checked = check_content(schema, content, where, classes)
    if isinstance(checked, TinyVaeSchema):  # from which the scale of the latents follows
        kept["block_out_channels"] = checked.decoder_block_out_channels
    return kept


def is_tiny_vae(config: Any) -> bool:
    """Returns whether the config of a VAE is that of a small decoder; see `TinyVaeSchema`."""
    return isinstance(config, Mapping) and config.get("_class_name") == TINY_VAE


def check_match(configs: Mapping[str, Mapping[str, Any]], where: str | Path, index: Mapping[str, Any]) -> None:
    """Refuse components that do not fit each other, before their weights are read.

    Args:
        configs: component → its checked config; needs `unet` and `vae`.
        where: the pipeline, for the message.
        index: the pipeline's `model_index.json`, checked.

    Raises:
        ModelError: the VAE has another class than the index names, or the UNet takes other latents than the VAE makes,
            or other text than the text encoders make.
    """
    if is_tiny_vae(configs["vae"]) != (index["vae"][1] == TINY_VAE):
        raise ModelError(
            f"has a VAE of the class {configs['vae'].get('_class_name')}", where=where, expected=index["vae"][1]
        )
    vae_schema = TinyVaeSchema if is_tiny_vae(configs["vae"]) else VaeSchema
    unet, vae = UNetSchema.model_validate(configs["unet"]), vae_schema.model_validate(configs["vae"])
    if unet.in_channels != vae.latent_channels:
        raise ModelError(
            f"has a UNet of {unet.in_channels} input channels: an inpainting or editing model",
            where=where,
            expected=f"a text-to-image model, whose UNet takes the VAE's {vae.latent_channels} channels",
        )
    if unet.out_channels != vae.latent_channels:
        raise ModelError(
            f"has a UNet of {unet.out_channels} output channels", where=where, expected=f"{vae.latent_channels}"
        )
    encoders = [TextEncoderSchema.model_validate(each) for name, each in configs.items() if "text_encoder" in name]
    width = sum(encoder.hidden_size for encoder in encoders)
    if (context := context_width(configs["unet"])) != width:
        raise ModelError(f"has a UNet for text of width {context}", where=where, expected=f"the encoders' {width}")
    added = unet.added_text_width if unet.addition_embed_type else None
    made = encoders[-1].projection_dim if len(encoders) > 1 else None
    if added != made:
        raise ModelError(
            f"has a UNet that takes {_describe_pooled(added)}", where=where, expected=_describe_pooled(made)
        )


def _describe_pooled(width: int | None) -> str:
    return "no pooled text embedding" if width is None else f"a pooled text embedding of width {width}"
