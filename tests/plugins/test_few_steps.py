"""A few-step student in A1111 and Forge draws the pictures that diffusers draws, with the settings that we name.

The latents begin with equal noise, and LCM adds equal noise at each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.few_steps import read_exported_few_steps
from sdcompress_engines.manifest import read_manifest
from sdcompress_webui.engine_folders import find_artifacts
from sdcompress_webui.panel import table_rows

from .few_step_cases import draw_by_diffusers, few_step_scheduler, make_few_step
from .places import WEBUI_PLUGIN
from .webui_cases import ROUNDING, TITLE, call_unet, host_unet, ranges, read_only_artifact, words
from .webui_few_steps import (
    LCM_TIMESTEPS,
    Denoiser,
    begin,
    lcm_denoiser,
    sample_euler,
    sample_lcm,
    sgm_uniform,
    simple,
    turbo,
)
from .webui_host import WebUI, running
from .webui_sampling import SIGMAS, Guidance

NOISE = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
PROMPT, NEGATIVE = words(1), words(2)
TRAINED = {"sampler_name": "Euler", "scheduler": "Simple", "steps": 4, "cfg_scale": 1.0}
NEAR = 2e-2
"""Largest relative L2 of final latents where a host begins with noise of another scale, or with near timesteps."""


@contextmanager
def webui_with(installed: Path, unet: Any, scheduler: Any, *, forge: bool = False, steps: int = 4) -> Iterator[WebUI]:
    """Yields a host with an engine of a few-step model. `unet` is the checkpoint's."""
    make_few_step(installed / "models" / "sdcompress" / "tiny", scheduler, steps)
    is_v = scheduler.config.prediction_type == "v_prediction"
    with running(WebUI(installed, unet, forge=forge, parameterization="v" if is_v else "eps")) as host:
        host.load_extension(WEBUI_PLUGIN)
        host.opts.sd_unet = TITLE
        yield host


@contextmanager
def denoiser(host: WebUI, prediction: str = "epsilon", lcm: bool = False, **settings: Any) -> Iterator[Denoiser]:
    """Yields the denoised latents of a picture without guidance, by the engine.

    A1111 runs the negative prompt nevertheless, and Forge does not.
    """
    with host.job(*([TITLE] if host.is_forge else []), **{**TRAINED, **settings}) as job:
        if host.is_forge:
            host.before_sampling(job, TITLE)
            yield lambda x, sigma: host.forge_denoise(x, sigma, PROMPT.expand(len(x), -1, -1))
        elif lcm:
            yield lcm_denoiser(host.predict, PROMPT)
        else:
            guidance = Guidance(host.predict, prediction=prediction)
            texts = [text.expand(len(NOISE), -1, -1) for text in (PROMPT, NEGATIVE)]
            yield lambda x, sigma: guidance(x, sigma, *texts, None, 1.0)


