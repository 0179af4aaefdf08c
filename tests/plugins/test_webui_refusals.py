"""What an engine cannot do in a WebUI is refused with a message."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import EngineError, EngineMismatch
from sdcompress_engines.exactness import relative_l2
from sdcompress_webui.engine_folders import Artifact
from sdcompress_webui.menu import Model
from sdcompress_webui.panel import build_command
from sdcompress_webui.traits import Traits
from sdcompress_webui.unet import HostedUNet

from .webui_cases import (
    LAYER,
    ROUNDING,
    TITLE,
    PlainHost,
    call_unet,
    expected,
    host_unet,
    lora_of,
    ranges,
    sample,
    shapes,
    words,
)
from .webui_host import WebUI


def test_a_shape_without_engine_names_the_command_that_builds_one(tiny: Artifact) -> None:
    manifest = tiny.manifest
    config = {
        **manifest.config,
        "flavour": "tensorrt",
        "version": "10.14.1",
        "profiles": {"unet": [ranges((2, 2, 2), (128, 128, 128))]},
        "options": {"optimization_level": 4, "version_compatible": True},
    }
    built = replace(
        tiny,
        profiles=(ranges((2, 2, 2), (128, 128, 128)),),
        manifest=replace(
            manifest, kind="engine", config=config, inputs={**manifest.inputs, "lora style.safetensors:0.8": "0"}
        ),
    )
    unet = HostedUNet(Model("tiny", (replace(tiny, profiles=built.profiles),)), PlainHost())
    with pytest.raises(EngineMismatch, match=r"height 256 px.*tokens 154 is outside the engine's profile"):
        call_unet(unet, px=256, tokens=154)
    assert (
        build_command(built.manifest, shapes(2, 256, 154))
        == "sdcompress export MODEL --trt --flavour tensorrt --profile"
        " batch=2,height=128:128:256,width=128:128:256,tokens=77:77:154 --optimization-level 4 --version-compatible"
        " --signature webui --precision fp32 --lora style.safetensors:0.8 -o DIR"
    )


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"tokens": 81}, "81 tokens"),
        ({"control": {"input": []}}, "ControlNet"),
        ({"transformer_options": {"patches_replace": {"attn2": {}}}}, "patches_replace"),
        ({"y": torch.zeros(2, 8)}, "gives also y"),
    ],
)
def test_what_an_engine_cannot_take_is_refused_whatever_the_settings(
    tiny: Artifact, more: dict[str, Any], named: str
) -> None:
    for fallback in ("error", "torch"):
        with pytest.raises(EngineError, match=named):
            call_unet(host_unet(tiny, fallback), **more)


def test_a_size_between_the_steps_names_its_neighbours(tiny: Artifact) -> None:
    with pytest.raises(EngineMismatch, match=r"height 136 px; expected a multiple of 32 px.*128 or 160"):
        host_unet(tiny).forward(torch.randn(1, 4, 17, 16), torch.tensor([1.0]), torch.randn(1, 77, 96))


@pytest.mark.parametrize(
    ("loaded", "named"),
    [
        (Traits(768, 0, 4, "epsilon"), "width 96.*has 768.*SD1"),
        (Traits(96, 2816, 4, "epsilon"), "SDXL"),
        (Traits(96, 0, 9, "epsilon"), "channels: 4"),
        (Traits(96, 0, 4, "v_prediction"), "prediction type epsilon"),
    ],
)
def test_another_checkpoint_is_refused_when_the_engine_is_chosen_and_at_every_call(
    tiny: Artifact, loaded: Traits, named: str
) -> None:
    host = PlainHost()
    host.loaded = ("other", loaded)
    unet = host_unet(tiny, "torch", host)
    for attempt in (unet.activate, lambda: call_unet(unet)):
        with pytest.raises(EngineMismatch, match=named):
            attempt()
    host.loaded = ("fitting", replace(tiny.traits))
    call_unet(unet)  # no restart is needed
    host.loaded = ("other", loaded)
    with pytest.raises(EngineMismatch, match=named):
        call_unet(unet)


def test_a_checkpoint_kept_in_memory_is_checked_when_it_comes_back(webui: WebUI, xl_unet: Any) -> None:
    webui.opts.sd_unet = TITLE
    sample(webui, cond=words(1), uncond=words(2), steps=1)
    webui.load(xl_unet, name="xl")
    with pytest.raises(EngineMismatch, match="SDXL"), webui.job():
        webui.predict(torch.randn(2, 4, 16, 16), torch.ones(2), torch.randn(2, 77, 64), torch.randn(2, 80))


def test_a_lora_of_the_text_encoder_alone_is_left_to_the_host(
    webui: WebUI, student_unet: Any, random_pipeline: Any
) -> None:
    asked = {"cond": words(1), "uncond": words(2), "steps": 1}
    webui.opts.sd_unet = TITLE
    text_only = lora_of(random_pipeline.unet, [])
    text_only.modules["transformer_text_model_encoder_layers_0_mlp_fc1"] = object()
    sys.modules["networks"].loaded_networks += [text_only, lora_of(random_pipeline.unet, [LAYER], 0.0)]
    assert relative_l2(sample(webui, **asked)[0], expected(student_unet, **asked)[0]) < ROUNDING


def test_an_extension_that_replaces_the_unet_is_an_error(webui: WebUI, student_unet: Any) -> None:
    asked = {"cond": words(1), "uncond": words(2), "steps": 1}
    webui.opts.sd_unet = TITLE
    module = webui.sd_model.model.diffusion_model
    original, plain = module.forward, type(module).__mro__[1]

    def hooked(x: Any, timesteps: Any = None, context: Any = None, **kwargs: Any) -> Any:
        return plain.forward(module, x, timesteps, context, **kwargs)

    module.forward = hooked  # as ControlNet does
    with pytest.raises(EngineError, match="ControlNet"):
        sample(webui, **asked)
    module.forward = original  # ControlNet restores the class's own function on the instance
    assert relative_l2(sample(webui, **asked)[0], expected(student_unet, **asked)[0]) < ROUNDING
    del module.forward
    patched = type(module).forward
    type(module).forward = plain.forward  # on the class
    with pytest.raises(EngineError, match="own UNet instead"):
        sample(webui, **asked)
    type(module).forward = patched


def test_hypernetworks_and_tiling_are_refused(webui: WebUI) -> None:
    webui.opts.sd_unet, webui.opts.sdcompress_fallback = TITLE, "torch"
    sys.modules["modules.shared"].loaded_hypernetworks.append(SimpleNamespace(name="inky"))
    with pytest.raises(EngineError, match="hypernetwork inky"):
        sample(webui, cond=words(1), uncond=words(2))
    sys.modules["modules.shared"].loaded_hypernetworks.clear()
    webui.hijack.circular_enabled = True
    with pytest.raises(EngineError, match="tiling"):
        sample(webui, cond=words(1), uncond=words(2))


def test_a_refiner_is_refused(webui: WebUI, random_pipeline: Any) -> None:
    webui.opts.sd_unet, webui.opts.sdcompress_fallback = TITLE, "torch"
    x, times, context = torch.randn(2, 4, 16, 16), torch.ones(2), words(1).expand(2, -1, -1)
    with webui.job():
        webui.predict(x, times, context)
        webui.load(random_pipeline.unet, name="refiner")  # during a picture
        with pytest.raises(
            EngineError, match=r"checkpoint refiner in a picture that was started with teacher: turn off the refiner"
        ):
            webui.predict(x, times, context)
    with webui.job():  # the next picture begins with it
        webui.predict(x, times, context)
