"""The interface between the training loop and a loss."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from sdcompress.train.batches import NoisyBatch

HookedModules = tuple[list[str], list[str]]


class Objective(Protocol):
    """A training objective: how a batch becomes losses. A subclass needs `compute_losses` only.

    Attributes:
        hooked_modules: names of the modules whose outputs the losses read: of the trained network, and of the teacher.
            With `compile: true` these modules are left out of compilation.
    """

    hooked_modules: HookedModules = ([], [])

    def attach_hooks(self, trained: nn.Module) -> AbstractContextManager[None]:
        """Attach the hooks that the losses need to the trained network, for the length of a run."""
        return nullcontext()

    def use_average(self, average: Mapping[str, torch.Tensor]) -> None:
        """Receive the moving average of the trained weights, by name, before the first step.

        The loop updates it in place after each step. Without averaging it is empty.
        """
        return None

    def compute_losses(self, trained: Any, batch: Any) -> dict[str, torch.Tensor]:
        """Returns `loss`, the sum to minimize, and each of its parts by name; scalars on the training device.

        Args:
            trained: the network to call, or accelerate's wrapper of it.
            batch: of the kind that the run's batches are, on the training device.
        """
        ...


def weighted_mse(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the mean over the batch of weight × mean squared error, computed in float32; a scalar.

    Args:
        a, b: (B, ...), of equal shape, any dtype.
        weight: (B,) float32.
    """
    return (weight * (a.float() - b.float()).square().flatten(1).mean(1)).mean()


@torch.no_grad()
def predict_frozen(network: nn.Module, batch: NoisyBatch) -> torch.Tensor:
    """Returns the prediction of a frozen UNet, (B, C, h, w), computed in the network's own precision.

    Autocast would keep its norms in float32 and cast its inputs at every layer.
    """
    dtype = next(network.parameters()).dtype
    arguments, options = batch.map_tensors(
        lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
    ).unet_arguments()
    with torch.autocast(batch.sample.device.type, enabled=False):
        predicted: torch.Tensor = network(*arguments, **options)[0]
    return predicted
