"""Pictures through the WebUI extension equal diffusers'.

The host is written from A1111's contracts. The graphs are real and run in ONNX Runtime.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import EngineError
from sdcompress_engines.exactness import relative_l2
from sdcompress_webui.menu import PREFIX

from .places import WEBUI_PLUGIN
from .webui_cases import (
    ROUNDING,
    TITLE,
    expected,
    noise,
    sample,
    words,
)
from .webui_host import WebUI, running
from .webui_sampling import reference


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("cond_tokens", "uncond_tokens"), [(77, 77), (154, 154), (154, 77)])
def test_every_step_through_the_plugin_equals_the_students(
    webui: WebUI, student_unet: Any, random_pipeline: Any, together: bool, cond_tokens: int, uncond_tokens: int
) -> None:
    asked = {"cond": words(1, cond_tokens), "uncond": words(2, uncond_tokens), "together": together}
    webui.opts.sd_unet = TITLE
    latents, steps, job = sample(webui, **asked)
    wanted, wanted_steps = expected(student_unet, **asked)
    assert len(steps) == 4
    assert max(relative_l2(step, other) for step, other in zip(steps, wanted_steps, strict=True)) < ROUNDING
    assert relative_l2(latents, wanted) < ROUNDING
    assert relative_l2(latents, expected(random_pipeline.unet, **asked)[0]) > 0.05  # not the checkpoint's
    assert job.extra_generation_params == {"sdcompress": TITLE}
    assert not webui.errors


def test_guidance_may_leave_the_negative_prompt_out(webui: WebUI, student_unet: Any) -> None:
    asked = {"cond": words(1), "uncond": words(2), "skip_uncond": lambda step: step % 2 == 1}
    webui.opts.sd_unet = TITLE
    assert relative_l2(sample(webui, **asked)[0], expected(student_unet, **asked)[0]) < ROUNDING


def test_hires_fix_goes_through_two_sizes(webui: WebUI, student_unet: Any) -> None:
    asked = {"cond": words(1), "uncond": words(2), "steps": 2}
    webui.opts.sd_unet = TITLE

    def enlarge(latents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latents, scale_factor=2.0) + noise(32, 32) * 0.3

    found = sample(webui, x=enlarge(sample(webui, **asked)[0]), **asked)[0]
    assert found.shape[-2:] == (32, 32)
    assert (
        relative_l2(found, expected(student_unet, x=enlarge(expected(student_unet, **asked)[0]), **asked)[0]) < ROUNDING
    )


def test_the_prediction_has_the_dtype_of_the_latents(webui: WebUI, student_unet: Any) -> None:
    webui.opts.sd_unet = TITLE
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 96)
    with webui.job():
        out = webui.predict(x.half(), torch.tensor([500.0, 3.5]).half(), context.half())
    assert out.dtype is torch.float16
    assert (
        relative_l2(
            out.float(), reference(student_unet)(x.half().float(), torch.tensor([500.0, 3.5]), context.half().float())
        )
        < 1e-3
    )


def test_none_is_the_checkpoints_own_unet_again(webui: WebUI, random_pipeline: Any) -> None:
    asked = {"cond": words(1), "uncond": words(2), "steps": 2}
    webui.opts.sd_unet = TITLE
    sample(webui, **asked)
    webui.opts.sd_unet = "None"
    assert torch.equal(sample(webui, **asked)[0], expected(random_pipeline.unet, **asked)[0])


def test_deactivating_closes_what_is_open(webui: WebUI) -> None:
    webui.opts.sd_unet = TITLE
    sample(webui, cond=words(1), uncond=words(2), steps=1)
    hosted = webui.sd_unet.current_unet.hosted
    runner = next(iter(hosted.engines.runners.values()))
    webui.opts.sd_unet = "None"
    webui.apply_unet()
    assert not hosted.engines.runners
    with pytest.raises(EngineError, match="not open"):
        runner.infer({})


@pytest.mark.slow
def test_sdxl_takes_its_added_vector(tmp_path: Path, export_unet: Callable[..., Path], xl: Any) -> None:
    shutil.copytree(export_unet("webui", xl, "xl"), tmp_path / "models" / "sdcompress" / "xl")
    x, context, y, times = (
        torch.randn(2, 4, 16, 24),
        torch.randn(2, 77, 64),
        torch.randn(2, 80),
        torch.tensor([900.0, 10.0]),
    )
    with running(WebUI(tmp_path, xl.unet)) as host:
        host.load_extension(WEBUI_PLUGIN)
        host.opts.sd_unet = f"{PREFIX}xl (onnxruntime fp32)"
        with host.job():
            assert relative_l2(host.predict(x, times, context, y), reference(xl.unet)(x, times, context, y)) < ROUNDING
            with pytest.raises(EngineError, match="gives no y"):
                host.predict(x, times, context)
