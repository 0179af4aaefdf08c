"""A data set that a few-step model draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.errors import ModelError, UsageError

from sdcompress.backends import assemble
from sdcompress.data.build_cache import build_cache
from sdcompress.data.sources import open_source
from sdcompress.families.sampling_defaults import set_defaults
from sdcompress.generate.dataset import generate_dataset
from sdcompress.generate.output_folder import METADATA
from sdcompress.generate.settings import GenerateSettings
from sdcompress.models.load import load_pipeline

PROMPTS = ["a flat icon of a cat", "a 3d render of a tree"]
SETTINGS = GenerateSettings(count=2, batch_size=2, steps=None, size_px=64, seed=3, picture_format="png")


@pytest.fixture(scope="module")
def few_step_folder(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with a few-step model's scheduler, four steps and no guidance as its own."""
    from diffusers import DDIMScheduler

    pipeline: Any = load_pipeline(random_folder).pipeline
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False, "steps_offset": 1}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **options)
    set_defaults(pipeline, 4, 1.0)
    folder = tmp_path_factory.mktemp("few") / "few-step"
    pipeline.save_pretrained(folder)
    return folder


def test_a_few_step_teacher_draws_with_its_own_steps_and_for_the_model_it_came_from(
    few_step_folder: Path, random_folder: Path, tmp_path: Path
) -> None:
    drawn = generate_dataset(few_step_folder, PROMPTS, tmp_path / "set", SETTINGS)
    rows = [json.loads(line) for line in (drawn.folder / METADATA).read_text().splitlines()]
    assert {(row["steps"], row["guidance_scale"]) for row in rows} == {(4, 1.0)}
    assert (drawn.manifest.config["steps"], drawn.manifest.config["guidance_scale"]) == (4, 1.0)
    assert build_cache(open_source(drawn.folder), load_pipeline(random_folder), tmp_path / "cache", 64).drawn == 2
    again = replace(SETTINGS, steps=4, guidance_scale=1.0)
    assert generate_dataset(few_step_folder, PROMPTS, drawn.folder, again).drawn == 0


def test_guidance_of_a_guidance_free_teacher_is_refused_before_it_is_loaded(
    few_step_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "open_pipeline", None)
    with pytest.raises(UsageError, match="guidance 7 with a model that was trained for 4 steps without guidance"):
        generate_dataset(few_step_folder, PROMPTS, tmp_path / "set", replace(SETTINGS, guidance_scale=7.0))
    assert not (tmp_path / "set").exists()


def test_a_teacher_with_a_small_decoder_draws_pictures_and_its_latents_are_refused(
    random_folder: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderTiny

    pipeline: Any = load_pipeline(random_folder).pipeline
    pipeline.register_modules(
        vae=AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    )
    pipeline.save_pretrained(tmp_path / "small")
    settings = replace(SETTINGS, steps=1)
    with pytest.raises(ModelError, match=r"has a small decoder in the place of its VAE.*--no-latents"):
        generate_dataset(tmp_path / "small", PROMPTS, tmp_path / "set", settings)
    assert not (tmp_path / "set").exists()
    drawn = generate_dataset(tmp_path / "small", PROMPTS, tmp_path / "set", replace(settings, latents=False))
    assert drawn.drawn == 2
