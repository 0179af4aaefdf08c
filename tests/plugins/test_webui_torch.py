"""Torch runs the engine's own weights if no engine serves a call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import ArtifactError, EngineError
from sdcompress_engines.exactness import relative_l2
from sdcompress_webui.engine_folders import Artifact
from sdcompress_webui.torch_unet import TorchUNet
from sdcompress_webui.traits import is_whole
from sdcompress_webui.weights import find_weights, read_tensors, read_unet

from sdcompress.checkpoints.ldm_keys import unet_keys
from sdcompress.prune.presets import make_plan

from .webui_cases import (
    ROUNDING,
    TITLE,
    PlainHost,
    add_weights,
    call_unet,
    host_unet,
    noise,
    ranges,
    sample,
    words,
)
from .webui_host import WebUI
from .webui_sampling import Guidance, euler, reference, schedule


def test_torch_runs_the_students_own_weights_and_reports_it_once(
    webui: WebUI, installed: Path, student_unet: Any, random_pipeline: Any
) -> None:
    add_weights(installed / "models" / "sdcompress" / "tiny", student_unet)
    webui.opts.sd_unet, webui.opts.sdcompress_fallback = TITLE, "torch"
    asked = {
        "cond": words(1),
        "uncond": words(2),
        "x": noise(17, 20),
    }  # no multiple of four latents: torch takes it, as A1111's own UNet does
    latents, _, job = sample(webui, **asked)
    ldm = TorchUNet(
        {name: student_unet.state_dict()[key] for key, name in unet_keys(student_unet.state_dict()).items()},
        student_unet.config,
        "cpu",
        torch.float32,
    )
    assert (
        relative_l2(latents, euler(Guidance(ldm), noise(17, 20), schedule(4), asked["cond"], asked["uncond"]))
        < ROUNDING
    )
    assert len(job.comments) == 1
    assert "height 136 px" in job.comments[0]
    assert "with the same weights" in job.comments[0]


def test_without_weights_there_is_nothing_to_fall_back_to(tiny: Artifact) -> None:
    unet = host_unet(replace(tiny, profiles=(ranges((2, 2, 2), (128, 128, 128)),)), "torch")
    with pytest.raises(EngineError, match=r"no weights of this model.*checkpoint's own UNet is another model"):
        call_unet(unet, px=256)


def test_weights_of_another_model_are_detected(tiny: Artifact, student_unet: Any, random_pipeline: Any) -> None:
    import copy

    other = copy.deepcopy(student_unet)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * torch.randn_like(weight)
    narrow = replace(tiny, profiles=(ranges((2, 2, 2), (128, 128, 128)),))
    add_weights(tiny.folder, other)
    with pytest.raises(EngineError, match="these weights are not the engine's"):
        call_unet(host_unet(narrow, "torch"), px=256)
    add_weights(tiny.folder, student_unet)
    host = PlainHost()
    assert call_unet(host_unet(narrow, "torch", host), px=256).shape == (2, 4, 32, 32)
    assert len(host.warnings) == 1


def test_a_whole_ldm_file_serves_as_weights(tiny: Artifact, student_unet: Any, random_pipeline: Any) -> None:
    from sdcompress.checkpoints.write import write_ldm

    kept, random_pipeline.unet = random_pipeline.unet, student_unet
    try:
        write_ldm(random_pipeline, tiny.folder / "student.safetensors", torch.float32)
    finally:
        random_pipeline.unet = kept
    assert find_weights(tiny.folder) == tiny.folder / "student.safetensors"
    found, state = read_unet(tiny.folder / "student.safetensors"), student_unet.state_dict()
    assert dict.fromkeys(found, True) == {
        name: torch.equal(found[name], state[key]) for key, name in unet_keys(state).items()
    }


@pytest.mark.parametrize("plan", [None, "bk-base", "bk-small", "bk-tiny"])
def test_the_torch_unet_equals_diffusers(random_pipeline: Any, plan: str | None) -> None:
    from diffusers import UNet2DConditionModel

    config = dict(random_pipeline.unet.config)
    unet = (
        random_pipeline.unet
        if plan is None
        else UNet2DConditionModel.from_config(make_plan(config, plan).student_config()).eval()
    )
    names = unet_keys(unet.state_dict())
    assert is_whole(dict(unet.config)) == (plan is None)
    module = TorchUNet(
        {names[key]: value for key, value in unet.state_dict().items()}, unet.config, "cpu", torch.float32
    )
    x, times, context = torch.randn(2, 4, 16, 24), torch.tensor([999.0, 20.5]), torch.randn(2, 154, 96)
    assert relative_l2(module(x, times, context), reference(unet)(x, times, context)) < ROUNDING


def test_the_torch_unet_equals_diffusers_for_sdxl(xl_unet: Any) -> None:
    names = unet_keys(xl_unet.state_dict())
    module = TorchUNet(
        {names[key]: value for key, value in xl_unet.state_dict().items()}, xl_unet.config, "cpu", torch.float32
    )
    x, times, context, y = (
        torch.randn(2, 4, 16, 24),
        torch.tensor([999.0, 20.5]),
        torch.randn(2, 77, 64),
        torch.randn(2, 80),
    )
    assert relative_l2(module(x, times, context, y), reference(xl_unet)(x, times, context, y)) < ROUNDING


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_a_cut_file_of_weights_is_an_error(tmp_path: Path, student_unet: Any, keep: int) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(4000)}, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="not a readable safetensors"):
        read_tensors(tmp_path / "w.safetensors")
