"""How A1111 and Forge sample in few steps: schedule types, the scale of the first noise, and their LCM."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from .few_step_cases import SEED
from .webui_sampling import SIGMAS, Predict

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LCM_TIMESTEPS = torch.arange(19, 1000, 20)
"""The 50 timesteps that the LCM sampler of both knows."""


def simple(steps: int, table: torch.Tensor = SIGMAS) -> torch.Tensor:
    """Returns the schedule type Simple over a table of sigmas."""
    return torch.cat([table[[-1 - step * len(table) // steps for step in range(steps)]], torch.zeros(1)])


def turbo(steps: int) -> torch.Tensor:
    """Returns Forge's schedule type Turbo, which counts timesteps and not entries of the sampler's table."""
    times = (torch.arange(steps, 0, -1) * 1000 / steps - 1).round().long()
    return torch.cat([SIGMAS[times], torch.zeros(1)])


def sgm_uniform(steps: int) -> torch.Tensor:
    """Returns the schedule type SGM Uniform."""
    times = torch.linspace(999, 0, steps + 1)[:-1]
    low, logs = times.floor().long(), SIGMAS.log()
    return torch.cat([torch.lerp(logs[low], logs[times.ceil().long()], times - low).exp(), torch.zeros(1)])


def begin(noise: torch.Tensor, sigmas: torch.Tensor, *, multiplier: bool) -> torch.Tensor:
    """Returns what a sampling begins with. `multiplier` is the setting SGM noise multiplier, off by default."""
    return noise * ((1 + sigmas[0] ** 2).sqrt() if multiplier else sigmas[0])


def sample_euler(denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Returns the final latents of the sampler Euler."""
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (x - denoise(x, sigma.expand(len(x)))) / sigma * (following - sigma)
    return x


def sample_lcm(denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Returns the final latents of the sampler LCM, which adds noise of the seed `SEED`."""
    generator = torch.Generator().manual_seed(SEED)
    for sigma, following in itertools.pairwise(sigmas):
        x = denoise(x, sigma.expand(len(x)))
        if following > 0:
            x = x + following * torch.randn(x.shape, generator=generator)
    return x


def lcm_denoiser(predict: Predict, context: torch.Tensor) -> Denoiser:
    """Returns A1111's denoiser of LCM: the nearest of 50 timesteps, and a UNet that predicts the noise."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        nearest = (sigma.log()[:, None] - SIGMAS[LCM_TIMESTEPS].log()).abs().argmin(dim=1)
        times, column = LCM_TIMESTEPS[nearest], sigma[:, None, None, None]
        scaled = x / (column**2 + 1).sqrt()
        clean = x - column * predict(scaled, times.float(), context.expand(len(x), -1, -1), None)
        scale = 10.0 * times[:, None, None, None]
        return clean * scale / (scale**2 + 0.25).sqrt() + x * 0.25 / (scale**2 + 0.25)

    return denoise
