"""What a few-step model was trained for: its timesteps are those of diffusers, and the hosts' choices fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.few_steps import GUIDANCE, HOST_TITLES, STEPS, FewStepSampling, read_few_steps

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def make_sampling(kind: str, steps: int = 4, **config: Any) -> FewStepSampling:
    """Returns the sampling of a model with the scheduler that few-step training saves."""
    given = {"timestep_spacing": "trailing", "clip_sample": False} if kind == "DDIMScheduler" else {}
    sampling = read_few_steps({STEPS: steps, GUIDANCE: 1.0}, {"_class_name": kind, **BETAS, **given, **config})
    assert sampling is not None
    return sampling


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 8, 10])
@pytest.mark.parametrize(
    ("kind", "config"),
    [("DDIMScheduler", {}), ("LCMScheduler", {"original_inference_steps": 40}), ("LCMScheduler", {})],
)
def test_the_timesteps_are_those_that_diffusers_sets(kind: str, config: dict[str, Any], steps: int) -> None:
    import diffusers

    sampling = make_sampling(kind, steps, **config)
    scheduler = getattr(diffusers, kind).from_config(dict(sampling.scheduler))
    scheduler.set_timesteps(steps)
    assert sampling.timesteps == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("kind", "config", "chosen"),
    [
        ("DDIMScheduler", {}, ["Euler, Simple", "Euler, Simple", "euler, simple"]),
        ("LCMScheduler", {"original_inference_steps": 40}, ["LCM, Simple", "LCM, Turbo", "lcm, simple"]),
        ("LCMScheduler", {}, ["LCM, Simple", "LCM, Simple", "lcm, simple, ModelSamplingDiscrete: lcm"]),
    ],
)
def test_each_host_has_a_choice_for_four_steps(kind: str, config: dict[str, Any], chosen: list[str]) -> None:
    sampling = make_sampling(kind, **config)
    assert [str(sampling.choice(host)) for host in HOST_TITLES] == chosen
    near = ["webui"] if config == {"original_inference_steps": 40} else []
    assert [host for host in HOST_TITLES if not sampling.is_exact(host)] == near


def test_a_line_names_what_to_choose_in_all_hosts() -> None:
    assert make_sampling("DDIMScheduler").describe_in() == (
        "4 steps, CFG 1; AUTOMATIC1111 and Forge: Euler, Simple; ComfyUI: euler, simple"
    )
    assert make_sampling("DDIMScheduler", 1).describe("webui") == "1 step, CFG 1, Euler, Simple"
    lcm = make_sampling("LCMScheduler", prediction_type="v_prediction")
    assert lcm.describe("webui") == "4 steps, CFG 1, which no sampler of AUTOMATIC1111 draws"
    assert "AUTOMATIC1111: no sampler draws it; Forge: LCM, Simple" in lcm.describe_in()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("DDIMScheduler", {"timestep_spacing": "leading"}),
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDIMScheduler", {"thresholding": True}),
        ("DDIMScheduler", {"set_alpha_to_one": False}),
        ("LCMScheduler", {"original_inference_steps": 2}),
        ("UniPCMultistepScheduler", {}),
    ],
)
def test_no_sampler_is_named_for_a_scheduler_that_no_host_has(kind: str, config: dict[str, Any]) -> None:
    sampling = make_sampling(kind, **config)
    assert sampling.choice("comfyui") is None
    assert sampling.describe_in() == sampling.describe("comfyui") == "4 steps, CFG 1"
    assert sampling.find_differences("comfyui", 4, 1.0, "any", None) == []


def test_the_names_of_a_host_are_compared_as_the_host_does() -> None:
    sampling = make_sampling("DDIMScheduler")
    assert sampling.find_differences("webui", 4, 1.0, "euler", "simple") == []
    assert sampling.find_differences("webui", 5, 2.5, "Euler a", "SGM Uniform") == [
        "5 steps",
        "CFG 2.5",
        "the sampler Euler a",
        "the schedule type SGM Uniform",
    ]


@pytest.mark.parametrize(
    "index", [{}, {STEPS: 4}, {GUIDANCE: 1.0}, {STEPS: "4", GUIDANCE: 1.0}, {STEPS: 0, GUIDANCE: 1.0}]
)
def test_a_model_without_steps_of_its_own_has_no_sampling(index: dict[str, Any]) -> None:
    assert read_few_steps(index, {"_class_name": "DDIMScheduler"}) is None


@pytest.mark.parametrize("value", ["x", None, [], {}, -1, 0, True, 1e400])
@pytest.mark.parametrize("name", ["_class_name", "num_train_timesteps", "original_inference_steps", "prediction_type"])
def test_a_strange_scheduler_config_is_no_crash(name: str, value: Any) -> None:
    for kind in ("DDIMScheduler", "LCMScheduler"):
        sampling = make_sampling(kind, **{name: value})
        assert "4 steps, CFG 1" in sampling.describe_in()


@pytest.mark.parametrize(
    ("kind", "config"),
    [("DDIMScheduler", {}), ("LCMScheduler", {"original_inference_steps": 40}), ("LCMScheduler", {})],
)
def test_the_docs_name_the_same_choices(kind: str, config: dict[str, Any]) -> None:
    docs, sampling = Path(__file__).parents[2] / "docs", make_sampling(kind, **config)
    in_webui, in_forge, in_comfyui = map(sampling.choice, HOST_TITLES)
    assert in_comfyui is not None
    near = "" if sampling.is_exact("webui") else " (near)"
    assert f"| {in_webui}{near} | {in_forge} | 4 | 1 |" in (docs / "webui.md").read_text(encoding="utf-8")
    rows = [row.split("|")[2:] for row in (docs / "comfyui.md").read_text(encoding="utf-8").splitlines() if kind in row]
    if not in_comfyui.node:
        assert rows == [[f" `{in_comfyui.sampler}` ", f" `{in_comfyui.schedule}` ", " 4 ", " 1 ", ""]]
