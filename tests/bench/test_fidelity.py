"""Distances detect a scaled weight and a shifted picture, and are zero for equal tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sdcompress_bench import fidelity
from sdcompress_bench.fidelity import Probe
from sdcompress_engines.exactness import relative_l2


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)


@pytest.fixture(scope="module")
def probe() -> Probe:
    noise = torch.Generator().manual_seed(0)
    return Probe(torch.randn(2, 2, 4, 8, 8, generator=noise), (1, 901), torch.randn(2, 77, 16, generator=noise))


def test_scaled_weights_change_relative_l2_but_not_the_cosine(pipeline: Any, probe: Probe) -> None:
    scaled = copy.copy(pipeline)
    scaled.unet = copy.deepcopy(pipeline.unet)
    with torch.no_grad():
        scaled.unet.conv_out.weight.mul_(1.02)
        scaled.unet.conv_out.bias.mul_(1.02)
    reference = fidelity.predict(pipeline, probe)
    same, off = (
        fidelity.compare_steps(fidelity.predict(p, probe), reference, probe.timesteps) for p in (pipeline, scaled)
    )
    assert [s.relative_l2 for s in same] == [0.0, 0.0]
    assert [s.psnr_db for s in same] == [fidelity.PSNR_CAP_DB] * 2
    for step in off:
        assert step.relative_l2 == pytest.approx(0.02, rel=1e-3)
        assert step.cosine > 0.9999
    assert fidelity.gate(max(s.relative_l2 for s in same), None)["passed"]
    assert not fidelity.gate(max(s.relative_l2 for s in off), None)["passed"]


def test_the_limit_of_a_lower_precision_is_twice_its_noise_floor() -> None:
    assert fidelity.gate(0.0019, noise_floor=0.001)["passed"]
    assert not fidelity.gate(0.0021, noise_floor=0.001)["passed"]


def test_each_timestep_has_its_own_limit() -> None:
    def steps_with(*errors: float) -> list[fidelity.StepError]:
        return [fidelity.StepError(t, error, 1.0, 60.0) for t, error in zip((1, 501, 999), errors, strict=True)]

    floors = steps_with(0.03, 0.004, 0.003)
    sound = fidelity.gate_steps(steps_with(0.03, 0.006, 0.003), floors)
    assert (sound["passed"], sound["timestep"], sound["error"], sound["limit"]) == (True, 501, 0.006, 0.008)
    assert sound["limits"] == [0.06, 0.008, 0.006]
    hidden = fidelity.gate_steps(steps_with(0.03, 0.009, 0.003), floors)
    assert (hidden["passed"], hidden["timestep"]) == (False, 501)
    assert fidelity.gate_steps(steps_with(1e-6, 2e-6, 3e-6), None)["limit"] == 1e-4
    for bad in (float("nan"), float("inf")):
        assert not fidelity.gate_steps(steps_with(0.01, bad, 0.001), floors)["passed"]
        assert not fidelity.gate_steps(steps_with(0.01, bad, 0.001), None)["passed"]


def test_probe_is_noised_more_at_later_timesteps_and_repeats(pipeline: Any) -> None:
    images = [Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "red")]
    first, again = (fidelity.make_probe(pipeline, images, ["a cat", "a dog"], [1, 999], seed=4) for _ in range(2))
    assert first.latents.shape == (2, 2, 4, 8, 8)
    assert first.encoder_hidden_states.shape == (2, 77, 16)
    assert torch.equal(first.latents, again.latents)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    assert relative_l2(first.latents[1], noise) < 0.2 < relative_l2(first.latents[0], noise)


def test_an_error_that_is_not_finite_never_passes(pipeline: Any, probe: Probe) -> None:
    for value in (float("nan"), float("inf")):
        assert not fidelity.gate(value, None)["passed"]
        assert not fidelity.gate(value, 0.001)["passed"]
        output = probe.latents.clone()
        output[0, 0, 0, 0, 0] = value
        assert fidelity.compare_steps(output, probe.latents, probe.timesteps)[0].psnr_db == -fidelity.PSNR_CAP_DB
    assert not fidelity.gate(0.5, float("inf"))["passed"]
    broken = copy.copy(pipeline)
    broken.unet = copy.deepcopy(pipeline.unet)
    with torch.no_grad():
        broken.unet.conv_out.bias[0] = float("nan")
    steps = fidelity.compare_steps(fidelity.predict(broken, probe), fidelity.predict(pipeline, probe), probe.timesteps)
    assert not fidelity.gate(fidelity.distance(steps, [])["relative_l2"], None)["passed"]


def test_equal_pictures_have_ssim_one_and_a_finite_psnr() -> None:
    noise = (torch.rand(48, 48, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    image = Image.fromarray(noise)
    (error,) = fidelity.compare_pictures([image], [image])
    assert error.ssim == pytest.approx(1.0, abs=1e-12)
    assert error.psnr_db == fidelity.PSNR_CAP_DB
    assert error.lpips is None


def test_random_weights_are_probed_with_noise(pipeline: Any) -> None:
    probe = fidelity.make_random_probe(pipeline, 64, ["a cat"], [1, 999], seed=3)
    assert probe.latents.shape == (2, 1, 4, 8, 8)
    assert fidelity.predict(pipeline, probe).shape == (2, 1, 4, 8, 8)
