"""Single files that sdcompress writes are read back with equal output, by sdcompress and by diffusers, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import StorageError

from sdcompress.checkpoints.ldm_keys import METADATA_KEY
from sdcompress.checkpoints.read import load_single_file
from sdcompress.checkpoints.weights import open_weights
from sdcompress.checkpoints.write import write_ldm
from sdcompress.families.registry import family_of
from sdcompress.families.sampling_defaults import SamplingDefaults, sampling_defaults, set_defaults
from sdcompress.models import nano
from sdcompress.models.load import load_pipeline
from sdcompress.models.locate import read_unet_config
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student

from .small_models import BETAS, assert_equal, by_diffusers, with_unet


def test_nano_in_one_file_gives_equal_output_through_diffusers_and_sdcompress(tmp_path: Path) -> None:
    original = load_pipeline("nano")
    file = write_ldm(original.pipeline, tmp_path / "nano.safetensors", torch.float32)
    loaded = load_pipeline(file)
    assert loaded.name == "nano"
    assert loaded.folder == file
    assert loaded.sha256 != original.sha256
    assert_equal(original.pipeline, loaded.pipeline)
    assert_equal(original.pipeline, by_diffusers(file, nano.teacher_folder()))
    caption = "a flat icon of a cat"
    assert loaded.pipeline.tokenizer(caption).input_ids == original.pipeline.tokenizer(caption).input_ids
    assert loaded.pipeline.vae.config.scaling_factor == original.pipeline.vae.config.scaling_factor
    assert type(loaded.pipeline.scheduler) is type(original.pipeline.scheduler)


@pytest.mark.parametrize("preset", ["bk-base", "bk-small", "bk-tiny"])
def test_a_student_in_one_file_gives_equal_output(preset: str, random_pipeline: Any, tmp_path: Path) -> None:
    student = with_unet(
        random_pipeline, build_student(random_pipeline.unet, make_plan(random_pipeline.unet.config, preset))
    )
    file = write_ldm(student, tmp_path / "student.safetensors", torch.float32)
    config = read_unet_config(file)
    assert family_of(config).student_of(config) == preset
    assert_equal(student, load_single_file(file))
    student.save_pretrained(tmp_path / "folder")
    assert_equal(student, by_diffusers(file, tmp_path / "folder"))


def test_an_sd2_model_in_one_file_gives_equal_output(sd2_pipeline: Any, tmp_path: Path) -> None:
    file = write_ldm(sd2_pipeline, tmp_path / "sd2.safetensors", torch.float32)
    loaded: Any = load_single_file(file)
    assert_equal(sd2_pipeline, loaded)
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert loaded.scheduler.config.rescale_betas_zero_snr
    assert loaded.tokenizer("cat", padding="max_length", max_length=5).input_ids == [49406, 2368, 49407, 0, 0]
    sd2_pipeline.save_pretrained(tmp_path / "folder")
    assert_equal(sd2_pipeline, by_diffusers(file, tmp_path / "folder"))
    assert {"v_pred", "ztsnr"} <= open_weights(file).shapes.keys()


def test_an_sdxl_model_in_one_file_gives_equal_output(sdxl_pipeline: Any, tmp_path: Path) -> None:
    file = write_ldm(sdxl_pipeline, tmp_path / "sdxl.safetensors", torch.float32)
    loaded: Any = load_single_file(file)
    assert_equal(sdxl_pipeline, loaded)
    assert loaded.tokenizer_2.pad_token_id == 0
    sdxl_pipeline.save_pretrained(tmp_path / "folder")
    assert_equal(sdxl_pipeline, by_diffusers(file, tmp_path / "folder", "StableDiffusionXLPipeline"))


def test_the_file_holds_no_path_of_the_machine_that_wrote_it(random_folder: Path, tmp_path: Path) -> None:
    file = write_ldm(load_pipeline(random_folder).pipeline, tmp_path / "a.safetensors")
    assert str(random_folder) not in open_weights(file).metadata[METADATA_KEY]


def test_a_write_that_fails_leaves_nothing(random_pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        write_ldm(random_pipeline, tmp_path / "file/a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_few_step_model_in_one_file_keeps_its_steps_and_says_what_to_choose(
    random_pipeline: Any, tmp_path: Path
) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False, steps_offset=1)
    few = type(random_pipeline)(
        **(random_pipeline.components | {"scheduler": scheduler, "requires_safety_checker": False})
    )
    set_defaults(few, 4, 1.0)
    file = write_ldm(few, tmp_path / "few.safetensors")
    assert open_weights(file).metadata["modelspec.usage_hint"] == (
        "4 steps, CFG 1; AUTOMATIC1111 and Forge: Euler, Simple; ComfyUI: euler, simple"
    )
    loaded: Any = load_single_file(file)
    assert sampling_defaults(loaded) == SamplingDefaults(4, 1.0, is_few_step=True)
    assert type(loaded.scheduler) is DDIMScheduler
    assert "modelspec.usage_hint" not in open_weights(write_ldm(random_pipeline, tmp_path / "a.safetensors")).metadata
