"""What graphs return is what diffusers' own classes return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sdcompress_engines.outputs import LatentDistribution


@pytest.mark.parametrize("generators", ["one", "each", "none"])
def test_latents_are_drawn_as_diffusers_draws_them(generators: str) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.utils.torch_utils import randn_tensor

    parameters = 20 * torch.randn(3, 8, 4, 4)
    latents, expected = LatentDistribution(parameters), DiagonalGaussianDistribution(parameters)
    assert torch.equal(latents.mode(), expected.mode())

    def seeds() -> Any:
        return {
            "one": torch.Generator().manual_seed(3),
            "each": [torch.Generator().manual_seed(i) for i in range(3)],
            "none": None,
        }[generators]

    torch.manual_seed(9)
    truth = expected.mean + expected.std * randn_tensor(expected.mean.shape, generator=seeds())
    torch.manual_seed(9)
    assert torch.equal(latents.sample(seeds()), truth)
