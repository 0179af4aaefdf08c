"""The exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sdcompress.train.checkpoint import trainable_state
from sdcompress.train.sharding import local

# diffusers' EMAModel has another warm-up and other rounding, and saves a list where our checkpoints hold weights by
# name: earlier runs would not resume to the same weights.


def update_average(average: dict[str, torch.Tensor], trained: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the weights of `trained`, in place.

    Args:
        average: by parameter name, shapes, shards and device as in `trained`.
        trained: the network.
        decay: the largest decay; the first steps use step / (10 + step), so that the initial weights soon lose
            influence.
        step: steps done, counted from 1.
    """
    decay = min(decay, step / (10 + step))
    weights = trainable_state(trained).values()
    torch._foreach_lerp_([local(a) for a in average.values()], [local(w) for w in weights], 1 - decay)


@contextmanager
def averaged_weights(trained: nn.Module, average: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """Put the averaged weights into the network, for the block; without an average nothing changes."""
    if average is None:
        yield
        return
    own = {name: weight.clone() for name, weight in trainable_state(trained).items()}
    trained.load_state_dict(average, strict=False)
    try:
        yield
    finally:
        trained.load_state_dict(own, strict=False)
