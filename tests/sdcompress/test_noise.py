"""What a network is trained to predict: as the teacher's own sampler reads it, or the training is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from sdcompress_engines.errors import ModelError
from sdcompress_engines.signature import signature

from sdcompress.families.build import build_scheduler
from sdcompress.families.schemas.scheduler import SCHEDULERS
from sdcompress.train.batches import Batches
from sdcompress.train.config import TrainConfig
from sdcompress.train.pipelines import check_trainable, make_training_scheduler

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


class OneLatent:
    """A stand-in for a cache: four pictures, all with these latents and no spread."""

    views = 1
    buckets = torch.zeros(4, dtype=torch.long)
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))

    def sample(self, *arguments: Any, **options: Any) -> Any:
        text = torch.zeros(77, 6)
        return SimpleNamespace(mean=self.latents, std=torch.zeros(4, 1, 1), text=text, pooled=None, ids=None)


def make_batch(scheduler: Any, **settings: Any) -> Any:
    cache: Any = OneLatent()
    batches = Batches(cache, make_training_scheduler(scheduler), 0.5, TrainConfig(batch_size=4, **settings))
    return batches.make_batch(range(4))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_sampler_that_is_given_the_target_finds_the_latents(prediction_type: str) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction_type, clip_sample=False, **BETAS)
    batch = make_batch(scheduler)
    scheduler.set_timesteps(1000)
    for sample, timestep, target in zip(batch.sample, batch.timesteps, batch.target, strict=True):
        found = scheduler.step(target, timestep, sample).pred_original_sample
        assert torch.allclose(found, 0.5 * OneLatent.latents, atol=2e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weighs_the_error_of_the_latents_by_the_smaller_of_snr_and_gamma(prediction_type: str) -> None:
    """arXiv 2303.09556, section 3.4. `error` is what an error of one of the network makes of the latents."""
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction_type, clip_sample=False, **BETAS)
    batch = make_batch(scheduler, snr_gamma=5.0)
    scheduler.set_timesteps(1000)
    for sample, timestep, target, weight in zip(
        batch.sample.double(), batch.timesteps, batch.target.double(), batch.weight, strict=True
    ):
        right, wrong = (scheduler.step(each, timestep, sample).pred_original_sample for each in (target, target + 1))
        error = float((wrong - right).square().mean())
        alpha = float(scheduler.alphas_cumprod[timestep])
        assert float(weight) == pytest.approx(min(alpha / (1 - alpha), 5) * error, rel=1e-3)


@pytest.mark.parametrize(("prediction_type", "weight"), [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)])
def test_min_snr_has_its_limit_where_the_schedule_ends_in_pure_noise(prediction_type: str, weight: float) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True, **BETAS)
    cache: Any = OneLatent()
    batches = Batches(cache, make_training_scheduler(scheduler), 0.5, TrainConfig(batch_size=4, snr_gamma=5.0))
    assert batches._weigh(torch.tensor([999])).tolist() == [weight]


@pytest.mark.parametrize(
    ("name", "config", "kind"),
    [
        ("EDMEulerScheduler", {"sigma_data": 0.5}, "EDM"),
        ("EDMDPMSolverMultistepScheduler", {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}, "EDM"),
        ("EulerDiscreteScheduler", BETAS | {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "EDM"),
        ("DPMSolverMultistepScheduler", BETAS | {"use_flow_sigmas": True}, "flow matching"),
    ],
)
def test_noise_without_numbered_timesteps_is_refused(
    name: str, config: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    scheduler = build_scheduler(config, tmp_path, name)
    with pytest.raises(ModelError, match=rf"the noise of {name} \({kind}\) cannot be trained"):
        make_training_scheduler(scheduler)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("PNDMScheduler", {"prediction_type": "sample"}, "does not load .*prediction_type given as sample"),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, "not implemented yet: sample"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "does not load"),
        (  # the noise is divided by the amplitude of the latents, which is 0
            "DDIMScheduler",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "draws numbers that are not finite",
        ),
    ],
)
def test_a_scheduler_that_cannot_draw_is_refused_before_training(
    name: str, config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        build_scheduler(BETAS | config, tmp_path, name)


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"DPMSolverSDEScheduler"}))  # which needs torchsde
def test_every_scheduler_with_stable_diffusions_noise_is_accepted_and_draws_no_random_number(
    name: str, tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    for prediction_type in ("epsilon", "v_prediction"):
        config = BETAS | {"prediction_type": prediction_type, "steps_offset": 1, "skip_prk_steps": True}
        build_scheduler(config, tmp_path, name)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_unet_that_takes_the_guidance_scale_is_refused(random_pipeline: Any) -> None:
    """Of a latent consistency model: its pipeline gives the UNet an embedding of the guidance scale."""
    config = random_pipeline.unet.config | {"time_cond_proj_dim": 256}
    check_trainable(random_pipeline)
    with pytest.raises(ModelError, match="takes the guidance scale"):
        check_trainable(SimpleNamespace(scheduler=random_pipeline.scheduler, unet=SimpleNamespace(config=config)))
    with pytest.raises(ModelError, match=r"takes the guidance scale as an input .*, which its graph would lack"):
        signature("unet", config)
