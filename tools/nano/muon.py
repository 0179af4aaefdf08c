"""Muon: momentum whose matrices are made orthogonal before they are applied (Keller Jordan, 2024; arXiv 2502.16982 for
the scale).

Here for nano alone, where a step costs little and every minute of two cores counts.
"""

from __future__ import annotations

from collections import defaultdict

import torch


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices of (N, rows, columns), roughly: five steps of a quintic Newton-Schulz
    iteration in bf16.
    """
    wide = matrices.bfloat16()
    tall = wide.shape[-2] > wide.shape[-1]
    if tall:
        wide = wide.mT
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ wide
    return (wide.mT if tall else wide).float()


class Muon(torch.optim.Optimizer):
    """Muon for weights of two dimensions and more (a convolution is out × in·k·k), AdamW for the others and for those
    named in `without`.

    An orthogonal update has an RMS of about 1 / sqrt(longer side); times 0.2 · sqrt(longer side) it is as large as
    AdamW's, so that both halves take one learning rate.
    """

    def __init__(
        self,
        named: dict[str, torch.nn.Parameter],
        lr: float,
        weight_decay: float,
        without: tuple[str, ...],
        momentum: float = 0.95,
    ) -> None:
        matrices = {n for n, p in named.items() if p.ndim >= 2 and not n.startswith(without)}
        groups = [
            {"params": [p for n, p in named.items() if n in matrices], "muon": True},
            {"params": [p for n, p in named.items() if n not in matrices], "muon": False},
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            (self._muon if group["muon"] else self._adamw)(group)

    def _muon(self, group: dict) -> None:
        same_shape = defaultdict(list)
        for p in group["params"]:
            average = self.state[p].setdefault("average", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - group["momentum"])
            same_shape[p.grad.flatten(1).shape].append((p, p.grad.lerp(average, group["momentum"]).flatten(1)))
        for shape, members in same_shape.items():
            updates = orthogonal(torch.stack([update for _, update in members]))
            for (p, _), update in zip(members, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                    update.view_as(p), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5
                )

    def _adamw(self, group: dict) -> None:
        first_decay, second_decay = group["betas"]
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state |= {"step": torch.zeros(()), "first": torch.zeros_like(p), "second": torch.zeros_like(p)}
            state["step"] += 1
            count = state["step"].item()
            state["first"].lerp_(p.grad, 1 - first_decay)
            state["second"].mul_(second_decay).addcmul_(p.grad, p.grad, value=1 - second_decay)
            scale = (state["second"] / (1 - second_decay**count)).sqrt_().add_(1e-8)
            p.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(
                state["first"], scale, value=-group["lr"] / (1 - first_decay**count)
            )
