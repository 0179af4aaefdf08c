"""Block-removed knowledge distillation: task, output and feature losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sdcompress.train.batches import NoisyBatch
from sdcompress.train.features import collect_features
from sdcompress.train.objectives.objective import HookedModules, Objective, predict_frozen, weighted_mse


class BlockDistillation(Objective):
    """Task, output and feature losses of BK-SDM (arXiv 2305.15798, equations 1 to 4).

    `task_loss` is the MSE of the student's prediction against the true target, `output_kd_loss` against the teacher's
    prediction, `feature_kd_loss` the sum over block pairs of the MSE between block outputs, in float32, and
    `attention_kd_loss` the same over self-attention outputs (KOALA, arXiv 2312.04005, section 3.2). With
    `feature_norm="teacher"` each picture's part of a pair is divided by the mean square of the teacher's feature.

    Args:
        teacher: the frozen UNet, in eval mode; None where all distillation weights are 0.
        pairs: (student module, teacher module) names with outputs of equal shape.
        weights: weight of each loss, by name; a feature or attention loss with weight 0 is not computed.
        feature_norm: "none" or "teacher".
        attention_pairs: (student module, teacher module) names of self-attentions.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        pairs: list[tuple[str, str]],
        weights: dict[str, float],
        feature_norm: str = "none",
        attention_pairs: list[tuple[str, str]] | None = None,
    ) -> None:
        self.teacher, self.weights, self.feature_norm = teacher, weights, feature_norm
        self.compared_pairs = {
            name: named
            for name, named in (("feature_kd_loss", pairs), ("attention_kd_loss", attention_pairs or []))
            if weights.get(name, 0) > 0
        }
        self._student_features: dict[str, torch.Tensor] = {}
        self._teacher_features: dict[str, torch.Tensor] = {}
        every_pair = [pair for named in self.compared_pairs.values() for pair in named]
        self.hooked_modules: HookedModules = [s for s, _ in every_pair], [t for _, t in every_pair]

    @contextmanager
    def attach_hooks(self, trained: nn.Module) -> Iterator[None]:
        """Attach hooks to the compared modules of student and teacher; they are removed when the block ends."""
        student_names, teacher_names = self.hooked_modules
        with (
            collect_features(trained, student_names) as self._student_features,
            collect_features(
                self.teacher or trained, teacher_names if self.teacher is not None else []
            ) as self._teacher_features,
        ):
            yield

    def compute_losses(self, trained: Any, batch: NoisyBatch) -> dict[str, torch.Tensor]:
        """Returns `loss` (the weighted sum) and each loss by name, scalars. Call it inside `attach_hooks`."""
        arguments, options = batch.unet_arguments()
        predicted = trained(*arguments, **options)[0]
        losses = {"task_loss": weighted_mse(predicted, batch.target, batch.weight)}
        if self.teacher is not None:
            student_features = dict(self._student_features)
            expected = predict_frozen(self.teacher, batch)
            losses["output_kd_loss"] = weighted_mse(predicted, expected, batch.weight)
            for name, pairs in self.compared_pairs.items():
                losses[name] = torch.stack(
                    [self._compare(student_features[s], self._teacher_features[t]) for s, t in pairs]
                ).sum()
            self._student_features.clear()
            self._teacher_features.clear()
        return {"loss": torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()} | losses

    def _compare(self, student_feature: torch.Tensor, teacher_feature: torch.Tensor) -> torch.Tensor:
        """Returns the MSE between two outputs in float32, divided by the teacher's mean square if so configured.

        It is divided picture by picture: the loss of a batch in parts is then the mean of the parts' losses.
        """
        student_feature, teacher_feature = student_feature.float(), teacher_feature.float()
        if self.feature_norm == "none":
            return F.mse_loss(student_feature, teacher_feature)
        errors = (student_feature - teacher_feature).square().flatten(1).mean(1)
        return (errors / teacher_feature.square().flatten(1).mean(1).clamp_min(1e-8)).mean()
