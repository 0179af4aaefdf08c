"""A family is added in one place: a registered one generates, is written, read and described with its own values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from sdcompress_engines.errors import UsageError

from sdcompress.checkpoints.read import load_single_file
from sdcompress.checkpoints.write import write_ldm
from sdcompress.cli.inspect import command as inspect
from sdcompress.families.family import Family
from sdcompress.families.registry import OTHER, family_of, family_of_pipeline, find_family, register, unregister
from sdcompress.families.stable_diffusion import SD1
from sdcompress.models.load import load_pipeline
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student
from sdcompress.sampling import generate
from sdcompress.support.pipeline import native_size_px

CHANNELS = [16, 32, 48]
TOY = replace(
    SD1,
    name="toy",
    title="Toy Diffusion",
    recognizes=lambda config: SD1.recognizes(config) and list(config["block_out_channels"])[:3] == CHANNELS,
    native_size_px=64,
    guidance_scale=3.0,
)


@pytest.fixture
def toy() -> Iterator[Family]:
    yield register(TOY)
    unregister(TOY.name)


@pytest.fixture
def toy_pipeline(toy: Family, random_pipeline: Any) -> Any:
    """A pipeline of the toy family with random weights."""
    torch.manual_seed(5)
    unet = UNet2DConditionModel(
        sample_size=toy.native_size_px // random_pipeline.vae_scale_factor,
        block_out_channels=(*CHANNELS, 48),
        cross_attention_dim=96,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return with_unet(random_pipeline, unet.eval())


def with_unet(pipeline: Any, unet: UNet2DConditionModel) -> Any:
    return type(pipeline)(**(pipeline.components | {"unet": unet}), requires_safety_checker=False)


def describe(path: Path) -> dict[str, Any]:
    """Returns the facts of `sdcompress inspect PATH --json`."""
    result = CliRunner().invoke(inspect, [str(path), "--json"], catch_exceptions=False)
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_it_recognizes_its_own_unets_and_no_others(toy: Family, toy_pipeline: Any, random_pipeline: Any) -> None:
    unet = toy_pipeline.unet.config
    assert family_of(unet) is toy
    assert family_of_pipeline("StableDiffusionPipeline", unet) is toy
    assert family_of(random_pipeline.unet.config).name == "nano"
    # A UNet that nobody recognizes has the published family of its pipeline class.
    assert family_of_pipeline("StableDiffusionPipeline", {}).name == "sd1"
    assert family_of_pipeline("StableDiffusionXLPipeline", unet).name == "sdxl"


def test_it_generates_with_its_own_guidance_and_size(toy: Family, toy_pipeline: Any) -> None:
    calls: list[dict[str, Any]] = []

    class Spy(type(toy_pipeline)):  # type: ignore[misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            calls.append(options)
            return super().__call__(*args, **options)

    spy = Spy(**toy_pipeline.components, requires_safety_checker=False)
    (picture,) = generate(spy, ["a cat"], seeds=[1], steps=2)
    assert [(call["guidance_scale"], call["height"], call["width"]) for call in calls] == [(3.0, 64, 64)]
    assert picture.size == (64, 64)
    assert native_size_px(toy_pipeline) == toy.native_size_px


def test_its_single_file_reads_back_with_equal_weights(toy_pipeline: Any, tmp_path: Path) -> None:
    file = write_ldm(toy_pipeline, tmp_path / "toy.safetensors", torch.float32)
    loaded = load_single_file(file)
    for name in ("unet", "vae", "text_encoder"):
        written, read = getattr(toy_pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        assert written.keys() == read.keys()
        assert all(torch.equal(written[key], read[key]) for key in written)
    facts = describe(file)
    assert (facts["family"], facts["student"]) == ("toy", None)
    assert facts["parameters"]["text_encoder"] == sum(p.numel() for p in toy_pipeline.text_encoder.parameters())


def test_inspect_names_it_for_a_folder_and_for_a_student(toy_pipeline: Any, tmp_path: Path) -> None:
    toy_pipeline.save_pretrained(tmp_path / "toy")
    assert describe(tmp_path / "toy")["family"] == "toy"
    plan = make_plan(toy_pipeline.unet.config, "bk-base")
    with_unet(toy_pipeline, build_student(toy_pipeline.unet, plan)).save_pretrained(tmp_path / "student")
    facts = describe(tmp_path / "student")
    assert (facts["student"], facts["student_of"]) == ("bk-base", "Toy Diffusion")


def test_its_text_encoders_are_no_others(random_folder: Path) -> None:
    projecting = replace(TOY, name="projecting", pipeline_class="Other", projected_text_encoders=("text_encoder",))
    register(projecting)
    try:
        assert type(load_pipeline(random_folder).pipeline.text_encoder).__name__ == "CLIPTextModel"
    finally:
        unregister(projecting.name)


def test_a_name_is_registered_once_and_a_built_in_family_stays(toy: Family) -> None:
    for taken in (toy, SD1, OTHER):
        with pytest.raises(UsageError, match=f"'{taken.name}' exists already"):
            register(taken)
    unregister("sd1")
    assert find_family("sd1") is SD1


def test_an_unregistered_family_is_forgotten(toy_pipeline: Any) -> None:
    unregister(TOY.name)
    assert family_of(toy_pipeline.unet.config) is SD1
