"""A single-file checkpoint → a diffusers pipeline, without a network."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sdcompress_engines.errors import ModelError

from sdcompress.checkpoints.identify import configs_of
from sdcompress.checkpoints.ldm_keys import (
    UNET,
    VAE,
    is_openclip,
    openclip_keys,
    qkv_third,
    text_prefixes,
    unet_keys,
    vae_keys,
)
from sdcompress.checkpoints.weights import Weights, open_weights
from sdcompress.families.configs import CONFIGS
from sdcompress.families.family import Family
from sdcompress.families.registry import family_of_pipeline
from sdcompress.families.vocabulary import VOCABULARY

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_single_file(path: Path, *, as_stored: bool = False) -> DiffusionPipeline:
    """The pipeline of a single-file checkpoint on the CPU, without a safety checker: in fp32, or with `as_stored` in
    half precision where the file is.

    Raises:
        ModelError: as `open_weights` and `configs_of`; or a weight that is missing or of another shape than the config
            says.
    """
    import diffusers

    weights = open_weights(path)
    configs = configs_of(weights)
    index = configs["model_index.json"]
    channels = configs["unet/config.json"].get("in_channels", 4)
    if channels != configs["vae/config.json"].get("latent_channels", 4):
        raise ModelError(
            f"has a UNet of {channels} input channels: an inpainting or editing model",
            where=path,
            expected="a text-to-image model, whose UNet takes the VAE's 4 channels",
        )
    family = family_of_pipeline(str(index.get("_class_name")))
    parts: dict[str, Any] = {}
    try:
        for name in ("unet", "vae", *family.text_encoders):
            parts[name] = _load_part(weights, name, configs[f"{name}/config.json"], family, as_stored)
        parts["scheduler"] = _load_scheduler(configs["scheduler/scheduler_config.json"], path)
        for name in family.tokenizers:
            parts[name] = _load_tokenizer(weights, name, configs)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ModelError(
            f"has configs that build no pipeline ({(str(error) or type(error).__name__).splitlines()[0]})", where=path
        ) from error
    options = dict(family.pipeline_options)
    if "force_zeros_for_empty_prompt" in index:
        options["force_zeros_for_empty_prompt"] = bool(index["force_zeros_for_empty_prompt"])
    return getattr(diffusers, family.pipeline_class)(**parts, **options)


def _load_scheduler(config: dict[str, Any], path: Path) -> Any:
    import diffusers

    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ModelError(f"names a scheduler that diffusers does not have, {config.get('_class_name')!r}", where=path)
    scheduler: Any = kind
    return scheduler.from_config(config)


def _load_part(weights: Weights, name: str, config: dict[str, Any], family: Family, as_stored: bool) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        part = _build(name, config)
    places = _places(weights, name, part, family)
    state = {}
    for key, empty in part.state_dict().items():
        if not empty.is_meta:
            state[key] = empty
            continue
        place = places[key]
        if place.name not in weights.shapes:
            raise ModelError(
                f"the {name} lacks {place.name}",
                where=weights.path,
                expected=f"shape {tuple(empty.shape)}",
                hint="copy or download it again, or convert it to a diffusers folder",
            )
        tensor = place.take(weights.read(place.name))
        if tensor.shape != empty.shape and tensor.numel() == empty.numel():
            tensor = tensor.view(empty.shape)  # attention weights are 1×1 convolutions in LDM's VAE
        if tensor.shape != empty.shape:
            raise ModelError(
                f"the {name}'s {place.name} has shape {tuple(tensor.shape)}",
                where=weights.path,
                expected=f"{tuple(empty.shape)}",
                hint="convert it to a diffusers folder with its own config",
            )
        state[key] = tensor.to(
            tensor.dtype if as_stored and tensor.dtype in (torch.float16, torch.bfloat16) else torch.float32, copy=True
        ).contiguous()
    part.load_state_dict(state, assign=True)
    return part.eval()


def _build(name: str, config: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if name == "unet":
        return UNet2DConditionModel.from_config(config)
    if name == "vae":
        return AutoencoderKL.from_config(config)
    kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
    return kind(
        CLIPTextConfig(
            **{key: value for key, value in config.items() if key not in ("architectures", "dtype", "torch_dtype")}
        )
    )


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in the file: its LDM key, and how it is taken from that tensor."""

    name: str
    take: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


def _places(weights: Weights, name: str, part: Any, family: Family) -> dict[str, _Place]:
    keys = [key for key, value in part.state_dict().items() if value.is_meta]
    if name == "unet":
        return {key: _Place(UNET + place) for key, place in unet_keys(keys).items()}
    if name == "vae":
        return {key: _Place(VAE + place) for key, place in vae_keys(keys).items()}
    openclip = is_openclip(part.config)
    prefix, projection = text_prefixes(family.text_prefixes, openclip)
    plain = {key: key.removeprefix("text_model.") for key in keys}
    if openclip:
        return {
            key: _openclip_place(prefix + place, plain[key])
            for key, place in zip(plain, openclip_keys(plain.values()).values(), strict=True)
        }
    if not any(key.startswith(prefix) for key in weights.shapes):
        prefix = prefix.removesuffix("text_model.")  # as some checkpoints of 2022 have it
    return {
        key: _Place((projection if bare.startswith("text_projection") else prefix) + bare)
        for key, bare in plain.items()
    }


def _openclip_place(name: str, key: str) -> _Place:
    third = qkv_third(key)
    if third is not None:
        return _Place(name, lambda tensor: tensor.chunk(3)[third])
    return _Place(name, (lambda tensor: tensor.T) if name.endswith("text_projection") else lambda tensor: tensor)


def _load_tokenizer(weights: Weights, name: str, configs: Mapping[str, Any]) -> Any:
    from transformers import CLIPTokenizer

    found = configs if weights.configs is None else weights.configs
    files = {path.partition("/")[2]: content for path, content in found.items() if path.startswith(f"{name}/")}
    if not {"vocab.json", "tokenizer.json"} & set(files):
        files |= {
            file: (CONFIGS / VOCABULARY / file).read_text(encoding="utf-8") for file in ("vocab.json", "merges.txt")
        }
    with tempfile.TemporaryDirectory() as scratch:
        for file, content in files.items():
            (Path(scratch) / file).write_text(
                content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
            )
        return CLIPTokenizer.from_pretrained(scratch, local_files_only=True)
