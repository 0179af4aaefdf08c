"""Optimizer, learning rate and precision of a training run."""

from __future__ import annotations

import math
from typing import Any

import torch
from sdcompress_engines.errors import BackendMissing
from torch import nn

from sdcompress.train.config import TrainConfig


def choose_precision(precision: str, device_type: str) -> str:
    """`auto` resolved: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU; others as given."""
    if precision != "auto":
        return precision
    if device_type == "cuda":
        return "bf16" if computes_bf16() else "fp16"
    return "bf16" if device_type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def computes_bf16(device: Any = None) -> bool:
    """Returns whether a GPU has instructions for bfloat16: from compute capability 8.0 on.

    `torch.cuda.is_bf16_supported` counts emulation too.
    """
    return torch.cuda.get_device_capability(device) >= (8, 0)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of 0-based `step`."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    if config.lr_schedule == "cosine" and step >= config.lr_warmup_steps:
        rate *= 0.5 * (
            1 + math.cos(math.pi * (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps))
        )
    return rate


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, fused where torch has it, or bitsandbytes' with its state in 8 bits.

    Raises:
        BackendMissing: bitsandbytes is not installed.
    """
    if config.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise BackendMissing(
                "optimizer adamw8bit needs bitsandbytes", hint="pip install bitsandbytes, or --set optimizer=adamw"
            ) from error
        return AdamW8bit(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
