"""The configuration of each kind of training.

A field's description is also the comment in `recipes show --resolved` and the help text of the field's option.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sdcompress.data.config import DataConfig
from sdcompress.support.bounds import (
    MOST_BATCH,
    MOST_DECODER_BLOCKS,
    MOST_DECODER_WIDTH,
    MOST_FEW_STEPS,
    MOST_GUIDANCE,
    MOST_SEED,
    MOST_TRAINING_STEPS,
)
from sdcompress.support.settings import Settings

_MOST_RATE, _MOST_WEIGHT = 100.0, 1e6


class LoopConfig(Settings):
    """The settings of the training loop, which every kind of training has. Unknown keys are refused."""

    steps: int = Field(1000, ge=1, le=MOST_TRAINING_STEPS, description="Number of optimizer steps.")
    batch_size: int = Field(
        16, ge=1, le=MOST_BATCH, description="Pictures per step, over all processes and accumulation steps."
    )
    gradient_accumulation: int = Field(
        1, ge=1, le=MOST_BATCH, description="Splits a batch into this many passes: less memory, the same result."
    )
    learning_rate: float = Field(
        5e-5, gt=0, le=_MOST_RATE, description="Learning rate after warm-up; too high diverges, too low wastes steps."
    )
    lr_warmup_steps: int = Field(0, ge=0, le=MOST_TRAINING_STEPS, description="Steps of linear warm-up.")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="Learning rate after warm-up: constant, or cosine to zero at the last step."
    )
    optimizer: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw",
        description=(
            "adamw8bit keeps its state in 8 bits and saves 6 bytes of memory per weight; needs bitsandbytes. muon"
            " makes the updates of matrices and convolutions orthogonal, at the same learning rate (arXiv 2502.16982)."
        ),
    )
    weight_decay: float = Field(0.01, ge=0, le=_MOST_WEIGHT, description="Weight decay of the optimizer.")
    max_grad_norm: float = Field(1.0, gt=0, le=1e12, description="Gradients are clipped to this norm.")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of the exponential moving average of the weights; the average is what is saved; 0 is off.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Precision of training; auto is bf16 where the device computes in it, else fp16 on a GPU and fp32"
        " on a CPU.",
    )
    tf32: bool = Field(
        True, description="On NVIDIA GPUs, compute fp32 products in TF32: faster, with 10 bits of mantissa."
    )
    compile: bool = Field(
        False, description="torch.compile for teacher and student: minutes to start, faster steps on a GPU."
    )
    checkpoint_every: int = Field(500, ge=1, le=MOST_TRAINING_STEPS, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, le=1000, description="Number of newest checkpoints to keep.")
    log_every: int = Field(10, ge=1, le=MOST_TRAINING_STEPS, description="Steps between lines of metrics.jsonl.")
    tracker: Literal["none", "tensorboard", "wandb"] = Field(
        "none", description="Service that records the losses besides metrics.jsonl."
    )
    sample_every: int = Field(
        500,
        ge=0,
        le=MOST_TRAINING_STEPS,
        description="Steps between pictures that show what has been learned; 0 draws no pictures.",
    )
    divergence_factor: float = Field(
        50.0, gt=1, le=1e12, description="Stop when the loss is this many times its running average."
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="Seed of everything random in the run.")
    data: DataConfig = Field(
        default_factory=DataConfig, description="Which pictures are used, and how they are cropped."
    )


class TrainConfig(LoopConfig):
    """The settings of every training that denoises."""

    snr_gamma: float | None = Field(
        None,
        gt=0,
        le=_MOST_WEIGHT,
        description="Min-SNR weighting of the task and output losses (arXiv 2303.09556); 5 is usual.",
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        le=_MOST_WEIGHT,
        description=(
            "Adds noise that is constant over each channel, so that very dark and very bright pictures are learned;"
            " 0.05 is usual, 0 is off."
        ),
    )
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of captions replaced by the empty caption, which guidance needs."
    )
    save_precision: Literal["fp32", "fp16"] = Field("fp32", description="Precision of the finished pipeline.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: about half the memory, a third more time."
    )
    validation_prompts: tuple[str, ...] = Field((), description="Prompts that are drawn as pictures during training.")


class DistillConfig(TrainConfig):
    """How a student is trained from its teacher."""

    plan: str | None = Field(
        None, description="Block-removal plan if --plan is not given: bk-base, bk-small, bk-tiny or a file."
    )
    task_weight: float = Field(1.0, ge=0, le=_MOST_WEIGHT, description="Weight of the loss against the true noise.")
    output_kd_weight: float = Field(
        1.0, ge=0, le=_MOST_WEIGHT, description="Weight of the loss against the teacher's prediction."
    )
    feature_kd_weight: float = Field(
        1.0, ge=0, le=_MOST_WEIGHT, description="Weight of the loss against the teacher's block outputs."
    )
    attention_kd_weight: float = Field(
        0.0,
        ge=0,
        le=_MOST_WEIGHT,
        description=(
            "Weight of the loss against the teacher's self-attention outputs (KOALA, arXiv 2312.04005); 0 is off."
        ),
    )
    feature_pairs: Literal["blocks", "bk-sdm", "segmind"] = Field(
        "blocks",
        description=(
            "Block outputs that are compared: all, all but the mid block's (the paper's code), or Segmind's choice for"
            " tiny."
        ),
    )
    feature_norm: Literal["none", "teacher"] = Field(
        "none",
        description=(
            "`teacher` divides each block's loss by the mean square of the teacher's feature, so that all blocks count"
            " equally."
        ),
    )

    @model_validator(mode="after")
    def _check_weights(self) -> DistillConfig:
        if not any(self.loss_weights().values()):
            names = ", ".join(name.replace("_loss", "_weight") for name in self.loss_weights())
            raise ValueError(f"{names} are all 0, so that nothing would be learned")
        return self

    def loss_weights(self) -> dict[str, float]:
        """Returns the weight of each loss, by the loss's name."""
        return {
            "task_loss": self.task_weight,
            "output_kd_loss": self.output_kd_weight,
            "feature_kd_loss": self.feature_kd_weight,
            "attention_kd_loss": self.attention_kd_weight,
        }


