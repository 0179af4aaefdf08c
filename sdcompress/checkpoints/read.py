"""A single-file checkpoint → a diffusers pipeline, without a network."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ModelError

from sdcompress.checkpoints.configs import derive_configs
from sdcompress.checkpoints.ldm_keys import (
    UNET,
    VAE,
    is_openclip,
    openclip_keys,
    qkv_index,
    text_prefixes,
    unet_keys,
    vae_keys,
)
from sdcompress.checkpoints.weights import Weights, open_weights
from sdcompress.families.configs import CONFIGS
from sdcompress.families.family import Family
from sdcompress.families.registry import family_of_pipeline
from sdcompress.families.vocabulary import VOCABULARY
from sdcompress.support.pipeline import TextToImagePipeline

_HALF = (torch.float16, torch.bfloat16)


def load_single_file(path: Path, *, as_stored: bool = False) -> TextToImagePipeline:
    """Load the pipeline of a single-file checkpoint on the CPU, without a safety checker.

    Args:
        path: the checkpoint.
        as_stored: keep half precision where the file holds it; else fp32.

    Raises:
        ModelError: the file is no whole checkpoint; its configs build no pipeline; or a weight is missing or has
            another shape than its config requires.
    """
    weights = open_weights(path)
    configs = derive_configs(weights)
    channels = configs["unet/config.json"].get("in_channels", 4)
    if channels != configs["vae/config.json"].get("latent_channels", 4):
        raise ModelError(
            f"has a UNet of {channels} input channels: an inpainting or editing model",
            where=path,
            expected="a text-to-image model, whose UNet takes the VAE's 4 channels",
        )
    try:
        return _build_pipeline(weights, configs, as_stored)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ModelError(
            f"has configs that build no pipeline ({(str(error) or type(error).__name__).splitlines()[0]})", where=path
        ) from error


def _build_pipeline(weights: Weights, configs: dict[str, dict[str, Any]], as_stored: bool) -> TextToImagePipeline:
    import diffusers

    index = configs["model_index.json"]
    family = family_of_pipeline(str(index.get("_class_name")), configs["unet/config.json"])
    parts: dict[str, Any] = {}
    for name in ("unet", "vae", *family.text_encoders):
        parts[name] = _load_component(weights, name, configs[f"{name}/config.json"], family, as_stored)
    parts["scheduler"] = _build_scheduler(configs["scheduler/scheduler_config.json"], weights.path)
    for name in family.tokenizers:
        parts[name] = _load_tokenizer(weights, name, configs)
    options = dict(family.pipeline_options)
    if "force_zeros_for_empty_prompt" in index:
        options["force_zeros_for_empty_prompt"] = bool(index["force_zeros_for_empty_prompt"])
    pipeline: TextToImagePipeline = getattr(diffusers, family.pipeline_class)(**parts, **options)
    return pipeline


def _build_scheduler(config: dict[str, Any], path: Path) -> Any:
    import diffusers

    # The name comes from the file, so only a scheduler is accepted.
    scheduler_class: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
        raise ModelError(f"names a scheduler that diffusers does not have, {config.get('_class_name')!r}", where=path)
    scheduler: Any = scheduler_class
    return scheduler.from_config(config)


def _load_component(weights: Weights, name: str, config: dict[str, Any], family: Family, as_stored: bool) -> Any:
    """Returns a component with its weights, in eval mode."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        component = _build_component(name, config, family)
    sources = _map_sources(weights, name, component, family)
    state = {}
    for key, empty in component.state_dict().items():
        if not empty.is_meta:
            state[key] = empty
            continue
        tensor = _read_parameter(weights, name, sources[key], empty.shape)
        dtype = tensor.dtype if as_stored and tensor.dtype in _HALF else torch.float32
        state[key] = tensor.to(dtype, copy=True).contiguous()
    component.load_state_dict(state, assign=True)
    return component.eval()


def _build_component(name: str, config: dict[str, Any], family: Family) -> Any:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if name == "unet":
        return UNet2DConditionModel.from_config(config)
    if name == "vae":
        return AutoencoderKL.from_config(config)
    encoder_class = CLIPTextModelWithProjection if name in family.projected_text_encoders else CLIPTextModel
    options = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "torch_dtype")}
    return encoder_class(CLIPTextConfig(**options))


@dataclass(frozen=True)
class _Source:
    """The tensor of the file that a parameter comes from.

    Attributes:
        key: in the LDM layout.
        convert: the file's tensor → the parameter.
    """

    key: str
    convert: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


def _map_sources(weights: Weights, name: str, component: Any, family: Family) -> dict[str, _Source]:
    """Returns parameter → source, for every parameter on the meta device."""
    keys = [key for key, value in component.state_dict().items() if value.is_meta]
    if name == "unet":
        return {key: _Source(UNET + ldm_key) for key, ldm_key in unet_keys(keys).items()}
    if name == "vae":
        return {key: _Source(VAE + ldm_key) for key, ldm_key in vae_keys(keys).items()}
    openclip = is_openclip(component.config)
    prefix, projection = text_prefixes(family.text_prefixes, openclip)
    plain = {key: key.removeprefix("text_model.") for key in keys}
    if openclip:
        return {
            key: _openclip_source(prefix + ldm_key, plain[key])
            for key, ldm_key in zip(plain, openclip_keys(plain.values()).values(), strict=True)
        }
    if not any(key.startswith(prefix) for key in weights.shapes):
        prefix = prefix.removesuffix("text_model.")  # some checkpoints of 2022 leave it out
    return {
        key: _Source((projection if bare.startswith("text_projection") else prefix) + bare)
        for key, bare in plain.items()
    }


def _openclip_source(ldm_key: str, name: str) -> _Source:
    index = qkv_index(name)
    if index is not None:
        return _Source(ldm_key, lambda tensor: tensor.chunk(3)[index])
    return _Source(ldm_key, (lambda tensor: tensor.T) if ldm_key.endswith("text_projection") else lambda tensor: tensor)


def _read_parameter(weights: Weights, component: str, source: _Source, shape: torch.Size) -> torch.Tensor:
    """Returns a parameter in the file's dtype.

    Raises:
        ModelError: the file lacks it, or has it in another shape.
    """
    if source.key not in weights.shapes:
        raise ModelError(
            f"the {component} lacks {source.key}",
            where=weights.path,
            expected=f"shape {tuple(shape)}",
            hint="copy or download it again, or convert it to a diffusers folder",
        )
    tensor = source.convert(weights.read(source.key))
    if tensor.shape != shape and tensor.numel() == shape.numel():
        tensor = tensor.view(shape)  # attention weights are 1×1 convolutions in LDM's VAE
    if tensor.shape != shape:
        raise ModelError(
            f"the {component}'s {source.key} has shape {tuple(tensor.shape)}",
            where=weights.path,
            expected=f"{tuple(shape)}",
            hint="convert it to a diffusers folder with its own config",
        )
    return tensor


def _load_tokenizer(weights: Weights, name: str, configs: Mapping[str, Any]) -> Any:
    """Returns a tokenizer from the configs; its vocabulary is CLIP's where the file carries none."""
    from transformers import CLIPTokenizer

    source = configs if weights.configs is None else weights.configs
    files = {path.partition("/")[2]: content for path, content in source.items() if path.startswith(f"{name}/")}
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
