"""Calibration rows cover timesteps, prompts and guidance evenly, and depend on the seed alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sdcompress_engines.errors import DataError, UsageError

from sdcompress.export.quantize.calibrate import collect_calibration, default_prompts, rename_for_host
from sdcompress.families.sampling_defaults import set_defaults
from sdcompress.train.config import FewStepConfig
from sdcompress.train.few_step import make_few_step_scheduler

CANONICAL = ("sample", "timestep", "encoder_hidden_states")


def test_calibration_covers_timesteps_prompts_and_both_halves(random_pipeline: Any) -> None:
    prompts = ["a cat", "a dog", "a house"]
    before = (random_pipeline.scheduler, dict(random_pipeline._progress_bar_config))
    rows = collect_calibration(random_pipeline, prompts, steps=4, samples=15, seed=3)
    assert {name: (value.shape, value.dtype) for name, value in rows.items()} == {
        "sample": ((15, 4, 16, 16), np.dtype("float32")),
        "timestep": ((15,), np.dtype("float32")),
        "encoder_hidden_states": ((15, 77, 96), np.dtype("float32")),
    }
    times, counts = np.unique(rows["timestep"], return_counts=True)
    assert times.tolist() == sorted(set(random_pipeline.scheduler.timesteps.tolist()))
    assert counts.max() <= 2 * counts.min()  # PNDM asks for one of its timesteps twice
    with torch.no_grad():
        contexts = {
            prompt: random_pipeline.encode_prompt(prompt, "cpu", 1, False)[0][0].numpy() for prompt in ("", *prompts)
        }
    drawn = [
        next(prompt for prompt, value in contexts.items() if np.allclose(value, row, atol=1e-5))
        for row in rows["encoder_hidden_states"]
    ]
    assert drawn.count("") in (7, 8)
    assert all(2 <= drawn.count(prompt) <= 3 for prompt in prompts)
    assert len(np.unique(np.concatenate([value.reshape(15, -1) for value in rows.values()], axis=1), axis=0)) == 15
    assert (random_pipeline.scheduler, dict(random_pipeline._progress_bar_config)) == before
    assert not random_pipeline.unet._forward_pre_hooks


def test_calibration_depends_on_the_seed_alone(random_pipeline: Any) -> None:
    first, again, other = (
        collect_calibration(random_pipeline, ["a cat"], steps=2, samples=4, seed=seed) for seed in (1, 1, 2)
    )
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["sample"], other["sample"])


def test_calibration_without_guidance_has_no_empty_prompt(random_pipeline: Any) -> None:
    rows = collect_calibration(random_pipeline, ["a cat"], steps=3, samples=4, guidance_scale=1.0)
    assert len(np.unique(rows["encoder_hidden_states"].reshape(4, -1), axis=0)) == 1


def test_more_samples_than_a_run_has_are_refused(random_pipeline: Any) -> None:
    with pytest.raises(DataError, match=r"at most 6\. Try: give at least 2 prompts"):
        collect_calibration(random_pipeline, ["a cat"], steps=2, samples=7)
    with pytest.raises(DataError, match="0 prompts"):
        collect_calibration(random_pipeline, [])
    assert not random_pipeline.unet._forward_pre_hooks


def test_rows_get_the_names_of_a_host(random_pipeline: Any) -> None:
    from diffusers.models.embeddings import Timesteps
    from sdcompress_engines.signature import HOSTS

    class Unet:
        add_time_proj = Timesteps(8, flip_sin_to_cos=True, downscale_freq_shift=0)

    xl: dict[str, np.ndarray] = dict.fromkeys(CANONICAL, np.zeros((8, 2), np.float32)) | {
        "text_embeds": np.ones((8, 5), np.float32),
        "time_ids": np.full((8, 6), 64, np.float32),
    }
    named = rename_for_host(xl, HOSTS["comfyui"]["unet"][0], Unet())
    assert list(named) == ["x", "timesteps", "context", "y"]
    assert named["y"].shape == (8, 5 + 6 * 8)
    assert named["y"][0, 5] == pytest.approx(np.cos(64.0), abs=1e-6)
    assert rename_for_host(xl, HOSTS["diffusers"]["unet"][0], Unet()).keys() == xl.keys()


def test_prompts_to_check_with_are_not_those_to_calibrate_with(random_pipeline: Any) -> None:
    calibration, held_out = default_prompts(random_pipeline)
    assert len(calibration) == 8
    assert not set(calibration) & set(held_out)


def test_a_few_step_model_is_calibrated_at_its_own_timesteps(random_pipeline: Any) -> None:
    parts = {name: part for name, part in random_pipeline.components.items() if name != "scheduler"}
    few: Any = type(random_pipeline)(
        **parts,
        scheduler=make_few_step_scheduler(random_pipeline.scheduler, FewStepConfig()),
        requires_safety_checker=False,
    )
    set_defaults(few, 4, 1.0)
    rows = collect_calibration(few, ["a cat", "a dog"])
    assert rows["sample"].shape[0] == 8
    assert set(rows["timestep"].tolist()) == {999.0, 749.0, 499.0, 249.0}
    with pytest.raises(UsageError, match="guidance 7 with a model that was trained for 4 steps without guidance"):
        collect_calibration(few, ["a cat"], guidance_scale=7.0)
