"""The knobs of a training run, with what each one trades, and the recipes that set them."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sdcompress_engines.errors import UsageError

from sdcompress.data.config import DataConfig
from sdcompress.settings import read_mapping, told

RECIPES = Path(__file__).parent.parent / "recipes"


class TrainConfig(BaseModel):
    """What every kind of training has. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(1000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(16, ge=1, description="Pictures a step, over all processes and accumulation steps.")
    gradient_accumulation: int = Field(
        1, ge=1, description="Splits a batch into this many passes: less memory, the same result."
    )
    learning_rate: float = Field(
        5e-5, gt=0, description="The optimizer's, after warm-up; too high diverges, too low wastes steps."
    )
    lr_warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="After warm-up: constant, or cosine to zero at the last step."
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw",
        description="adamw8bit keeps its state in 8 bits: 6 bytes a weight less on the card; needs bitsandbytes.",
    )
    weight_decay: float = Field(0.01, ge=0, description="The optimizer's.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    snr_gamma: float | None = Field(
        None, gt=0, description="Min-SNR weighting of the task and output losses (arXiv 2303.09556); 5 is usual."
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        description=(
            "Adds noise that is constant over each channel, so that very dark and very bright pictures are learned;"
            " 0.05 is usual, 0 is off."
        ),
    )
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of captions replaced by the empty one, which guidance needs."
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Exponential moving average of the trained weights; 0 is off. What is saved is the average.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="`auto` is bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU."
    )
    save_precision: Literal["fp32", "fp16"] = Field("fp32", description="Of the finished pipeline.")
    tf32: bool = Field(True, description="On NVIDIA cards, fp32 products in TF32: faster, 10 bits of mantissa.")
    compile: bool = Field(
        False, description="torch.compile for teacher and student: minutes to start, faster steps on a GPU."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: about half the memory, a third more time."
    )
    checkpoint_every: int = Field(500, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints kept.")
    log_every: int = Field(10, ge=1, description="Steps between lines of metrics.jsonl.")
    tracker: Literal["none", "tensorboard", "wandb"] = Field(
        "none", description="Where losses go besides metrics.jsonl."
    )
    sample_every: int = Field(500, ge=0, description="Steps between pictures of the validation prompts; 0 is never.")
    validation_prompts: tuple[str, ...] = Field((), description="Prompts drawn at `sample_every`.")
    divergence_factor: float = Field(
        50.0, gt=1, description="Stop when the loss is this many times its running average."
    )
    seed: int = Field(0, ge=0, description="Of everything random in the run.")
    data: DataConfig = Field(default_factory=DataConfig, description="Which pictures, and how they are cut.")


class DistillConfig(TrainConfig):
    """How a student is trained from its teacher."""

    plan: str | None = Field(
        None, description="The block-removal plan where --plan is not given: bk-base, bk-small, bk-tiny or a file."
    )
    task_weight: float = Field(1.0, ge=0, description="Weight of the denoising loss against the true noise.")
    output_kd_weight: float = Field(1.0, ge=0, description="Weight of the loss against the teacher's prediction.")
    feature_kd_weight: float = Field(1.0, ge=0, description="Weight of the loss against the teacher's block outputs.")
    attention_kd_weight: float = Field(
        0.0,
        ge=0,
        description=(
            "Weight of the loss against the teacher's self-attention outputs (KOALA, arXiv 2312.04005); 0 is off."
        ),
    )
    feature_pairs: Literal["blocks", "bk-sdm", "segmind"] = Field(
        "blocks",
        description=(
            "Which block outputs are compared: all, all but the mid block (the paper's code), or Segmind's choice for"
            " tiny."
        ),
    )
    feature_norm: Literal["none", "teacher"] = Field(
        "none",
        description=(
            "`teacher` divides each block's loss by the mean square of the teacher's feature, so that all blocks count"
            " alike."
        ),
    )


class FinetuneConfig(TrainConfig):
    """How every weight of a UNet is trained on new data."""

    learning_rate: float = Field(
        1e-5, gt=0, description="The optimizer's, after warm-up; full finetuning wants a small one."
    )


class LoraConfig(TrainConfig):
    """How a low-rank adapter is trained (arXiv 2106.09685)."""

    learning_rate: float = Field(
        1e-4, gt=0, description="The optimizer's, after warm-up; ten times that of finetuning is usual."
    )
    rank: int = Field(16, ge=1, description="Of the adapter's matrices: higher learns more and makes a bigger file.")
    alpha: int | None = Field(None, ge=1, description="The adapter counts alpha / rank; none is alpha = rank.")
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), description="Names of the linear layers that are adapted."
    )
    text_encoder: bool = Field(
        False,
        description=(
            "Adapt the text encoder too: names learn faster, guidance may suffer, captions are encoded at every step."
        ),
    )


KINDS: dict[str, type[TrainConfig]] = {"distill": DistillConfig, "finetune": FinetuneConfig, "lora": LoraConfig}
Config = TypeVar("Config", bound=TrainConfig)


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str | Path) -> Path:
    """The file of a recipe given by name or path.

    Raises:
        UsageError: no such recipe; names the known and the nearest.
    """
    path = Path(recipe) if Path(recipe).suffix in (".yaml", ".yml") else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(str(recipe), recipe_names(), n=1, cutoff=0.4)
        raise UsageError(
            "no such recipe",
            where=str(recipe),
            expected=f"one of {', '.join(recipe_names())}, or a YAML file",
            hint=near[0] if near else "sdcompress recipes list",
        )
    return path


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """A recipe's raw values.

    Raises:
        UsageError: no such recipe, or no YAML mapping.
    """
    return read_mapping(recipe_path(recipe), "knobs")


def load_config(
    kind: type[Config], recipe: str | Path | None, overrides: dict[str, Any], settings: tuple[str, ...] = ()
) -> Config:
    """A recipe's configuration (None for the defaults), with overrides that are not None, then with `a.b=c` settings.

    A recipe's own `kind` (distill, finetune, lora; distill where it has none) must be the one asked for.

    Raises:
        UsageError: no such recipe, one of another kind, unknown keys or values that cannot be; all faults in one
            message.
    """
    values: dict[str, Any] = {}
    where: str | Path = "the options"
    if recipe is not None:
        where, values = recipe, read_recipe(recipe)
        theirs = values.pop("kind", "distill")
        if KINDS.get(theirs) is not kind:
            ours = next(name for name, config in KINDS.items() if config is kind)
            raise UsageError(
                f"is a recipe for {theirs}", where=recipe, expected=f"one for {ours}", hint="sdcompress recipes list"
            )
    values = _merge(values, {k: v for k, v in overrides.items() if v is not None})
    for setting in settings:
        values = _merge(values, _parse(setting))
    try:
        return kind(**values)
    except (ValidationError, TypeError) as error:
        raise UsageError(
            told(error, kind, "knob") if isinstance(error, ValidationError) else str(error), where=where
        ) from error


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = (
            _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged


def _parse(setting: str) -> dict[str, Any]:
    name, equals, text = setting.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {setting!r}", expected="name=value, such as data.flip=true")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(
            f"--set {setting!r} has no readable value", expected="name=value, such as data.flip=true"
        ) from error
    if isinstance(value, str):  # YAML reads 1e-4 as text; a knob never wants a number as text
        with suppress(ValueError):
            value = float(value)
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)
