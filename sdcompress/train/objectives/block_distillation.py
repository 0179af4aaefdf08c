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
from sdcompress.train.objectives.objective import weighted_mse


class BlockDistillation:
    """Task, output and feature losses of BK-SDM (arXiv 2305.15798, equations 1 to 4).

    `task_loss` is the MSE of the student's prediction against the true target, `output_kd_loss` against the teacher's
    prediction, `feature_kd_loss` the sum over block pairs of the MSE between block outputs, in float32, and
    `attention_kd_loss` the same over self-attention outputs (KOALA, arXiv 2312.04005, section 3.2). With
    `feature_norm="teacher"` each pair is divided by the mean square of the teacher's feature.

    Args:
        teacher: the frozen UNet, in eval mode; None where all distillation weights are 0.
        pairs: (student module, teacher module) names with outputs of equal shape.
        weights: of the losses, by name; a loss without a weight is not computed.
        attention_pairs: the same for self-attentions.
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
        self.kinds = {
            name: found
            for name, found in (("feature_kd_loss", pairs), ("attention_kd_loss", attention_pairs or []))
            if weights.get(name, 0) > 0
        }
        self._ours: dict[str, torch.Tensor] = {}
        self._theirs: dict[str, torch.Tensor] = {}

    @property
    def hooked(self) -> tuple[list[str], list[str]]:
        """Names of the student's and of the teacher's modules whose outputs are compared."""
        pairs = [pair for kind in self.kinds.values() for pair in kind]
        return [student for student, _ in pairs], [teacher for _, teacher in pairs]

    @contextmanager
    def attached(self, trained: nn.Module) -> Iterator[None]:
        """Hooks on the student's and the teacher's modules of the pairs; gone when the block ends."""
        ours, theirs = self.hooked
        with (
            collect_features(trained, ours) as self._ours,
            collect_features(self.teacher or trained, theirs if self.teacher is not None else []) as self._theirs,
        ):
            yield

    def losses(self, trained: Any, batch: NoisyBatch) -> dict[str, torch.Tensor]:
        """`loss` (the weighted sum) and each loss apart, scalars; inside `attached`."""
        arguments, options = batch.arguments()
        predicted = trained(*arguments, **options)[0]
        found = {"task_loss": weighted_mse(predicted, batch.target, batch.weight)}
        if self.teacher is not None:
            ours = dict(self._ours)
            expected = self._ask_teacher(batch)
            found["output_kd_loss"] = weighted_mse(predicted, expected, batch.weight)
            for name, pairs in self.kinds.items():
                found[name] = torch.stack([self._feature_loss(ours[s], self._theirs[t]) for s, t in pairs]).sum()
            self._ours.clear()
            self._theirs.clear()
        return {"loss": torch.stack([self.weights[name] * value for name, value in found.items()]).sum()} | found

    @torch.no_grad()
    def _ask_teacher(self, batch: NoisyBatch) -> torch.Tensor:
        """Returns the teacher's prediction, (B, C, h, w), computed in its own precision: autocast would keep its norms
        in float32 and cast its
        inputs at every layer."""
        assert self.teacher is not None
        dtype = next(self.teacher.parameters()).dtype
        arguments, options = batch.each(
            lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
        ).arguments()
        with torch.autocast(batch.sample.device.type, enabled=False):
            expected: torch.Tensor = self.teacher(*arguments, **options)[0]
        return expected

    def _feature_loss(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        theirs = theirs.float()
        loss = F.mse_loss(ours.float(), theirs)
        return loss / theirs.square().mean().clamp_min(1e-8) if self.feature_norm == "teacher" else loss