class FinetuneConfig(TrainConfig):
    """How every weight of a UNet is trained on new data."""

    learning_rate: float = Field(
        1e-5, gt=0, le=_MOST_RATE, description="Learning rate after warm-up; full finetuning needs a small one."
    )


class LoraConfig(TrainConfig):
    """How a low-rank adapter is trained (arXiv 2106.09685)."""

    learning_rate: float = Field(
        1e-4, gt=0, le=_MOST_RATE, description="Learning rate after warm-up; ten times that of finetuning is usual."
    )
    rank: int = Field(
        16, ge=1, le=4096, description="Rank of the adapter's matrices: higher learns more and makes a bigger file."
    )
    alpha: int | None = Field(
        None, ge=1, le=2**20, description="The adapter is scaled by alpha / rank; by default alpha equals rank."
    )
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), description="Names of the linear layers that are adapted."
    )
    text_encoder: bool = Field(
        False,
        description=(
            "Adapt the text encoder too: the model learns names faster, guidance may suffer, captions are encoded at"
            " every step."
        ),
    )


class FewStepConfig(TrainConfig):
    """How a model is trained to draw in few steps, without guidance (arXiv 2310.04378 and 2405.18407)."""

    num_inference_steps: int = Field(
        4, ge=1, le=MOST_FEW_STEPS, description="Steps in which the model learns to draw: 1, 2, 4, 5, 8, 10 or 20."
    )
    phases: int | None = Field(
        None,
        ge=1,
        le=MOST_FEW_STEPS,
        description=(
            "Parts into which the trajectory is cut; the model learns to jump to the end of each. As many as steps, the"
            " default, adds no noise between steps. 1 is latent consistency: new noise between steps, whose number is"
            " then free."
        ),
    )
    solver_steps: int = Field(
        40,
        ge=1,
        le=1000,
        description="Steps of the teacher's solver along the whole trajectory; more are more exact and learned slower.",
    )
    guidance_scale: float | None = Field(
        None,
        ge=1,
        le=MOST_GUIDANCE,
        description="Guidance that goes into the weights: higher follows the prompt more; default: the teacher's own.",
    )
    huber_c: float = Field(
        0.001, gt=0, le=1e3, description="Differences under it count as their square, larger ones as their size."
    )
    loss_unit: Literal["prediction", "sample"] = Field(
        "prediction",
        description=(
            "What the loss compares: `sample` where jumps end, as the papers; `prediction` divides that by how far an"
            " end moves with the prediction, so that all timesteps count alike."
        ),
    )
    learning_rate: float = Field(5e-6, gt=0, le=_MOST_RATE, description="Learning rate after warm-up; higher blurs.")
    ema_decay: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="Decay of the moving average of the weights, whose predictions are the targets and which is saved.",
    )
    caption_dropout: float = Field(
        0.0, ge=0, le=1, description="Share of captions replaced by the empty one; the model draws without guidance."
    )
    lora_rank: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Train a LoRA of this rank in place of all weights, for the model it came from.",
    )
    lora_targets: tuple[str, ...] = Field(
        (
            *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
            *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        ),
        description="Names of the layers that a LoRA adapts.",
    )

    @model_validator(mode="after")
    def _check_combination(self) -> FewStepConfig:
        if self.phases not in (None, 1, self.num_inference_steps):
            raise ValueError(f"phases {self.phases} should be 1 or {self.num_inference_steps}, the number of steps")
        if self.snr_gamma is not None:
            raise ValueError("snr_gamma has no effect: the consistency loss compares samples, not noise")
        return self

    def count_phases(self) -> int:
        """Returns the number of phases, where None stands for the number of steps."""
        return self.phases or self.num_inference_steps


