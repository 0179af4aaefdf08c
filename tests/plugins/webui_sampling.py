"""Samplings as a WebUI does them: k-diffusion's Euler method with classifier-free guidance."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch


def reference(unet: Any) -> Callable[..., torch.Tensor]:
    """Returns the same call by diffusers. `y` is SDXL's embedding and sizes in one vector."""

    @torch.no_grad()
    def run(
        x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        if y is None:
            return unet(x, timesteps, context).sample
        unet.get_aug_embed = lambda **_: unet.add_embedding(y)
        try:
            return unet(x, timesteps, context, added_cond_kwargs={}).sample
        finally:
            del unet.get_aug_embed

    return run


_ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


SIGMAS = ((1 - _ALPHAS) / _ALPHAS).sqrt().float()
"""The noise schedule of Stable Diffusion, by timestep."""


def schedule(steps: int) -> torch.Tensor:
    """Returns sigmas from the largest down to zero, as k-diffusion's schedule without Karras has them."""
    times = torch.linspace(999, 0, steps)
    low = times.floor().long()
    logs = SIGMAS.log()
    return torch.cat([torch.lerp(logs[low], logs[times.ceil().long()], times - low).exp(), torch.zeros(1)])


def timestep_of(sigma: torch.Tensor) -> torch.Tensor:
    """Returns timesteps, (B,), float32. They may lie between two of the model's."""
    logs, wanted = SIGMAS.log(), sigma.log()
    low = (torch.searchsorted(logs, wanted.contiguous()) - 1).clamp(0, 998)
    share = ((wanted - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)
    return low + share


Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


def denoise(
    predict: Predict,
    x: torch.Tensor,
    sigma: torch.Tensor,
    context: torch.Tensor,
    y: torch.Tensor | None,
    prediction: str = "epsilon",
) -> torch.Tensor:
    """Returns the denoised latents, by a UNet that predicts the noise or the velocity."""
    scaled = x / (sigma**2 + 1).sqrt()[:, None, None, None]
    return read_prediction(x, predict(scaled, timestep_of(sigma), context, y), sigma, prediction)


def read_prediction(x: torch.Tensor, output: torch.Tensor, sigma: torch.Tensor, prediction: str) -> torch.Tensor:
    """Returns the denoised latents of a UNet's output."""
    sigma = sigma[:, None, None, None]
    if prediction == "epsilon":
        return x - sigma * output
    return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()


class Guidance:
    """Classifier-free guidance as A1111 arranges it: cond and uncond in one call or in two, or cond alone."""

    def __init__(
        self,
        predict: Predict,
        together: bool = True,
        skip_uncond: Callable[[int], bool] = lambda step: False,
        prediction: str = "epsilon",
    ) -> None:
        self.predict, self.together, self.skip, self.prediction = predict, together, skip_uncond, prediction
        self.steps: list[torch.Tensor] = []

    def __call__(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        cond: torch.Tensor,
        uncond: torch.Tensor,
        y: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        sigmas = sigma.expand(len(x))
        if self.skip(len(self.steps)):
            found = denoise(self.predict, x, sigmas, cond, y, self.prediction)
        elif self.together and cond.shape[1] == uncond.shape[1]:
            both = denoise(
                self.predict,
                torch.cat([x, x]),
                torch.cat([sigmas, sigmas]),
                torch.cat([cond, uncond]),
                None if y is None else torch.cat([y, y]),
                self.prediction,
            )
            with_prompt, without = both.chunk(2)
            found = without + (with_prompt - without) * scale
        else:
            with_prompt, without = (
                denoise(self.predict, x, sigmas, each, y, self.prediction) for each in (cond, uncond)
            )
            found = without + (with_prompt - without) * scale
        self.steps.append(found)
        return found


def euler(
    guidance: Guidance,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    y: torch.Tensor | None = None,
    scale: float = 4.0,
) -> torch.Tensor:
    """Returns the final latents. `guidance.steps` has the denoised latents of each step."""
    for sigma, following in itertools.pairwise(sigmas):
        denoised = guidance(x, sigma, cond, uncond, y, scale)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x
