"""Distances that see what they must see: a scaled weight, a shifted picture, equal tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sdcompress_bench import fidelity
from sdcompress_bench.fidelity import Probe


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)


@pytest.fixture(scope="module")
def probe() -> Probe:
    noise = torch.Generator().manual_seed(0)
    return Probe(torch.randn(2, 2, 4, 8, 8, generator=noise), (1, 901), torch.randn(2, 77, 16, generator=noise))


def test_scaled_weights_show_in_relative_l2_and_hide_from_cosine(pipeline: Any, probe: Probe) -> None:
    scaled = copy.copy(pipeline)
    scaled.unet = copy.deepcopy(pipeline.unet)
    with torch.no_grad():
        scaled.unet.conv_out.weight.mul_(1.02)
        scaled.unet.conv_out.bias.mul_(1.02)
    reference = fidelity.predict(pipeline, probe)
    same, off = (fidelity.compare_steps(fidelity.predict(p, probe), reference, probe.timesteps) for p in (pipeline, scaled))
    assert [s.relative_l2 for s in same] == [0.0, 0.0]
    assert [s.psnr_db for s in same] == [fidelity.PSNR_CAP_DB] * 2
    for step in off:
        assert step.relative_l2 == pytest.approx(0.02, rel=1e-3)
        assert step.cosine > 0.9999
    assert fidelity.gate(max(s.relative_l2 for s in same), None)["passed"]
    assert not fidelity.gate(max(s.relative_l2 for s in off), None)["passed"]


def test_lower_precision_is_held_against_its_own_noise_floor() -> None:
    assert fidelity.gate(0.0019, noise_floor=0.001)["passed"]
    assert not fidelity.gate(0.0021, noise_floor=0.001)["passed"]


def test_probe_is_noised_more_at_later_timesteps_and_repeats(pipeline: Any) -> None:
    images = [Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "red")]
    first, again = (fidelity.make_probe(pipeline, images, ["a cat", "a dog"], [1, 999], seed=4) for _ in range(2))
    assert first.latents.shape == (2, 2, 4, 8, 8)
    assert first.encoder_hidden_states.shape == (2, 77, 16)
    assert torch.equal(first.latents, again.latents)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    assert fidelity.relative_l2(first.latents[1], noise) < 0.2 < fidelity.relative_l2(first.latents[0], noise)


def test_psnr_of_a_known_error() -> None:
    reference = torch.zeros(3, 16, 16)
    assert fidelity.psnr_db(reference + 0.1, reference, data_range=1.0) == pytest.approx(20.0)


def test_equal_pictures_have_ssim_one_and_a_finite_psnr() -> None:
    noise = (torch.rand(48, 48, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    image = Image.fromarray(noise)
    (error,) = fidelity.compare_pictures([image], [image])
    assert error.ssim == pytest.approx(1.0, abs=1e-12)
    assert error.psnr_db == fidelity.PSNR_CAP_DB


def test_ssim_falls_with_noise_and_is_symmetric() -> None:
    random = torch.Generator().manual_seed(1)
    image = torch.rand(3, 32, 32, generator=random)
    near, far = (image + strength * torch.randn(3, 32, 32, generator=random) for strength in (0.05, 0.5))
    assert 1 > fidelity.ssim(near, image) > fidelity.ssim(far, image)
    assert fidelity.ssim(near, image) == pytest.approx(fidelity.ssim(image, near))


def test_ssim_of_flat_pictures_is_the_luminance_term() -> None:
    dark, light = torch.full((1, 16, 16), 0.25), torch.full((1, 16, 16), 0.75)
    assert fidelity.ssim(dark, light) == pytest.approx((2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4), rel=1e-6)
