"""Runners of a VAE's decoder and encoder as the `vae` of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .engine_module import ComponentGraph, EngineModule
from .errors import EngineError
from .outputs import DecoderOutput, EncoderOutput, LatentDistribution
from .runners import Runner


class EngineVaeDecoder(EngineModule):
    """Any runner of a VAE decoder graph, as the `vae` of a diffusers pipeline.

    `force_upcast` is off in its config: the precision is the graph's, and a pipeline that wants fp32 would look for
    weights to cast.

    Args:
        runner, config, host: see `EngineModule`.
        encoder: a runner of the VAE's encoder, for image-to-image pipelines.
    """

    component, needed = "vae_decoder", ("sample",)

    def __init__(
        self, runner: Runner, config: Mapping[str, Any], host: str = "diffusers", *, encoder: Runner | None = None
    ) -> None:
        super().__init__(runner, {**config, "force_upcast": False}, host)
        self._encoder = (
            None if encoder is None else ComponentGraph(encoder.open(), "vae_encoder", ("latent_parameters",), host)
        )

    def close(self) -> None:
        super().close()
        if self._encoder is not None:
            self._encoder.runner.close()

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Returns the pictures of latents, (B, 3, H, W) in [-1, 1], in `z.dtype`.

        Args:
            z: unscaled latents, already divided by `scaling_factor`, (B, 4, H/8, W/8).
            return_dict: a `DecoderOutput`; without it a tuple.
            generator: not used.
        """
        out = self.graph.infer(latent_sample=z)["sample"].to(z.dtype)
        return DecoderOutput(out) if return_dict else (out,)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> EncoderOutput | tuple[LatentDistribution]:
        """Returns the distribution of the unscaled latents of pictures.

        Args:
            x: pictures, (B, 3, H, W) in [-1, 1]; the result has their dtype.
            return_dict: an `EncoderOutput`; without it a tuple.

        Raises:
            EngineError: there is no encoder.
        """
        if self._encoder is None:
            raise EngineError(
                "this VAE has a decoder only",
                where=self.runner.path,
                hint="export the vae_encoder too, or encode with torch",
            )
        found = LatentDistribution(self._encoder.infer(sample=x)["latent_parameters"].to(x.dtype))
        return EncoderOutput(found) if return_dict else (found,)
