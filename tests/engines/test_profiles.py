"""Typed shapes become the shapes of tensors, and impossible ones are refused with the nearest possible ones."""

from __future__ import annotations

import re

import pytest
from sdcompress_engines import profiles
from sdcompress_engines.errors import UsageError
from sdcompress_engines.profiles import (
    GUIDANCE_FREE_PRESET,
    PRESETS,
    Profile,
    ShapeRanges,
    check_ranges,
    component_profile,
    format_range,
    parse_profile,
    parse_range,
)
from sdcompress_engines.signature import HOSTS

from sdcompress.cli import _export_options as export_options

UNET = {"in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
SDXL = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {"block_out_channels": (128, 256, 512, 512), "in_channels": 3, "out_channels": 3, "latent_channels": 4}


@pytest.mark.parametrize(
    ("text", "values"), [("512", (512, 512, 512)), ("512:768:1024", (512, 768, 1024)), ("1:1:1", (1, 1, 1))]
)
def test_a_range_is_read_and_written_alike(text: str, values: tuple[int, int, int]) -> None:
    assert parse_range(text) == values
    assert parse_range(format_range(values)) == values


@pytest.mark.parametrize("text", ["", "a", "1:2", "3:2:1", "0", "1:2:3:4", "-1", "1:3:2", "512x512", "1 : 2 : 3"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="MIN:OPT:MAX"):
        parse_range(text)


@pytest.mark.parametrize(("native", "step"), [(512, 64), (512, 32), (768, 64), (1024, 32), (128, 64), (64, 64)])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_every_model_it_is_relative_to(name: str, native: int, step: int) -> None:
    ranges = PRESETS[name].ranges(native, step)
    check_ranges(ranges, step)
    Profile({"any": ((*ranges.height[:1],), (*ranges.height[1:2],), (*ranges.height[2:],))})
    if PRESETS[name].relative:
        assert ranges.height[1] == native


def test_the_webui_preset_covers_what_a_webui_asks_for() -> None:
    """Cond and uncond apart (B) and together (2B), prompts of up to three parts, hires-fix at twice the size."""
    ranges = PRESETS["webui"].ranges(512, 64)
    for name, values in {
        "batch": (1, 2, 4, 8),
        "height": (512, 768, 1024),
        "width": (512, 768, 1024),
        "tokens": (77, 154, 231),
    }.items():
        least, _, most = getattr(ranges, name)
        assert all(least <= value <= most for value in values), name


def test_presets_with_one_shape_are_static_and_others_are_not() -> None:
    static = {name for name, preset in PRESETS.items() if ":" not in str(preset.ranges(512, 64))}
    assert static == {"few-step", "sd15-512", "sdxl-1024"}


def test_a_profile_is_a_preset_ranges_or_both() -> None:
    assert parse_profile("sd15-512", 512, 64) == PRESETS["sd15-512"].ranges(512, 64)
    both = parse_profile("webui,batch=1:2:4,height=512", 512, 64)
    assert both.batch == (1, 2, 4)
    assert both.height == both.width == (512, 512, 512)
    assert both.tokens == (77, 77, 231)
    assert parse_profile("height=512,width=512:768:1024", 512, 64).width == (512, 768, 1024)
    for wrong in ("sd15", "depth=3", "batch", "batch=", "webui,webui"):
        with pytest.raises(UsageError, match=re.escape(f"profile {wrong!r}")):
            parse_profile(wrong, 512, 64)


def test_without_guidance_the_vae_gets_as_many_pictures_as_the_unet_samples() -> None:
    one = parse_profile("few-step", 512, 64)
    assert (one.batch, one.vae_batch, one.height, one.tokens) == ((1,) * 3, (1,) * 3, (512,) * 3, (77,) * 3)
    four = parse_profile("batch=1:1:4", 512, 64, GUIDANCE_FREE_PRESET)
    assert (four.batch, four.vae_batch, four.height) == ((1, 1, 4), (1, 1, 4), (512,) * 3)
    assert parse_profile("batch=1:1:4,pictures=2", 512, 64, GUIDANCE_FREE_PRESET).vae_batch == (2, 2, 2)
    assert parse_profile("webui", 512, 64, GUIDANCE_FREE_PRESET) == parse_profile("webui", 512, 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"height": (500, 512, 512)}, "--height 512"),
        ({"width": (512, 520, 1024)}, "--width 512:512:1024"),
        ({"tokens": (77, 100, 154)}, "--tokens 77:77:154"),
    ],
)
def test_sizes_a_unet_has_no_place_for_are_refused_with_the_nearest(
    change: dict[str, tuple[int, int, int]], said: str
) -> None:
    ranges = ShapeRanges(
        **{"batch": (1, 1, 1), "height": (512, 512, 512), "width": (512, 512, 512), "tokens": (77, 77, 77)} | change
    )
    with pytest.raises(UsageError, match=f"{said}$"):
        check_ranges(ranges, 64)


def test_every_input_of_every_component_gets_a_shape() -> None:
    ranges = parse_profile("batch=1:2:8,height=512:512:1024,width=512:768:1024,tokens=77:77:154", 512, 64)
    unet = component_profile("unet", UNET, ranges, 8).shapes
    assert unet["sample"] == ((1, 4, 64, 64), (2, 4, 64, 96), (8, 4, 128, 128))
    assert unet["encoder_hidden_states"] == ((1, 77, 768), (2, 77, 768), (8, 154, 768))
    assert unet["timestep"] == ((1,), (2,), (8,))
    # A picture is two samples of the UNet under guidance, and one of the VAE.
    assert component_profile("vae_decoder", VAE, ranges, 8).shapes["latent_sample"] == (
        (1, 4, 64, 64),
        (1, 4, 64, 96),
        (4, 4, 128, 128),
    )
    assert component_profile("vae_encoder", VAE, ranges, 8).shapes["sample"][2] == (4, 3, 1024, 1024)
    assert component_profile("text_encoder", {"hidden_size": 768}, ranges, 8).shapes["input_ids"] == (
        (1, 77),
        (1, 77),
        (8, 77),
    )
    assert component_profile("unet", SDXL, ranges, 8, "comfyui").shapes["y"] == ((1, 2816), (2, 2816), (8, 2816))
    assert set(component_profile("unet", SDXL, ranges, 8).shapes) == {
        "sample",
        "timestep",
        "encoder_hidden_states",
        "text_embeds",
        "time_ids",
    }


def test_a_static_profile_stays_static() -> None:
    ranges = PRESETS["sd15-512"].ranges(512, 64)
    for component, config in (("unet", UNET), ("vae_decoder", VAE)):
        assert all(
            least == best == most
            for least, best, most in component_profile(component, config, ranges, 8).shapes.values()
        )


def test_the_command_offers_what_there_is() -> None:
    assert tuple(PRESETS) == export_options.PRESETS
    assert tuple(HOSTS) == export_options.HOSTS
    assert next(iter(PRESETS)) == profiles.DEFAULT_PRESET