@pytest.mark.parametrize("forge", [False, True], ids=["webui", "forge"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_with_simple_equals_the_phases_of_a_student(
    prediction: str, forge: bool, installed: Path, random_pipeline: Any, student_unet: Any
) -> None:
    scheduler = few_step_scheduler("DDIMScheduler", prediction)
    wanted = draw_by_diffusers(student_unet, scheduler, NOISE, PROMPT)
    with (
        webui_with(installed, random_pipeline.unet, scheduler, forge=forge) as host,
        denoiser(host, prediction) as denoise,
    ):
        exact = sample_euler(denoise, begin(NOISE, simple(4), multiplier=True), simple(4))
        usual = sample_euler(denoise, begin(NOISE, simple(4), multiplier=False), simple(4))
        near = sample_euler(denoise, begin(NOISE, sgm_uniform(4), multiplier=True), sgm_uniform(4))
        assert not host.errors
    assert relative_l2(exact, wanted) < ROUNDING
    assert ROUNDING < relative_l2(usual, wanted) < NEAR
    assert ROUNDING < relative_l2(near, wanted) < NEAR


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_lcm_with_turbo_in_forge_equals_the_students_lcm(
    prediction: str, installed: Path, random_pipeline: Any, student_unet: Any
) -> None:
    scheduler = few_step_scheduler("LCMScheduler", prediction)
    wanted = draw_by_diffusers(student_unet, scheduler, NOISE, PROMPT)
    with (
        webui_with(installed, random_pipeline.unet, scheduler, forge=True) as host,
        denoiser(host, prediction) as denoise,
    ):
        found = sample_lcm(denoise, begin(NOISE, turbo(4), multiplier=True), turbo(4))
    assert relative_l2(found, wanted) < ROUNDING


@pytest.mark.parametrize(("solver_steps", "limits"), [(50, (0, ROUNDING)), (40, (ROUNDING, 0.2))])
def test_lcm_with_simple_in_a1111_has_the_timesteps_of_50_solver_steps(
    solver_steps: int, limits: tuple[float, float], installed: Path, random_pipeline: Any, student_unet: Any
) -> None:
    scheduler = few_step_scheduler("LCMScheduler", original_inference_steps=solver_steps)
    wanted = draw_by_diffusers(student_unet, scheduler, NOISE, PROMPT)
    sigmas = simple(4, SIGMAS[LCM_TIMESTEPS])
    with webui_with(installed, random_pipeline.unet, scheduler) as host, denoiser(host, lcm=True) as denoise:
        found = sample_lcm(denoise, begin(NOISE, sigmas, multiplier=True), sigmas)
    assert limits[0] <= relative_l2(found, wanted) < limits[1]
    manifest = read_manifest(folder := installed / "models" / "sdcompress" / "tiny")
    assert manifest is not None
    sampling = read_exported_few_steps(folder, manifest)
    assert sampling is not None
    assert sampling.is_exact("webui") == (solver_steps == 50)


def test_guidance_above_one_runs_a_static_engine_of_one_sample_twice(installed: Path, student_unet: Any) -> None:
    make_few_step(installed / "models" / "sdcompress" / "tiny", few_step_scheduler("DDIMScheduler"))
    artifact = read_only_artifact(installed / "models" / "sdcompress")
    unet = host_unet(replace(artifact, profiles=(ranges((1, 1, 1), (128, 128, 128)),)))
    unet.activate()
    runner, calls = next(iter(unet.engines.runners.values())), []
    infer = runner.infer
    runner.infer = lambda inputs: calls.append(len(inputs["sample"])) or infer(inputs)  # type: ignore[method-assign]
    both = call_unet(unet, batch=2)
    assert calls == [1, 1]
    runner.infer = infer  # type: ignore[method-assign]
    assert relative_l2(both, call_unet(host_unet(artifact), batch=2)) < ROUNDING


HINTS = {
    "20 steps": ({"steps": 20}, "has 20 steps, so"),
    "guidance": ({"cfg_scale": 7.0}, "has CFG 7, so it is not as good as it can be. Its guidance is in its weights"),
    "sampler": ({"sampler_name": "DPM++ 2M", "scheduler": "Karras"}, "sampler DPM++ 2M, the schedule type Karras, so"),
    "no schedule": ({"scheduler": None}, "has the schedule type Automatic, so"),
}


@pytest.mark.parametrize("forge", [False, True], ids=["webui", "forge"])
@pytest.mark.parametrize(("settings", "named"), HINTS.values(), ids=HINTS)
def test_other_settings_than_the_students_get_one_hint_and_the_picture(
    settings: dict[str, Any], named: str, forge: bool, installed: Path, random_pipeline: Any
) -> None:
    scheduler = few_step_scheduler("DDIMScheduler")
    with (
        webui_with(installed, random_pipeline.unet, scheduler, forge=forge) as host,
        host.job(*([TITLE] if forge else []), **{**TRAINED, **settings}) as job,
    ):
        if forge:
            host.before_sampling(job, TITLE)
            host.forge_denoise(NOISE, torch.tensor([5.0, 5.0]), PROMPT.expand(2, -1, -1))
        else:
            host.predict(NOISE, torch.tensor([999.0, 999.0]), PROMPT.expand(2, -1, -1))
        (comment,) = job.comments
        assert f"{TITLE} was trained for 4 steps, CFG 1, Euler, Simple. This picture" in comment
        assert named in comment
        assert not host.errors


def test_the_students_own_settings_get_no_hint(installed: Path, random_pipeline: Any) -> None:
    with webui_with(installed, random_pipeline.unet, few_step_scheduler("DDIMScheduler")) as host:
        for settings in (TRAINED, TRAINED | {"sampler_name": "euler", "scheduler": "simple"}):
            with host.job(**settings) as job:
                assert job.comments == []
        host.opts.sd_unet = "None"
        with host.job(**TRAINED | {"steps": 20}) as job:
            assert job.comments == []  # the checkpoint's own UNet


def test_a_student_of_zero_terminal_snr_needs_that_noise_schedule(installed: Path, random_pipeline: Any) -> None:
    scheduler = few_step_scheduler("DDIMScheduler", "v_prediction", rescale_betas_zero_snr=True)
    with webui_with(installed, random_pipeline.unet, scheduler) as host:
        host.opts.sd_noise_schedule = "Default"
        with host.job(**TRAINED) as job:
            assert "the noise schedule Default (in the settings; its own is Zero Terminal SNR)" in job.comments[0]
        host.opts.sd_noise_schedule = "Zero Terminal SNR"
        with host.job(**TRAINED) as job:
            assert job.comments == []


def test_an_lcm_student_that_predicts_velocity_has_no_sampler_in_a1111(installed: Path, random_pipeline: Any) -> None:
    with (
        webui_with(installed, random_pipeline.unet, few_step_scheduler("LCMScheduler", "v_prediction")) as host,
        host.job(**TRAINED | {"sampler_name": "LCM"}) as job,
    ):
        assert "4 steps, CFG 1, which no sampler of AUTOMATIC1111 draws. This picture has the sampler LCM" in str(
            job.comments
        )


def test_the_tab_says_what_to_choose(installed: Path) -> None:
    root = installed / "models" / "sdcompress"
    make_few_step(root / "tiny", few_step_scheduler("LCMScheduler"))
    (row,) = table_rows(find_artifacts(root), None)
    wanted = "tiny (student, an unknown family); 4 steps, CFG 1; AUTOMATIC1111: LCM, Simple; Forge: LCM, Turbo"
    assert row.model == wanted
