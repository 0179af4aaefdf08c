"""Muon: momentum whose matrices are made orthogonal before they are applied.

Keller Jordan, 2024; the scale of the update is that of Moonlight (arXiv 2502.16982, section 2.2). `torch.optim.Muon`
takes matrices only, and a UNet's convolutions are not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sdcompress.train.precision import DTYPES, resolve_precision
from sdcompress.train.sharding import shard_like, whole

SECOND_BETA, EPSILON = 0.99, 1e-8
ENDS = ("conv_in", "conv_out", "time_embedding", "add_embedding", "class_embedding", "embeddings")
"""The layers of a UNet or a text encoder that AdamW trains: they do not map hidden features to hidden features."""


def make_muon(parameters: Mapping[str, nn.Parameter], learning_rate: float, weight_decay: float) -> Muon:
    """Returns an optimizer of a UNet's weights: Muon for its matrices and convolutions, AdamW for the others.

    Args:
        parameters: name in the UNet → weight.
        learning_rate: of both halves.
        weight_decay: of both halves.
    """
    matrices = [name for name, p in parameters.items() if p.ndim >= 2 and not set(name.split(".")) & set(ENDS)]
    others = [p for name, p in parameters.items() if name not in set(matrices)]
    return Muon([parameters[name] for name in matrices], others, learning_rate, weight_decay)


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions (out × in·height·width), AdamW for other weights.

    An orthogonal update has an RMS of about 1 / sqrt(longer side); times 0.2 · sqrt(longer side) it is as large as
    AdamW's, so that both halves take one learning rate. Of weights in shards the updates are gathered, because
    an orthogonal matrix needs all of it: every process makes all of them orthogonal and applies its own part.

    Args:
        matrices: weights of two or more dimensions.
        others: weights for AdamW.
        lr: learning rate.
        weight_decay: decoupled, as in AdamW.
        momentum: decay of the average gradient.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        groups = [{"params": list(matrices), "muon": True}, {"params": list(others), "muon": False}]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "first_beta": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient. A closure is not called."""
        for group in self.param_groups:
            weights = [(p, p.grad) for p in group["params"] if p.grad is not None]
            (self._update_matrices if group["muon"] else self._update_others)(weights, group)

    def _update_matrices(self, weights: list[tuple[nn.Parameter, torch.Tensor]], group: dict[str, Any]) -> None:
        same_shape = defaultdict(list)
        for p, gradient in weights:
            average = self.state[p].setdefault("average", torch.zeros_like(p))
            average.lerp_(gradient, 1 - group["momentum"])
            update = whole(gradient.lerp(average, group["momentum"])).flatten(1)
            same_shape[update.shape].append((p, update))
        for shape, members in same_shape.items():
            updates = make_orthogonal(torch.stack([update for _, update in members]))
            for (p, _), update in zip(members, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(shard_like(update.reshape(p.shape), p), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _update_others(self, weights: list[tuple[nn.Parameter, torch.Tensor]], group: dict[str, Any]) -> None:
        for p, gradient in weights:
            state = self.state[p]
            if not state:
                state |= {"step": torch.zeros(()), "first": torch.zeros_like(p), "second": torch.zeros_like(p)}
            state["step"] += 1
            count = state["step"].item()
            state["first"].lerp_(gradient, 1 - group["first_beta"])
            state["second"].mul_(SECOND_BETA).addcmul_(gradient, gradient, value=1 - SECOND_BETA)
            scale = (state["second"] / (1 - SECOND_BETA**count)).sqrt_().add_(EPSILON)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.addcdiv_(state["first"], scale, value=-group["lr"] / (1 - group["first_beta"] ** count))


def make_orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Returns roughly the nearest semi-orthogonal matrices, float32: five steps of a quintic Newton-Schulz iteration.

    The iteration runs in bf16, as in the author's code, where the device computes in it, else in float32. Singular
    values end between 0.7 and 1.2.

    Args:
        matrices: (N, rows, columns), any floating dtype.
    """
    has_bf16 = resolve_precision("auto", matrices.device.type) == "bf16"
    wide = matrices.to(DTYPES["bf16" if has_bf16 else "fp32"])
    tall = wide.shape[-2] > wide.shape[-1]
    if tall:
        wide = wide.mT
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ wide
    return (wide.mT if tall else wide).float()
