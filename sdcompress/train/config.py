"""What training is set by: one config a kind of training, one sentence a field."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sdcompress.data.config import DataConfig


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
