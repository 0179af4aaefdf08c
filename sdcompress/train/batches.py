"""Noisy training batches. A batch is a function of (seed, step, position in the batch) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sdcompress.data.cache import LatentCache
from sdcompress.train.config import TrainConfig

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


def make_generator(seed: int, stream: str, index: int) -> torch.Generator:
    """Returns a CPU generator of its own for each (seed, stream, index).

    The three are hashed to 32 bits, because torch uses only the low 32 bits of a seed.

    Args:
        seed: the run's.
        stream: what the random numbers are for, such as "epoch" or "sample".
        index: within the stream.
    """
    digest = hashlib.blake2b(f"{seed} {stream} {index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Batch(Protocol):
    """The input of one forward pass, made on the CPU; the training loop moves it to the device."""

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Returns the batch with `function` applied to every tensor."""
        ...


class BatchSource(Protocol):
    """Makes the batches of a run; each is a function of (seed, position) alone.

    Attributes:
        order: of the pictures in the stream of samples.
    """

    order: SampleOrder

    def make_batch(self, positions: range) -> Batch:
        """Returns the batch for these positions in the stream of samples, on the CPU."""
        ...


@dataclass(frozen=True)
class NoisyBatch:
    """The input of one forward pass. `Batches` makes it on the CPU, the training loop moves it to the device.

    Attributes:
        sample: noisy latents, (B, C, h, w) float32.
        timesteps: (B,) int64.
        encoder_hidden_states: text embeddings, (B, 77, D) float32; token ids, (B, 77) int64, where the text encoder is
            trained.
        target: the noise, the velocity or the latents, by the scheduler's prediction type, (B, C, h, w) float32.
        weight: weight of each picture's loss, (B,) float32; ones without Min-SNR.
        added: SDXL's `text_embeds`, (B, P) float32, and `time_ids`, (B, 6) int64; None elsewhere.
    """

    sample: torch.Tensor
    timesteps: torch.Tensor
    encoder_hidden_states: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    added: dict[str, torch.Tensor] | None = None

    def unet_arguments(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Returns the positional and the keyword arguments of a UNet's forward pass on this batch."""
        added = {} if self.added is None else {"added_cond_kwargs": self.added}
        return (self.sample, self.timesteps, self.encoder_hidden_states), {"return_dict": False} | added

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> NoisyBatch:
        """Returns the batch with `function` applied to every tensor."""
        added = None if self.added is None else {name: function(tensor) for name, tensor in self.added.items()}
        return NoisyBatch(
            function(self.sample),
            function(self.timesteps),
            function(self.encoder_hidden_states),
            function(self.target),
            function(self.weight),
            added,
        )


class SampleOrder:
    """The order of pictures in the endless stream of samples: a fresh permutation each epoch.

    Where pictures have several shapes, the stream consists of whole batches of one shape. The few pictures of a shape
    that fill no batch are left out of that epoch; the next epoch has another permutation.

    Args:
        buckets: the shape number of each picture, (N,) int64, on the CPU.
        batch_size: pictures per batch.
        seed: the run's.

    Attributes:
        never_drawn: number of pictures whose shape has too few for a batch, so that no epoch has them.
    """

    def __init__(self, buckets: torch.Tensor, batch_size: int, seed: int) -> None:
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        shapes, counts = buckets.unique(return_counts=True)
        self.shapes = shapes.tolist()
        self.length = len(buckets) if len(shapes) == 1 else int((counts // batch_size).sum()) * batch_size
        self.never_drawn = int(counts[counts < batch_size].sum()) if len(shapes) > 1 else 0
        if self.length == 0:  # no shape fills a batch: repeat the most common shape
            self.shapes = [int(shapes[counts.argmax()])]
            self.length = int(counts.max())
            self.never_drawn = len(buckets) - self.length
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, position: int) -> int:
        """Returns the picture's number at a position of the stream."""
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permute(epoch)
        return int(self._order[offset])

    def _permute(self, epoch: int) -> torch.Tensor:
        """Returns the picture numbers of one epoch, in order, (length,) int64."""
        generator = make_generator(self.seed, "epoch", epoch)
        permutation = torch.randperm(len(self.buckets), generator=generator)
        if len(self.shapes) == 1:
            return permutation[self.buckets[permutation] == self.shapes[0]]
        batches: list[torch.Tensor] = []
        for shape in self.shapes:
            members = permutation[self.buckets[permutation] == shape]
            batches += list(members[: len(members) // self.batch_size * self.batch_size].split(self.batch_size))
        return torch.cat([batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()])


class Batches:
    """Noisy batches from a cache. Each is a function of (seed, position), independent of rank, worker and history.

    Args:
        cache: latents and text embeddings.
        scheduler: the teacher's noise schedule and prediction type, see `make_training_scheduler`.
        scaling_factor: the UNet takes the VAE's latents less `latents_mean`, times this; a number or (C, 1, 1).
        config: seed, batch size, Min-SNR, noise offset and caption dropout.
        tokens: put token ids in place of text embeddings, for a text encoder in training.
        latents_mean: a number or (C, 1, 1).
        timesteps: those that are drawn, (K,) int64; None for all of the schedule.
    """

    def __init__(
        self,
        cache: LatentCache,
        scheduler: DDPMScheduler,
        scaling_factor: float | torch.Tensor,
        config: TrainConfig,
        *,
        tokens: bool = False,
        latents_mean: float | torch.Tensor = 0.0,
        timesteps: torch.Tensor | None = None,
    ) -> None:
        self.cache, self.config, self.tokens = cache, config, tokens
        self.scaling_factor, self.latents_mean = scaling_factor, latents_mean
        self.scheduler: Any = scheduler  # its stubs ask for a subclass of int tensors that torch does not have
        self.alphas = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float32)
        self.timesteps = torch.arange(len(self.alphas)) if timesteps is None else timesteps
        self.prediction_type = self.scheduler.config.prediction_type
        self.order = SampleOrder(cache.buckets, config.batch_size, config.seed)

    def make_batch(self, positions: range) -> NoisyBatch:
        """Returns the batch for these positions in the stream of samples, on the CPU.

        A position is step × batch size + place in the batch.
        """
        rows = [self._draw_sample(position) for position in positions]
        latents, noise, text = (torch.stack(part) for part in list(zip(*rows, strict=True))[:3])
        timesteps = torch.tensor([row[3] for row in rows])
        sample = self.scheduler.add_noise(latents, noise, timesteps)
        target = {"epsilon": noise, "sample": latents}.get(self.prediction_type)
        if target is None:
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        added = (
            None if rows[0][4] is None else {name: torch.stack([row[4][name] for row in rows]) for name in rows[0][4]}
        )
        batch = NoisyBatch(sample, timesteps, text, target, self._weigh(timesteps), added)
        return batch.map_tensors(torch.Tensor.pin_memory) if torch.cuda.is_available() else batch

    def _weigh(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the Min-SNR weights of the losses (arXiv 2303.09556), (B,) float32; ones where Min-SNR is off."""
        if self.config.snr_gamma is None:
            return torch.ones(len(timesteps))
        # diffusers' compute_snr differs in the last bits, by up to 3.4e-7 relative: resumed runs would not be equal.
        snr = self.alphas[timesteps] / (1 - self.alphas[timesteps])
        divisor = {"epsilon": snr, "sample": torch.ones_like(snr)}.get(self.prediction_type, snr + 1)
        # Of a schedule that ends in pure noise the last SNR is 0, and 0 / 0 has the limit 1.
        return (snr.clamp(max=self.config.snr_gamma) / divisor).nan_to_num(nan=1.0)

    def _draw_sample(self, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, Any]:
        """Returns latents, noise, text, timestep and SDXL's added conditions (or None) for a position."""
        generator = make_generator(self.config.seed, "sample", position)
        view, place = (int(torch.randint(n, (), generator=generator)) for n in (self.cache.views, len(self.timesteps)))
        dropout, pick = torch.rand(2, generator=generator).tolist()
        cached = self.cache.sample(self.order[position], view, pick, drop_caption=dropout < self.config.caption_dropout)
        latents = cached.mean + cached.std * torch.randn(cached.mean.shape, generator=generator)
        latents = (latents - self.latents_mean) * self.scaling_factor
        noise = torch.randn(cached.mean.shape, generator=generator)
        if self.config.noise_offset:
            noise = noise + self.config.noise_offset * torch.randn(noise.shape[0], 1, 1, generator=generator)
        added = None if cached.pooled is None else {"text_embeds": cached.pooled, "time_ids": cached.time_ids.long()}
        text = cached.ids if self.tokens and cached.ids is not None else cached.text
        return latents, noise, text, int(self.timesteps[place]), added
