"""A single-file checkpoint → a diffusers pipeline, without a network."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sdcompress.checkpoints.component import Source, keep_half, load_parameters
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
from sdcompress.families.build import build_module, build_pipeline, build_scheduler, build_tokenizer
from sdcompress.families.configs import CONFIGS
from sdcompress.families.family import Family
from sdcompress.families.registry import family_of_pipeline
from sdcompress.families.schemas.check import check_match
from sdcompress.families.schemas.tokenizer import FILES
from sdcompress.families.vocabulary import VOCABULARY, shared_vocabulary
from sdcompress.support.pipeline import TextToImagePipeline

_WHOLE = {
    "unet": re.compile(re.escape(UNET)),
    "vae": re.compile(re.escape(VAE) + r"(encoder|decoder|quant_conv|post_quant_conv)\."),
}
"""Component → its keys in a checkpoint, all of which must be taken."""


def load_single_file(path: Path, *, as_stored: bool = False) -> TextToImagePipeline:
    """Load the pipeline of a single-file checkpoint on the CPU, without a safety checker.

    Args:
        path: the checkpoint.
        as_stored: keep half precision where the file holds it; else fp32.

    Raises:
        ModelError: the file is no whole checkpoint; its configs build no pipeline; or a weight is missing, is not
            finite, has another shape than its config requires, or is not asked for.
    """
    weights = open_weights(path)
    configs = derive_configs(weights)
    index = configs["model_index.json"]
    unet = configs["unet/config.json"]
    family = family_of_pipeline(str(index["_class_name"]), unet)
    modules = {name: configs[f"{name}/config.json"] for name in ("unet", "vae", *family.text_encoders)}
    check_match(modules, path, index)
    choose_dtype = keep_half if as_stored else lambda stored: torch.float32
    parts: dict[str, Any] = {"scheduler": build_scheduler(configs["scheduler/scheduler_config.json"], path)}
    for name in family.tokenizers:
        parts[name] = build_tokenizer(_find_tokenizer_files(weights, name, configs), path)
    for name, config in modules.items():
        parts[name] = _load_component(weights, name, config, family, choose_dtype)
    return build_pipeline(index, parts, path)


def _load_component(
    weights: Weights,
    name: str,
    config: dict[str, Any],
    family: Family,
    choose_dtype: Callable[[torch.dtype], torch.dtype],
) -> Any:
    """Returns a component with its weights, in eval mode."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        component = build_module(name, config, weights.path, family)
    sources = _map_sources(weights, name, component, family)
    taken = {source.key for source in sources.values()}
    whole = _WHOLE.get(name)
    if whole is None and not is_openclip(
        component.config
    ):  # OpenCLIP's last layer is in the file, and no family uses it
        whole = re.compile(re.escape(family.text_prefixes["openai"]) + r"(text_model\.)?encoder\.")
    unknown = [key for key in weights.shapes if whole and whole.match(key) and key not in taken]
    return load_parameters(component, name, weights, sources, choose_dtype, unknown)


def _map_sources(weights: Weights, name: str, component: Any, family: Family) -> dict[str, Source]:
    """Returns parameter → source, for every parameter on the meta device."""
    keys = [key for key, value in component.state_dict().items() if value.is_meta]
    if name == "unet":
        return {key: Source(UNET + ldm_key) for key, ldm_key in unet_keys(keys).items()}
    if name == "vae":
        return {key: Source(VAE + ldm_key) for key, ldm_key in vae_keys(keys).items()}
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
        key: Source((projection if bare.startswith("text_projection") else prefix) + bare)
        for key, bare in plain.items()
    }


def _openclip_source(ldm_key: str, name: str) -> Source:
    index = qkv_index(name)
    if index is not None:
        return Source(ldm_key, lambda tensor: tensor.chunk(3)[index])
    return Source(ldm_key, (lambda tensor: tensor.T) if ldm_key.endswith("text_projection") else lambda tensor: tensor)


def _find_tokenizer_files(weights: Weights, name: str, configs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the files of a tokenizer; the vocabulary is CLIP's where the checkpoint carries none."""
    source = configs if weights.configs is None else weights.configs
    files = {file: source[f"{name}/{file}"] for file in FILES if f"{name}/{file}" in source}
    if not {"vocab.json", "tokenizer.json"} & set(files):
        files |= {
            "vocab.json": dict(shared_vocabulary()),
            "merges.txt": (CONFIGS / VOCABULARY / "merges.txt").read_text(encoding="utf-8"),
        }
    return files
