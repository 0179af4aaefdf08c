"""What a training step sees: a function of (seed, step, place in the batch) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sdcompress.data.cache import LatentCache
from sdcompress.train.config import TrainConfig


def generator_for(seed: int, kind: str, number: int) -> torch.Generator:
    """A CPU generator of its own for each (seed, kind, number), by hash: torch's takes only the low 32 bits of what it
    is given.
    """
    digest = hashlib.blake2b(f"{seed} {kind} {number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class NoisyBatch:
    """One step's input, everything on the training device.

    Attributes:
        sample: noisy latents, (B, C, h, w) float32.
        timesteps: (B,) int64.
        encoder_hidden_states: text embeddings, (B, 77, D) float32; token ids, (B, 77) int64, where the text encoder is
            trained.
        target: noise or velocity, as the prediction type asks, (B, C, h, w) float32.
        weight: of each picture's loss, (B,) float32; ones without Min-SNR.
        added: SDXL's `text_embeds`, (B, P), and `time_ids`, (B, 6), float32; None elsewhere.
    """

    sample: torch.Tensor
    timesteps: torch.Tensor
    encoder_hidden_states: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    added: dict[str, torch.Tensor] | None = None

    def arguments(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """What a UNet is called with."""
        added = {} if self.added is None else {"added_cond_kwargs": self.added}
        return (self.sample, self.timesteps, self.encoder_hidden_states), {"return_dict": False} | added

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> NoisyBatch:
        """The batch with every tensor put through `change`."""
        added = None if self.added is None else {name: change(tensor) for name, tensor in self.added.items()}
        return NoisyBatch(
            change(self.sample),
            change(self.timesteps),
            change(self.encoder_hidden_states),
            change(self.target),
            change(self.weight),
            added,
        )


class Order:
    """Which picture stands at each place of the endless stream of samples; a fresh permutation each epoch.

    Where pictures have several shapes, the stream is made of whole batches of one shape, and the few of each shape that
    fill no batch in an epoch wait for another one's permutation.
    """

    def __init__(self, buckets: torch.Tensor, batch_size: int, seed: int) -> None:
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        shapes, counts = buckets.unique(return_counts=True)
        self.shapes = shapes.tolist()
        self.length = len(buckets) if len(shapes) == 1 else int((counts // batch_size).sum()) * batch_size
        if self.length == 0:  # too few of every shape: the commonest alone, over and over
            self.shapes = [int(shapes[counts.argmax()])]
            self.length = int(counts.max())
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            generator = generator_for(self.seed, "epoch", epoch)
            permutation = torch.randperm(len(self.buckets), generator=generator)
            if len(self.shapes) == 1:
                order = permutation[self.buckets[permutation] == self.shapes[0]]
            else:
                batches = []
                for shape in self.shapes:
                    members = permutation[self.buckets[permutation] == shape]
                    batches += list(members[: len(members) // self.batch_size * self.batch_size].split(self.batch_size))
                order = torch.cat([batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()])
            self._epoch, self._order = epoch, order
        return int(self._order[offset])


class Batches:
    """Noisy batches from a cache, each a function of (seed, position) alone: never of rank, worker or history.

    Args:
        cache: latents and text embeddings.
        scheduler: the teacher's, for the noise schedule and prediction type.
        scaling_factor: the VAE's.
        tokens: give token ids in the place of text embeddings, for a text encoder in training.
    """

    def __init__(
        self, cache: LatentCache, scheduler: Any, scaling_factor: float, config: TrainConfig, *, tokens: bool = False
    ) -> None:
        self.cache, self.config, self.scaling_factor, self.tokens = cache, config, scaling_factor, tokens
        self.alphas = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float32)
        self.prediction_type = scheduler.config.prediction_type
        self.order = Order(cache.buckets, config.batch_size, config.seed)

    def noisy(self, positions: range) -> NoisyBatch:
        """The batch for these positions in the stream of samples (position = step × batch size + place in the batch),
        on the CPU.
        """
        rows = [self._sample(position) for position in positions]
        latents, noise, text = (torch.stack(part) for part in list(zip(*rows, strict=True))[:3])
        timesteps = torch.tensor([row[3] for row in rows])
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        sample = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = noise if self.prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        weight = torch.ones(len(rows))
        if self.config.snr_gamma is not None:
            snr = self.alphas[timesteps] / (1 - self.alphas[timesteps])
            weight = snr.clamp(max=self.config.snr_gamma) / (snr if self.prediction_type == "epsilon" else snr + 1)
        added = (
            None if rows[0][4] is None else {name: torch.stack([row[4][name] for row in rows]) for name in rows[0][4]}
        )
        batch = NoisyBatch(sample, timesteps, text, target, weight, added)
        return batch.each(torch.Tensor.pin_memory) if torch.cuda.is_available() else batch

    def _sample(self, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, Any]:
        generator = generator_for(self.config.seed, "sample", position)
        view, timestep = (int(torch.randint(n, (), generator=generator)) for n in (self.cache.views, len(self.alphas)))
        dropout, pick = torch.rand(2, generator=generator).tolist()
        found = self.cache.sample(self.order[position], view, pick, drop_caption=dropout < self.config.caption_dropout)
        latents = (found.mean + found.std * torch.randn(found.mean.shape, generator=generator)) * self.scaling_factor
        noise = torch.randn(found.mean.shape, generator=generator)
        if self.config.noise_offset:
            noise = noise + self.config.noise_offset * torch.randn(noise.shape[0], 1, 1, generator=generator)
        added = None if found.pooled is None else {"text_embeds": found.pooled, "time_ids": found.time_ids}
        text = found.ids if self.tokens and found.ids is not None else found.text
        return latents, noise, text, timestep, added
