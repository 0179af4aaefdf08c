"""How a model draws with a few-step LoRA: in the header of the file, and onto a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import ModelError
from sdcompress_engines.few_steps import GUIDANCE, STEPS
from sdcompress_engines.json_files import parse_json

from sdcompress.checkpoints.weights import open_weights
from sdcompress.families.build import build_scheduler
from sdcompress.families.sampling_defaults import sampling_defaults, set_defaults
from sdcompress.families.schemas.index import check_defaults
from sdcompress.support.pipeline import scheduler_config

ENTRY = "sdcompress_sampling"
_SCHEDULER = "scheduler"


def describe_sampling(pipeline: Any) -> dict[str, str]:
    """Returns the entry of a LoRA's header that holds a few-step pipeline's scheduler and sampling defaults."""
    defaults, config = sampling_defaults(pipeline), scheduler_config(pipeline.scheduler)
    entry = {
        STEPS: defaults.num_inference_steps,
        GUIDANCE: defaults.guidance_scale,
        _SCHEDULER: {name: value for name, value in config.items() if name == "_class_name" or name[0] != "_"},
    }
    return {ENTRY: json.dumps(entry)}


def read_sampling(lora: Path) -> tuple[dict[str, Any], Any] | None:
    """Returns the sampling defaults that a LoRA was trained for and its scheduler, or None; most name none.

    Args:
        lora: the LoRA's file.

    Returns:
        The entries for `model_index.json`, and a scheduler of diffusers.

    Raises:
        ModelError: the entry is broken.
    """
    text = open_weights(lora).metadata.get(ENTRY)
    if text is None:
        return None
    where = f"{lora}/{ENTRY}"
    entry = parse_json(text, where, ModelError)
    if not isinstance(entry, dict) or not {STEPS, GUIDANCE, _SCHEDULER} <= entry.keys():
        raise ModelError("does not say how to draw", where=where, expected=f"{STEPS}, {GUIDANCE} and a {_SCHEDULER}")
    if not isinstance(entry[_SCHEDULER], dict):
        raise ModelError(f"{_SCHEDULER} is no JSON object", where=where, expected="a scheduler's config")
    check_defaults(entry, where)
    return {name: entry[name] for name in (STEPS, GUIDANCE)}, build_scheduler(entry[_SCHEDULER], where)


def apply_sampling(pipeline: Any, lora: Path) -> None:
    """Give a pipeline the scheduler and the sampling defaults that a LoRA was trained for, if it names them.

    Args:
        pipeline: of diffusers; it is changed.
        lora: the LoRA's file.

    Raises:
        ModelError: the entry is broken, or for another prediction type than the pipeline's.
    """
    found = read_sampling(lora)
    if found is None:
        return
    defaults, scheduler = found
    mine, own = scheduler.config.prediction_type, pipeline.scheduler.config.prediction_type
    if mine != own:
        raise ModelError(f"is a LoRA for the prediction type {mine}", where=lora, expected=f"{own}, of the model")
    pipeline.register_modules(scheduler=scheduler)
    set_defaults(pipeline, defaults[STEPS], defaults[GUIDANCE])
