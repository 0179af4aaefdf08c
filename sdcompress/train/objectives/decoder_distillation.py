"""The losses of a small decoder: its pictures against the VAE's."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sdcompress.support.lpips import LpipsNetwork
from sdcompress.train.latent_batches import LatentBatch
from sdcompress.train.objectives.objective import Objective


class TeacherDecoder(nn.Module):
    """A frozen copy of a VAE that decodes latents as the UNet makes them.

    Args:
        vae: an `AutoencoderKL`; it stays unchanged.
        dtype: that it computes in.
        factor, mean: see `sdcompress.support.pipeline.latent_scale`.
    """

    factor: torch.Tensor
    mean: torch.Tensor

    def __init__(
        self, vae: Any, dtype: torch.dtype, factor: float | torch.Tensor = 1.0, mean: float | torch.Tensor = 0.0
    ) -> None:
        super().__init__()
        unused = {id(part): None for part in (vae.encoder, vae.quant_conv)}
        self.vae: Any = copy.deepcopy(vae, unused).to(dtype).requires_grad_(False).eval()
        self.register_buffer("factor", torch.as_tensor(factor, dtype=torch.float32))
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))

    @torch.no_grad()
    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the pictures of latents, (B, 3, H, W) float32, in [-1, 1].

        Args:
            latents: as the UNet makes them, (B, C, h, w), float32.
        """
        unscaled = (latents / self.factor + self.mean).to(self.vae.dtype)
        pictures: torch.Tensor = self.vae.decode(unscaled, return_dict=False)[0]
        return pictures.float().clamp(-1, 1)


class SmallAutoencoder(nn.Module):
    """The network in training: a small decoder and the small encoder beside it, in one forward pass.

    Args:
        network: an `AutoencoderTiny`.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, latents: torch.Tensor, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the pictures of latents, (B, 3, H, W) in [-1, 1], and the latents of pictures, (B, C, h, w)."""
        return self.network.decoder(latents), self.network.encoder(pictures)


class DecoderDistillation(Objective):
    """Pixel and perceptual losses of a small decoder against the VAE's pictures, and a loss of its encoder.

    `pixel_loss` is the mean absolute error of the pixels in [-1, 1], `lpips_loss` the perceptual distance (arXiv
    1801.03924), and `encoder_loss` the MSE between the latents that the encoder makes of the VAE's pictures and those
    that the pictures were decoded from. Encoder and decoder share no weights.

    Args:
        teacher: the frozen VAE.
        lpips: the perceptual distance; None where its weight is 0.
        pixel_weight, lpips_weight: weights of the losses; the encoder's is 1.
    """

    def __init__(
        self, teacher: TeacherDecoder, lpips: LpipsNetwork | None, pixel_weight: float, lpips_weight: float
    ) -> None:
        self.teacher, self.lpips = teacher, lpips
        self.weights = {"pixel_loss": pixel_weight, "lpips_loss": lpips_weight, "encoder_loss": 1.0}

    @property
    def frozen(self) -> nn.Module:
        """The networks that the losses need and that are not trained."""
        return nn.ModuleList([self.teacher] if self.lpips is None else [self.teacher, self.lpips])

    def compute_losses(self, trained: Any, batch: LatentBatch) -> dict[str, torch.Tensor]:
        latents = batch.latents
        # Autocast would cast the inputs of each of the VAE's layers, and round LPIPS.
        with torch.autocast(latents.device.type, enabled=False):
            pictures = self.teacher(latents)
        decoded, encoded = trained(latents, pictures)
        with torch.autocast(latents.device.type, enabled=False):
            losses = {
                "pixel_loss": F.l1_loss(decoded.float(), pictures),
                "encoder_loss": F.mse_loss(encoded.float(), latents),
            }
            if self.lpips is not None:
                losses["lpips_loss"] = self.lpips(decoded.float() / 2 + 0.5, pictures / 2 + 0.5).mean()
        return {"loss": torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()} | losses
