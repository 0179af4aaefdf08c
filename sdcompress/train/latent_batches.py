"""Batches of clean latents. A batch is a function of (seed, step, position in the batch) alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sdcompress.data.cache import LatentCache
from sdcompress.train.batches import SampleOrder, make_generator
from sdcompress.train.config import LoopConfig


@dataclass(frozen=True)
class LatentBatch:
    """The input of one forward pass of a small decoder.

    Attributes:
        latents: without noise, as the UNet makes them, (B, C, h, w) float32.
    """

    latents: torch.Tensor

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LatentBatch:
        """Returns the batch with `function` applied to every tensor."""
        return LatentBatch(function(self.latents))


class LatentBatches:
    """Batches of clean latents from a cache, each a draw from the VAE's posterior.

    Args:
        cache: the latents.
        config: seed and batch size.
        factor, mean: see `sdcompress.support.pipeline.latent_scale`.
    """

    def __init__(
        self, cache: LatentCache, config: LoopConfig, factor: float | torch.Tensor, mean: float | torch.Tensor
    ) -> None:
        self.cache, self.config, self.factor, self.mean = cache, config, factor, mean
        self.order = SampleOrder(cache.buckets, config.batch_size, config.seed)

    def make_batch(self, positions: range) -> LatentBatch:
        """Returns the batch for these positions in the stream of samples, on the CPU."""
        batch = LatentBatch(torch.stack([self._draw_sample(position) for position in positions]))
        return batch.map_tensors(torch.Tensor.pin_memory) if torch.cuda.is_available() else batch

    def _draw_sample(self, position: int) -> torch.Tensor:
        generator = make_generator(self.config.seed, "sample", position)
        view = int(torch.randint(self.cache.views, (), generator=generator))
        cached = self.cache.sample(self.order[position], view, 0.0)
        latents = cached.mean + cached.std * torch.randn(cached.mean.shape, generator=generator)
        return (latents - self.mean) * self.factor
