"""The `model_index.json` of a pipeline: which components it has, and of which classes.

The classes are those below and no others. Nothing is imported by a name from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ModelError, shorten
from sdcompress_engines.few_steps import GUIDANCE, STEPS

from sdcompress.families.registry import families
from sdcompress.families.schemas.base import refuse_code, some_of, with_lists
from sdcompress.families.schemas.scheduler import SCHEDULERS
from sdcompress.families.schemas.tiny_vae import VAES
from sdcompress.families.schemas.tokenizer import CLASSES as TOKENIZERS
from sdcompress.support.bounds import MOST_GUIDANCE, MOST_STEPS

_TEXT_ENCODER, _PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
NOT_LOADED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that are never loaded: pictures are not judged, and no picture is an input."""
SWITCHES = ("requires_safety_checker", "force_zeros_for_empty_prompt")


def component_classes(pipeline_class: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Returns component → (library, its accepted classes) of a pipeline class.

    Raises:
        KeyError: no known family has this class.
    """
    family = {family.pipeline_class: family for family in reversed(families().values())}[pipeline_class]
    return {
        "unet": ("diffusers", ("UNet2DConditionModel",)),
        "vae": ("diffusers", VAES),
        "scheduler": ("diffusers", SCHEDULERS),
        **{
            name: ("transformers", (_PROJECTED if name in family.projected_text_encoders else _TEXT_ENCODER,))
            for name in family.text_encoders
        },
        **dict.fromkeys(family.tokenizers, ("transformers", TOKENIZERS)),
    }


def check_index(content: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """Returns the entries of a pipeline's index that are known: class, components, switches and sampling defaults.

    Args:
        content: of the file.
        where: the file, for the message.

    Raises:
        ModelError: the pipeline is of another kind, lacks a component, or names a class that it cannot hold.
    """
    index = with_lists(content)
    refuse_code(index, where)
    named = index.get("_class_name")
    text = shorten(named if isinstance(named, str) else repr(named), 80)
    if not (isinstance(index.get("unet"), list) and index["unet"][:1] not in ([], [None])):
        raise ModelError(
            f"{'the pipeline' if named is None else text} has no UNet",
            where=where,
            expected="a Stable Diffusion pipeline with a UNet2DConditionModel",
        )
    known = sorted({family.pipeline_class for family in families().values()})
    if not isinstance(named, str) or named not in known:
        raise ModelError(f"is a pipeline of the class {text}", where=where, expected=" or ".join(known))
    classes = component_classes(named)
    for name, entry in index.items():
        if isinstance(entry, list) and name not in (*classes, *NOT_LOADED):
            raise ModelError(
                f"names a component {shorten(repr(name), 60)}", where=where, expected=", ".join((*classes, *NOT_LOADED))
            )
    for name, (library, accepted) in classes.items():
        entry = index.get(name)
        if entry not in [[library, each] for each in accepted]:
            raise ModelError(
                f"has no {name}" if entry in (None, [None, None]) else f"names {shorten(entry, 80)} as its {name}",
                where=where,
                expected=f"{some_of(accepted)} of {library}",
            )
    for name in SWITCHES:
        if not isinstance(index.get(name, False), bool | None):
            raise ModelError(f"{name}: {shorten(repr(index[name]), 40)}", where=where, expected="true or false")
    check_defaults(index, where)
    kept = ("_class_name", *classes, *SWITCHES, *(name for name in (STEPS, GUIDANCE) if index.get(name) is not None))
    return {key: value for key, value in index.items() if key in kept} | {
        name: [None, None] for name in NOT_LOADED if name in index
    }


def check_defaults(index: Mapping[str, Any], where: str | Path) -> None:
    """Refuse sampling defaults that are no numbers within the bounds, or of which one is missing.

    Args:
        index: holds them under `STEPS` and `GUIDANCE`, or does not.
        where: its file, for the message.

    Raises:
        ModelError: as said.
    """
    for name, kinds, least, most in ((STEPS, (int,), 1, MOST_STEPS), (GUIDANCE, (int, float), 0, MOST_GUIDANCE)):
        value = index.get(name)
        if value is not None and not (type(value) in kinds and least <= value <= most):
            raise ModelError(
                f"{name}: {shorten(repr(value), 40)}", where=where, expected=f"a number from {least} to {most:g}"
            )
    if (index.get(STEPS) is None) != (index.get(GUIDANCE) is None):
        raise ModelError(f"has only one of {STEPS} and {GUIDANCE}", where=where, expected="both, or neither")
