"""The knobs of a training run, with what each one trades."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sdcompress_engines.errors import UsageError

RECIPES = Path(__file__).parent.parent / "recipes"


class DistillConfig(BaseModel):
    """How a student is trained from its teacher. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(1000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(16, ge=1, description="Pictures a step, over all processes and accumulation steps.")
    gradient_accumulation: int = Field(1, ge=1, description="Splits a batch into this many passes: less memory, the same result.")
    learning_rate: float = Field(5e-5, gt=0, description="AdamW's; BK-SDM uses 5e-5 at batch 256.")
    lr_warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="After warm-up: constant, or cosine to zero at the last step.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    task_weight: float = Field(1.0, ge=0, description="Weight of the denoising loss against the true noise.")
    output_kd_weight: float = Field(1.0, ge=0, description="Weight of the loss against the teacher's prediction.")
    feature_kd_weight: float = Field(1.0, ge=0, description="Weight of the loss against the teacher's block outputs.")
    feature_norm: Literal["none", "teacher"] = Field("none", description="`teacher` divides each block's loss by the mean square of the teacher's feature, so that all blocks count alike.")
    snr_gamma: float | None = Field(None, gt=0, description="Min-SNR weighting of the task and output losses (arXiv 2303.09556); 5 is usual.")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="Share of captions replaced by the empty one, which guidance needs.")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="Exponential moving average of the student's weights; 0 is off. What is saved is the average.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="`auto` is bf16 where the device computes in it, else fp32.")
    save_precision: Literal["fp32", "fp16"] = Field("fp32", description="Of the finished pipeline.")
    checkpoint_every: int = Field(500, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints kept.")
    log_every: int = Field(10, ge=1, description="Steps between lines of metrics.jsonl.")
    sample_every: int = Field(500, ge=0, description="Steps between pictures of the validation prompts; 0 is never.")
    validation_prompts: tuple[str, ...] = Field((), description="Prompts drawn at `sample_every`.")
    seed: int = Field(0, ge=0, description="Of everything random in the run.")


def load_config(recipe: str | Path | None, overrides: dict[str, Any]) -> DistillConfig:
    """A recipe's configuration (a name under `recipes/` or a YAML file; None for the defaults) with overrides that are not None.

    Raises:
        UsageError: no such recipe, or values it cannot have; all faults in one message.
    """
    values: dict[str, Any] = {}
    where: str | Path = "the options"
    if recipe is not None:
        path = Path(recipe) if Path(recipe).suffix in (".yaml", ".yml") else RECIPES / f"{recipe}.yaml"
        where = recipe
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
            raise UsageError("no such recipe", where=str(recipe), expected=f"one of {known}, or a YAML file")
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise UsageError(f"is not YAML ({error})", where=path) from error
        if not isinstance(values, dict):
            raise UsageError("is no mapping of knobs", where=path)
    values = values | {k: v for k, v in overrides.items() if v is not None}
    try:
        return DistillConfig(**values)
    except (ValidationError, TypeError) as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}, got {e['input']!r}" for e in error.errors()) if isinstance(error, ValidationError) else str(error)
        raise UsageError(faults, where=where) from error
