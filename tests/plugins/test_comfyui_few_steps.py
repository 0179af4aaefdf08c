"""A few-step student in ComfyUI draws the pictures that diffusers draws, with the sampler and scheduler that we name.

The latents begin with equal noise, and LCM adds equal noise at each step.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sdcompress_engines.exactness import relative_l2

from .comfyui_cases import SHAPE, record_calls, text
from .comfyui_host import REAL, Harness
from .few_step_cases import SEED, draw_by_diffusers, few_step_scheduler, make_few_step
from .webui_cases import ROUNDING

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning" if REAL else "error")
NEAR = 2e-2
PROMPT, NEGATIVE = text(77, 1), text(77, 2)


def sample(host: Any, patcher: Any, **settings: Any) -> torch.Tensor:
    """Returns the final latents, with the scale that the UNet works in."""
    given = {"steps": 4, "cfg": 1.0, "sampler": "euler", "scheduler": "simple", **settings}
    latents = host.sample(patcher, PROMPT, NEGATIVE, SHAPE, seed=SEED, **given)
    scaled: torch.Tensor = latents * patcher.model.latent_format.scale_factor
    return scaled


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("kind", "sampler"), [("DDIMScheduler", "euler"), ("LCMScheduler", "lcm")])
def test_euler_and_lcm_with_simple_equal_the_student(
    kind: str, sampler: str, prediction: str, host: Any, models: Path, node: Any, student: Any
) -> None:
    scheduler = few_step_scheduler(kind, prediction)
    make_few_step(models / "tiny", scheduler)
    (patcher,) = node().load("tiny")
    calls = record_calls(patcher)
    wanted = draw_by_diffusers(student.unet, scheduler, host.noise(SHAPE, SEED), PROMPT[0])
    assert relative_l2(sample(host, patcher, sampler=sampler), wanted) < ROUNDING
    assert [times.tolist() for _, times, *_ in calls] == [[time] * 2 for time in (999, 749, 499, 249)]  # no negative
    near = relative_l2(sample(host, patcher, sampler=sampler, scheduler="sgm_uniform"), wanted)
    assert ROUNDING < near < NEAR


def test_zero_terminal_snr_is_close(host: Any, models: Path, node: Any, student: Any) -> None:
    scheduler = few_step_scheduler("DDIMScheduler", "v_prediction", rescale_betas_zero_snr=True)
    make_few_step(models / "tiny", scheduler)
    (patcher,) = node().load("tiny")
    wanted = draw_by_diffusers(student.unet, scheduler, host.noise(SHAPE, SEED), PROMPT[0])
    assert relative_l2(sample(host, patcher), wanted) < 1e-3  # the host takes a large number for an infinite sigma


def test_comfyuis_node_for_lcm_has_the_timesteps_of_50_solver_steps(
    host: Any, models: Path, node: Any, student: Any
) -> None:
    scheduler = few_step_scheduler("LCMScheduler", original_inference_steps=50)
    make_few_step(models / "tiny", scheduler)
    patcher = host.sample_as_lcm(node().load("tiny")[0])
    assert str(patcher.model.diffusion_model.folder.sampling.choice("comfyui")).endswith("ModelSamplingDiscrete: lcm")
    wanted = draw_by_diffusers(student.unet, scheduler, host.noise(SHAPE, SEED), PROMPT[0])
    assert relative_l2(sample(host, patcher, sampler="lcm"), wanted) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sampler"), [("DDIMScheduler", "euler"), ("LCMScheduler", "lcm")])
def test_an_sdxl_student_equals_diffusers_too(
    kind: str, sampler: str, harness: Harness, node: Any, export_unet: Callable[..., Path], xl: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "models/sdcompress/xl"
    shutil.copytree(export_unet("comfyui", xl, "xl"), folder)
    scheduler = few_step_scheduler(kind)
    make_few_step(folder, scheduler)
    (patcher,) = node().load("xl")
    pooled = torch.randn(1, 32, generator=torch.Generator().manual_seed(4))
    prompt, negative = (text(77, seed, 64, pooled_output=pooled) for seed in (1, 2))
    latents = harness.sample(
        patcher, prompt, negative, (1, 4, 8, 12), 4, 1.0, SEED, sampler=sampler, scheduler="simple"
    )
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 96, 0, 0, 64, 96]])}
    noise = harness.noise((1, 4, 8, 12), SEED)
    wanted = draw_by_diffusers(xl.unet, scheduler, noise, prompt[0], added=added)
    assert relative_l2(latents * patcher.model.latent_format.scale_factor, wanted) < ROUNDING


def test_the_node_says_what_to_choose(models: Path, host: Any, node: Any, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(models / "tiny", models / "usual")
    make_few_step(models / "tiny", few_step_scheduler("DDIMScheduler"))
    tooltip = node.INPUT_TYPES()["required"]["engine"][1]["tooltip"]
    assert tooltip.splitlines()[1:] == ["tiny: 4 steps, CFG 1, euler, simple"]
    with caplog.at_level(logging.INFO, "sdcompress"):
        node().load("tiny")
        node().load("usual")
    assert [record.message for record in caplog.records] == ["tiny was trained for 4 steps, CFG 1, euler, simple"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, None),
        ({"scheduler": "normal"}, "other timesteps than 999, 749, 499, 249"),
        ({"steps": 8}, "other timesteps than 999, 749, 499, 249"),
        ({"cfg": 4.0}, "a CFG other than 1: its guidance is in its weights"),
    ],
)
def test_another_sampling_is_logged_once_and_drawn(
    settings: dict[str, Any],
    named: str | None,
    models: Path,
    host: Any,
    node: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_few_step(models / "tiny", few_step_scheduler("DDIMScheduler"))
    (patcher,) = node().load("tiny")
    for _ in range(2):
        assert sample(host, patcher, **settings).isfinite().all()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (named is not None)
    assert all(named in warning and "was trained for 4 steps, CFG 1, euler, simple" in warning for warning in warnings)


class OnCard(torch.Tensor):
    """A tensor that says it is on a card; its copies to the CPU are plain."""

    device = torch.device("cuda", 0)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert kwargs == {"non_blocking": True}
        return self.as_subclass(torch.Tensor)


def test_a_timestep_on_a_card_is_read_late_and_never_waited_for(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hints = sys.modules[f"{node.__module__.rpartition('.')[0]}.hints"]
    arrived: list[bool] = [False, True, True]
    event = SimpleNamespace(query=lambda: arrived.pop(0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: event))
    reader = hints.LateReader()
    times = [torch.tensor([float(time)]).as_subclass(OnCard) for time in (999, 749, 499, 249)]
    assert [reader.read(time) for time in times] == [None, None, 999.0, 499.0]


@pytest.mark.gpu
def test_a_timestep_of_a_real_card_is_read_without_synchronizing(node: Any) -> None:
    hints = sys.modules[f"{node.__module__.rpartition('.')[0]}.hints"]
    reader, found = hints.LateReader(), []
    times = [torch.tensor([float(time)], device="cuda") for time in (999, 749, 499)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for time in times:
            found.append(reader.read(time))
            while not reader._copied.query():
                pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found == [None, 999.0, 749.0]
