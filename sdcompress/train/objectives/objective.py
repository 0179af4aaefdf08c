"""What the training loop asks of an objective."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from sdcompress.train.batches import NoisyBatch


class Objective(Protocol):
    """One kind of training: how a batch becomes losses.

    Attributes:
        hooked: names of the modules whose outputs the losses read: of the trained network, and of the teacher.
    """

    @property
    def hooked(self) -> tuple[list[str], list[str]]: ...

    def attached(self, trained: nn.Module) -> AbstractContextManager[None]:
        """Whatever hooks the losses need on the trained network, for the length of a run."""

    def losses(self, trained: Any, batch: NoisyBatch) -> dict[str, torch.Tensor]:
        """`loss`, the sum that is minimised, and each of its parts, scalars.

        Args:
            trained: what is called: the network, or a wrapper of it.
        """


def weighted_mse(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of weight × mean squared error, in float32; a scalar."""
    return (weight * (a.float() - b.float()).square().flatten(1).mean(1)).mean()
