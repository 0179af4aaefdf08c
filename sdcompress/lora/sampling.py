"""How a model draws with a few-step LoRA: in the header of the file, and onto a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    defaults = sampling_defaults(pipeline)
    entry = {
        STEPS: defaults.num_inference_steps,
        GUIDANCE: defaults.guidance_scale,
        _SCHEDULER: scheduler_config(pipeline.scheduler),
    }
    return {ENTRY: json.dumps(entry)}


def apply_sampling(pipeline: Any, lora: Path) -> None:
    """Give a pipeline the scheduler and the sampling defaults that a LoRA was trained for; most name none.

    Args:
        pipeline: of diffusers; it is changed.
        lora: the LoRA's file.

    Raises:
        ModelError: the entry is broken, or the scheduler has other noise than the pipeline's.
    """
    text = open_weights(lora).metadata.get(ENTRY)
    if text is None:
        return
    where = f"{lora}/{ENTRY}"
    entry = parse_json(text, where, ModelError)
    if not (
        isinstance(entry, Mapping) and isinstance(entry.get(_SCHEDULER), Mapping) and {STEPS, GUIDANCE} <= set(entry)
    ):
        raise ModelError("does not say how to draw", where=where, expected=f"{STEPS}, {GUIDANCE} and a {_SCHEDULER}")
    check_defaults(entry, where)
    scheduler = build_scheduler(entry[_SCHEDULER], where)
    mine, own = scheduler.config.prediction_type, pipeline.scheduler.config.prediction_type
    if mine != own:
        raise ModelError(f"is a LoRA for the prediction type {mine}", where=lora, expected=f"{own}, of the model")
    pipeline.register_modules(scheduler=scheduler)
    set_defaults(pipeline, entry[STEPS], entry[GUIDANCE])
