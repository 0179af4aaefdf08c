"""What a training step minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .features import collect_features


@dataclass(frozen=True)
class NoisyBatch:
    """One step's input, everything on the training device.

    Attributes:
        sample: noisy latents, (B, C, h, w) float32.
        timesteps: (B,) int64.
        encoder_hidden_states: text embeddings, (B, 77, D) float32.
        target: noise or velocity, as the prediction type asks, (B, C, h, w) float32.
        weight: of each picture's loss, (B,) float32; ones without Min-SNR.
    """

    sample: torch.Tensor
    timesteps: torch.Tensor
    encoder_hidden_states: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


def weighted_mse(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of weight × mean squared error, in float32; a scalar."""
    return (weight * (a.float() - b.float()).square().flatten(1).mean(1)).mean()


class BlockDistillation:
    """Task, output and feature losses of BK-SDM (arXiv 2305.15798, equations 1 to 4).

    `task_loss` is the MSE of the student's prediction against the true target, `output_kd_loss` against the teacher's
    prediction, `feature_kd_loss` the sum over block pairs of the MSE between block outputs, in float32. With
    `feature_norm="teacher"` each pair is divided by the mean square of the teacher's feature.

    Args:
        teacher: the frozen UNet, in eval mode; None where both distillation weights are 0.
        pairs: (student module, teacher module) names with outputs of equal shape.
        weights: of the three losses, by name.
    """

    def __init__(self, teacher: nn.Module | None, pairs: list[tuple[str, str]], weights: dict[str, float], feature_norm: str = "none") -> None:
        self.teacher, self.pairs, self.weights, self.feature_norm = teacher, pairs, weights, feature_norm

    def losses(self, student: nn.Module, bare_student: nn.Module, batch: NoisyBatch) -> dict[str, torch.Tensor]:
        """`loss` (the weighted sum) and each loss apart, scalars.

        Args:
            student: what is called: the student, or accelerate's wrapper of it.
            bare_student: the student itself, whose submodules carry the hooks.
        """
        wants_features = self.weights["feature_kd_loss"] > 0
        with collect_features(bare_student, [s for s, _ in self.pairs] if wants_features else []) as ours:
            predicted = student(batch.sample, batch.timesteps, batch.encoder_hidden_states, return_dict=False)[0]
        found = {"task_loss": weighted_mse(predicted, batch.target, batch.weight)}
        if self.teacher is not None and (wants_features or self.weights["output_kd_loss"] > 0):
            with torch.no_grad(), collect_features(self.teacher, [t for _, t in self.pairs] if wants_features else []) as theirs:
                expected: Any = self.teacher(batch.sample, batch.timesteps, batch.encoder_hidden_states, return_dict=False)[0]
            found["output_kd_loss"] = weighted_mse(predicted, expected, batch.weight)
            if wants_features:
                found["feature_kd_loss"] = torch.stack([self._feature_loss(ours[s], theirs[t]) for s, t in self.pairs]).sum()
        return {"loss": torch.stack([self.weights[name] * value for name, value in found.items()]).sum()} | found

    def _feature_loss(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        theirs = theirs.float()
        loss = F.mse_loss(ours.float(), theirs)
        return loss / theirs.square().mean().clamp_min(1e-8) if self.feature_norm == "teacher" else loss
