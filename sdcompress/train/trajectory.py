"""The times of a few-step training: a solver's grid of timesteps in phases, and the steps along it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sdcompress_engines.errors import ModelError, UsageError

from sdcompress.support.bounds import MOST_FEW_STEPS

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
"""Of the boundary condition, as in diffusers' `LCMScheduler` (arXiv 2310.04378, section 4.1)."""


@dataclass(frozen=True)
class Trajectory:
    """The path from noise to a picture, in solver steps that are gathered in phases of equal length.

    Place 0 is the clean picture, place N pure noise. Place i > 0 is the timestep i · T / N - 1, so that the phases of a
    model in four steps begin at 999, 749, 499 and 249.

    Attributes:
        alphas_cumprod: of each place, (N + 1,) float32; that of place 0 is 1.
        spacing: timesteps between two places.
        phases: 1 is latent consistency (arXiv 2310.04378); more is phased consistency (arXiv 2405.18407).
        prediction_type: epsilon, v_prediction or sample.
    """

    alphas_cumprod: torch.Tensor
    spacing: int
    phases: int
    prediction_type: str

    @property
    def timesteps(self) -> torch.Tensor:
        """The timestep of each place but the clean one, (N,) int64."""
        return torch.arange(1, len(self.alphas_cumprod)) * self.spacing - 1

    def find_places(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the places of timesteps on the grid, (B,) int64."""
        return (timesteps + 1) // self.spacing

    def find_phase_ends(self, places: torch.Tensor) -> torch.Tensor:
        """Returns the place at which the phase of each place > 0 ends, towards the picture, (B,) int64."""
        length = (len(self.alphas_cumprod) - 1) // self.phases
        return (places - 1) // length * length

    def to_timesteps(self, places: torch.Tensor) -> torch.Tensor:
        """Returns the timesteps of places, (B,) int64; 0 for the clean picture, where no network is asked."""
        return (places * self.spacing - 1).clamp_min(0)

    def step(
        self, sample: torch.Tensor, prediction: torch.Tensor, start: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        """Returns the samples after one DDIM step (arXiv 2010.02502, equation 12, without noise).

        Args:
            sample: at the places `start`, (B, C, h, w) float32.
            prediction: of the UNet there, of the same shape.
            start, end: places, (B,) int64.
        """
        alpha, sigma = self._alpha_sigma(start)
        if self.prediction_type == "epsilon":
            clean, noise = (sample - sigma * prediction) / alpha, prediction
        elif self.prediction_type == "v_prediction":
            clean, noise = alpha * sample - sigma * prediction, alpha * prediction + sigma * sample
        else:
            clean, noise = prediction, (sample - alpha * prediction) / sigma.clamp_min(1e-4)  # 0 at the clean place
        end_alpha, end_sigma = self._alpha_sigma(end)
        return end_alpha * clean + end_sigma * noise

    def jump(
        self, sample: torch.Tensor, prediction: torch.Tensor, start: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        """Returns what the consistency function makes of samples: one step to the end of their phase.

        The boundary condition, c_skip · sample + c_out · step, makes it the identity at the end itself. The arguments
        are those of `step`.
        """
        scaled = ((start - end) * self.spacing * TIMESTEP_SCALING).float().view(-1, 1, 1, 1)
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
        return c_skip * sample + c_out * self.step(sample, prediction, start, end)

    def find_reach(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Returns how far a step's end moves with the prediction: the size of its derivative, (B, 1, 1, 1) float32.

        Args:
            start, end: places, (B,) int64.
        """
        alpha, sigma = self._alpha_sigma(start)
        end_alpha, end_sigma = self._alpha_sigma(end)
        turned = (end_alpha * sigma - end_sigma * alpha).abs()
        if self.prediction_type == "epsilon":
            return turned / alpha
        return turned if self.prediction_type == "v_prediction" else turned / sigma

    def _alpha_sigma(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cumprod = self.alphas_cumprod.to(places.device)[places].view(-1, 1, 1, 1)
        return cumprod.sqrt(), (1 - cumprod).sqrt()


def make_trajectory(scheduler: Any, steps: int, phases: int, solver_steps: int) -> Trajectory:
    """Returns the trajectory of a noise schedule.

    Args:
        scheduler: a DDPM scheduler, see `make_training_scheduler`.
        steps: in which the model learns to draw.
        phases: 1 or `steps`.
        solver_steps: places of the grid.

    Raises:
        UsageError: the timesteps do not divide into the solver's steps, or those not into `steps`.
        ModelError: the model predicts noise where its schedule begins at pure noise, so that a first step does not
            exist.
    """
    cumprod, prediction_type = scheduler.alphas_cumprod.float(), scheduler.config.prediction_type
    if len(cumprod) % steps:
        dividing = [str(n) for n in range(1, MOST_FEW_STEPS + 1) if len(cumprod) % n == 0]
        expected = f"{', '.join(dividing[:-1])} or {dividing[-1]}"
        raise UsageError(f"{steps} steps do not divide {len(cumprod)} timesteps", expected=expected)
    if len(cumprod) % solver_steps or solver_steps % steps:
        fitting = [str(n) for n in range(steps, len(cumprod) + 1, steps) if len(cumprod) % n == 0]
        raise UsageError(
            f"{solver_steps} solver steps do not divide {len(cumprod)} timesteps into {steps} equal phases",
            expected=f"solver_steps of {', '.join(fitting)}",
            hint="--set solver_steps=40, which fits 1, 2, 4, 5 and 8 steps",
        )
    if prediction_type == "epsilon" and float(cumprod[-1]) == 0:
        raise ModelError(
            "the model predicts noise, and its first timestep is pure noise (rescale_betas_zero_snr)",
            expected="a model with v-prediction, or a noise schedule without zero terminal SNR",
        )
    spacing = len(cumprod) // solver_steps
    grid = torch.cat([torch.ones(1), cumprod[torch.arange(1, solver_steps + 1) * spacing - 1]])
    return Trajectory(grid, spacing, phases, prediction_type)