class DecoderConfig(LoopConfig):
    """How a small decoder is trained from a VAE."""

    learning_rate: float = Field(
        5e-4, gt=0, le=_MOST_RATE, description="Learning rate after warm-up; a network from scratch needs a large one."
    )
    width: int = Field(
        64,
        ge=4,
        le=MOST_DECODER_WIDTH,
        description="Channels of every layer: TAESD's 64, which the WebUIs and ComfyUI load; fewer are faster.",
    )
    blocks: tuple[Annotated[int, Field(ge=0, le=MOST_DECODER_BLOCKS)], ...] = Field(
        (3, 3, 3, 1),
        min_length=1,
        max_length=8,
        description=(
            "Blocks of each level of the decoder, from the latents to the picture; the encoder has them in reverse."
            " The last levels take the most time; the WebUIs and ComfyUI load 3, 3, 3, 1."
        ),
    )
    pixel_weight: float = Field(
        1.0, ge=0, le=_MOST_WEIGHT, description="Weight of the mean absolute error of the pixels."
    )
    lpips_weight: float = Field(
        0.5,
        ge=0,
        le=_MOST_WEIGHT,
        description=(
            "Weight of LPIPS, the perceptual distance (arXiv 1801.03924), without which details blur; 0 is off, and"
            " needs no package."
        ),
    )
    lpips_net: Literal["alex", "vgg"] = Field(
        "vgg", description="Network of LPIPS: vgg gives better gradients, alex costs a tenth."
    )

    @model_validator(mode="after")
    def _check_weights(self) -> DecoderConfig:
        if not (self.pixel_weight or self.lpips_weight):
            raise ValueError("pixel_weight, lpips_weight are all 0, so that nothing would be learned")
        return self


KINDS: dict[str, type[LoopConfig]] = {
    "distill": DistillConfig,
    "few-step": FewStepConfig,
    "finetune": FinetuneConfig,
    "lora": LoraConfig,
    "decoder": DecoderConfig,
}
"""The kinds of training, as a recipe's `kind` names them."""
