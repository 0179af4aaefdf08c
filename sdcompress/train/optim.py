"""Optimizer and learning rate of a training run."""

from __future__ import annotations

import math

import torch
from sdcompress_engines.errors import BackendMissing, UsageError
from torch import nn
from torch.distributed.tensor import DTensor

from sdcompress.train.config import LoopConfig
from sdcompress.train.muon import make_muon


def compute_learning_rate(config: LoopConfig, step: int) -> float:
    """Returns the learning rate of a step, counted from 0.

    diffusers' `get_scheduler` starts its warm-up at rate 0, ours at 1/warm-up steps: earlier runs would not resume to
    the same weights.
    """
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    if config.lr_schedule == "cosine" and step >= config.lr_warmup_steps:
        rate *= 0.5 * (
            1 + math.cos(math.pi * (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps))
        )
    return rate


def make_optimizer(config: LoopConfig, trained: nn.Module) -> torch.optim.Optimizer:
    """Returns torch's fused AdamW, bitsandbytes' AdamW with its state in 8 bits, or Muon.

    Args:
        config: chooses one.
        trained: the network; only its weights that require gradients are trained.

    Raises:
        BackendMissing: bitsandbytes is not installed.
        UsageError: bitsandbytes does not take weights in shards.
    """
    named = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    if config.optimizer == "muon":
        return make_muon(named, config.learning_rate, config.weight_decay)
    if config.optimizer == "adamw8bit":
        if any(isinstance(weight, DTensor) for weight in parameters):
            raise UsageError(
                "optimizer adamw8bit does not take weights in shards",
                expected="--set optimizer=adamw, or no --use_fsdp",
            )
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise BackendMissing(
                "optimizer adamw8bit needs bitsandbytes", hint="pip install bitsandbytes, or --set optimizer=adamw"
            ) from error
        return AdamW8bit(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
