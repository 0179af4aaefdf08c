"""Configs → the components of a pipeline, without weights. Classes are named here, never by a file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ModelError, SdCompressError, shorten
from sdcompress_engines.few_steps import GUIDANCE, STEPS

from sdcompress.families.family import Family
from sdcompress.families.registry import family_of_pipeline
from sdcompress.families.sampling_defaults import set_defaults
from sdcompress.families.schemas.base import some_of
from sdcompress.families.schemas.check import check_config, is_tiny_vae
from sdcompress.families.schemas.scheduler import SCHEDULERS
from sdcompress.families.schemas.tokenizer import check_tokenizer, read_tokenizer_files
from sdcompress.support.pipeline import TextToImagePipeline
from sdcompress.support.quiet import quiet


@contextmanager
def library_errors(what: str, where: str | Path) -> Iterator[None]:
    """Turn what a library raises inside the block into one line, and silence its notices.

    Args:
        what: the component.
        where: the file or folder it comes from.

    Raises:
        ModelError: in the place of any other exception.
    """
    try:
        with quiet():
            yield
    except SdCompressError:
        raise
    except MemoryError as error:
        raise ModelError(f"the {what} does not fit into memory", where=where) from error
    except Exception as error:
        reason = shorten(str(error).strip() or type(error).__name__, 160)
        raise ModelError(f"the {what} does not load ({reason})", where=where) from error


def build_module(name: str, config: Mapping[str, Any], where: str | Path, family: Family | None = None) -> Any:
    """Returns a UNet, VAE or text encoder of a config, with weights as torch initializes them.

    Under `torch.device("meta")` or accelerate's `init_empty_weights` it takes no memory.

    Args:
        name: `unet`, `vae`, `text_encoder` or `text_encoder_2`.
        config: of the component; it is checked.
        where: the file it comes from, for the message.
        family: of the model; only a text encoder needs it.

    Raises:
        ModelError: the config is broken.
    """
    checked = check_config(name, config, where)
    with library_errors(name, where):
        if name == "unet":
            from diffusers import UNet2DConditionModel

            return UNet2DConditionModel.from_config(checked)
        if name == "vae":
            from diffusers import AutoencoderKL, AutoencoderTiny

            return (AutoencoderTiny if is_tiny_vae(checked) else AutoencoderKL).from_config(checked)
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        projected = family is not None and name in family.projected_text_encoders
        options = {key: value for key, value in checked.items() if key != "model_type"}
        return (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**options))


def build_scheduler(config: Mapping[str, Any], where: str | Path, class_name: str | None = None) -> Any:
    """Returns a scheduler of which a copy was tried in a few steps.

    Args:
        config: of the scheduler; it is checked.
        where: the file it comes from, for the message.
        class_name: one of `SCHEDULERS`; None takes the config's.

    Raises:
        ModelError: the config is broken, names another class, or describes a scheduler that cannot draw.
    """
    import diffusers

    checked = check_config("scheduler", config, where)
    name = class_name or checked.get("_class_name")
    if name not in SCHEDULERS:
        raise ModelError(f"names no scheduler ({name})", where=where, expected=some_of(SCHEDULERS))
    scheduler_class: Any = getattr(diffusers, name)
    options = {key: value for key, value in checked.items() if key != "_class_name"}
    with library_errors("scheduler", where), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own, such as that of NumPy 2
        _try_scheduler(scheduler_class.from_config(options), where)
        return scheduler_class.from_config(options)


def _try_scheduler(scheduler: Any, where: str | Path) -> None:
    """Denoise zeros in a few steps. Not every scheduler can draw by every prediction type, variance and noise.

    Args:
        scheduler: is left at the last step.
        where: the file it comes from, for the message.

    Raises:
        ModelError: the timesteps or the result are not finite.
        Exception: the scheduler's own.
    """
    import torch

    scheduler.set_timesteps(4)
    if not torch.isfinite(torch.as_tensor(scheduler.timesteps, dtype=torch.float32)).all():
        raise ModelError("the scheduler has timesteps that are not finite", where=where)
    sample = torch.zeros(1, 4, 8, 8)
    with torch.random.fork_rng(devices=[]):
        for timestep in scheduler.timesteps:
            predicted = scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(predicted, timestep, sample).prev_sample
    if not sample.isfinite().all():
        raise ModelError("the scheduler draws numbers that are not finite", where=where, expected="another scheduler")


def build_tokenizer(files: Mapping[str, Any], where: str | Path) -> Any:
    """Returns a CLIP tokenizer.

    Args:
        files: name → content of its files; see `sdcompress.families.schemas.tokenizer.FILES`.
        where: the folder, or the file that holds them, for the message.

    Raises:
        ModelError: a file is missing or broken.
    """
    from tokenizers import AddedToken
    from transformers import CLIPTokenizer

    def make_token(token: Any) -> Any:
        if not isinstance(token, dict):
            return token
        flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
        return AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})

    parts = check_tokenizer(files, where)
    with library_errors("tokenizer", where):
        tokenizer = CLIPTokenizer(
            vocab=parts.vocabulary,
            merges=parts.merges,
            model_max_length=parts.context,
            extra_special_tokens=[make_token(token) for token in parts.extra],
            added_tokens_decoder={number: make_token(token) for number, token in sorted(parts.added.items())},
            **{name: make_token(token) for name, token in parts.special.items()},
            **parts.options,
        )
        if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer's special tokens are not in its vocabulary", where=where)
        return tokenizer


def load_tokenizer(folder: Path) -> Any:
    """Returns the CLIP tokenizer of a folder.

    Raises:
        ModelError: a file is missing or broken.
    """
    return build_tokenizer(read_tokenizer_files(folder), folder)


def build_pipeline(index: Mapping[str, Any], parts: Mapping[str, Any], where: str | Path) -> TextToImagePipeline:
    """Returns a diffusers pipeline of its components, without a safety checker.

    Args:
        index: the checked `model_index.json`.
        parts: component → module, scheduler or tokenizer, of those that the index names.
        where: the folder or file, for the message.

    Raises:
        ModelError: a tokenizer does not fit its text encoder, or the class refuses its components.
    """
    import diffusers

    name = index["_class_name"]
    family = family_of_pipeline(name, parts["unet"].config)
    for encoder, tokenizer in zip(family.text_encoders, family.tokenizers, strict=True):
        _check_tokens(parts[tokenizer], parts[encoder].config, tokenizer, where)
    options = dict(family.pipeline_options)
    if len(family.text_encoders) > 1 and "force_zeros_for_empty_prompt" in index:  # null counts as false
        options["force_zeros_for_empty_prompt"] = index["force_zeros_for_empty_prompt"]
    with library_errors("pipeline", where):
        pipeline: TextToImagePipeline = getattr(diffusers, name)(**parts, **options)
    if STEPS in index:
        set_defaults(pipeline, index[STEPS], index[GUIDANCE])
    return pipeline


def _check_tokens(tokenizer: Any, encoder: Any, name: str, where: str | Path) -> None:
    """Refuse a tokenizer with tokens, or with captions, that the text encoder has no place for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= encoder.vocab_size:
        raise ModelError(
            f"has a {name} with the token {largest}", where=where, expected=f"tokens below {encoder.vocab_size}"
        )
    if tokenizer.model_max_length > encoder.max_position_embeddings:
        raise ModelError(
            f"has a {name} for captions of {tokenizer.model_max_length} tokens",
            where=where,
            expected=f"at most {encoder.max_position_embeddings}",
        )
