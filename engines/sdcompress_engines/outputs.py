"""The outputs of graphs for a diffusers pipeline: named tuples instead of classes of diffusers and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .errors import EngineError


class UNetOutput(NamedTuple):
    """What diffusers calls `UNet2DConditionOutput`."""

    sample: torch.Tensor


class TextEncoderOutput(NamedTuple):
    """`last_hidden_state` (B, 77, C) and `pooler_output` (B, C)."""

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor


class TextEncoderStates(NamedTuple):
    """`TextEncoderOutput` with hidden states."""

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor
    hidden_states: HiddenStates


class TextProjectionOutput(NamedTuple):
    """What transformers calls `CLIPTextModelOutput`: `text_embeds` (B, P), and hidden states where they are wanted."""

    text_embeds: torch.Tensor
    last_hidden_state: torch.Tensor
    hidden_states: HiddenStates | None = None


class DecoderOutput(NamedTuple):
    """Pictures (B, 3, 8H, 8W) in [-1, 1]."""

    sample: torch.Tensor


class EncoderOutput(NamedTuple):
    """What diffusers calls `AutoencoderKLOutput`."""

    latent_dist: LatentDistribution


class HiddenStates(Sequence[torch.Tensor]):
    """A text encoder's hidden states, one more than it has layers. A graph has only the last but one of them.

    Args:
        penultimate: the last hidden state but one, (B, 77, C).
        layers: of the text encoder.
        where: the graph's file, for messages.
    """

    def __init__(self, penultimate: torch.Tensor, layers: int, where: Any) -> None:
        self._penultimate, self._layers, self._where = penultimate, layers, where

    def __len__(self) -> int:
        return self._layers + 1

    def __getitem__(self, index: Any) -> Any:
        if index not in (-2, self._layers - 1):
            raise EngineError(
                f"hidden state {index} (clip_skip) is not in the graph of the text encoder",
                where=self._where,
                expected="-2, the last layer but one",
                hint="run this model with torch, or without clip_skip",
            )
        return self._penultimate


class LatentDistribution:
    """The diagonal Gaussian over latents that a VAE's encoder predicts.

    Args:
        parameters: means, then log-variances, (B, 2·4, H/8, W/8).
    """

    def __init__(self, parameters: torch.Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> torch.Tensor:
        """Returns one draw, (B, 4, H/8, W/8). A seed gives the draw that it gives in diffusers.

        Args:
            generator: one for all samples, or one for each; noise is drawn on its device.
        """
        generators = [generator] if generator is None or isinstance(generator, torch.Generator) else list(generator)
        count = self.mean.shape[0] if len(generators) == 1 else 1
        parts = [
            torch.randn(
                (count, *self.mean.shape[1:]),
                generator=one,
                device=self.mean.device if one is None else one.device,
                dtype=self.mean.dtype,
            )
            for one in generators
        ]
        return self.mean + self.std * torch.cat(parts).to(self.mean.device)

    def mode(self) -> torch.Tensor:
        """Returns the means, (B, 4, H/8, W/8)."""
        return self.mean
