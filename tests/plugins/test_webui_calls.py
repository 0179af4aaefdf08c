"""A call of the WebUI's UNet goes to the engine and profile that fit it best."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.calls import Part
from sdcompress_engines.exactness import relative_l2
from sdcompress_webui.calls import Plan, plan_call
from sdcompress_webui.engine_folders import Artifact, find_artifacts
from sdcompress_webui.menu import PREFIX, Model, group_models
from sdcompress_webui.unet import HostedUNet

from .webui_cases import (
    ROUNDING,
    STATIC_512,
    STATIC_1024,
    TITLE,
    WIDE,
    PlainHost,
    ranges,
    shapes,
)
from .webui_sampling import reference


@pytest.mark.parametrize(
    ("call", "plan"),
    [
        (shapes(2, 512), Plan(0, 2, 2)),  # the profile that is tuned for it
        (shapes(2, 640), Plan(1, 2, 1)),
        (shapes(2, 1024), Plan(2, 1, 1)),  # cond and uncond apart
        (shapes(6, 640), Plan(1, 3, 1)),
        (shapes(2, 512, 154), Plan(1, 2, 1)),
        (shapes(2, 1088), None),
        (shapes(2, 512, 231), None),
    ],
)
def test_a_call_goes_to_the_profile_that_fits_it_best(call: dict[str, Any], plan: Plan | None) -> None:
    assert plan_call([STATIC_512, WIDE, STATIC_1024], call) == plan


def test_one_sample_fills_an_engine_that_is_built_for_two() -> None:
    plan = plan_call([STATIC_512], shapes(1, 512))
    assert plan == Plan(0, 1, 2)
    assert plan.parts(1) == [Part(0, 1, 2)]
    three = plan_call([STATIC_512], shapes(3, 512))
    assert three is not None
    assert three.parts(3) == [Part(0, 2, 2), Part(2, 3, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_covers_every_sample_once_within_its_profile(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def pick(*values: int) -> int:
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    profiles = []
    for _ in range(pick(1, 2, 3)):
        least = pick(1, 2)
        profiles.append(
            ranges(
                (least, least, least * pick(1, 2, 4)), (pick(256, 512), 512, pick(512, 1024)), (77, 77, 77 * pick(1, 2))
            )
        )
    call = shapes(pick(1, 2, 3, 5, 8), pick(256, 512, 768), 77 * pick(1, 2, 3))
    plan = plan_call(profiles, call)
    fits = [
        p
        for p in profiles
        if p["sample"][0][2] <= call["sample"][2] <= p["sample"][2][2]
        and any(
            p["encoder_hidden_states"][0][1] <= call["encoder_hidden_states"][1] * k <= p["encoder_hidden_states"][2][1]
            for k in (1, 2)
        )
    ]
    assert (plan is None) == (not fits)
    if plan is not None:
        parts = plan.parts(call["sample"][0])
        assert [at for part in parts for at in range(part.start, part.stop)] == list(range(call["sample"][0]))
        least, most = profiles[plan.profile]["sample"][0][0], profiles[plan.profile]["sample"][2][0]
        assert all(least <= part.rows <= most and part.rows >= part.stop - part.start for part in parts)


def test_engines_of_one_model_share_calls_by_shape(installed: Path, student_unet: Any) -> None:
    root = installed / "models" / "sdcompress"
    shutil.copytree(root / "tiny", root / "tiny-large")
    small, large = (each for each in find_artifacts(root) if isinstance(each, Artifact))
    small, large = (
        replace(small, profiles=(ranges((2, 2, 2), (128, 128, 128)),)),
        replace(large, profiles=(ranges((1, 1, 1), (256, 256, 256), (154, 154, 154)),)),
    )
    unet = HostedUNet(Model("both", (small, large)), PlainHost())
    unet.activate()
    assert not unet.engines.runners  # each is opened at its first call
    times = torch.tensor([700.0, 30.0])
    for px, tokens, opened in (
        (128, 77, [small.folder]),
        (256, 154, [small.folder, large.folder]),
        (256, 77, [small.folder, large.folder]),
    ):
        x, context = torch.randn(2, 4, px // 8, px // 8), torch.randn(2, tokens, 96)
        assert (
            relative_l2(unet.forward(x, times, context), reference(student_unet)(x, times, context)) < ROUNDING
        )  # cond and uncond apart, and the context twice
        assert list(unet.engines.runners) == opened
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 96)
    assert (
        relative_l2(unet.forward(x, times[:1], context), reference(student_unet)(x, times[:1], context)) < ROUNDING
    )  # padded
    unet.deactivate()


def test_engines_of_one_model_are_one_entry(installed: Path, whole_graph: Path) -> None:
    root = installed / "models" / "sdcompress"
    shutil.copytree(root / "tiny", root / "tiny-2")
    shutil.copytree(whole_graph, root / "exported" / "onnx")  # the folder as export writes it
    entries = group_models(find_artifacts(root))
    assert [(entry.title, len(entry.usable)) for entry in entries] == [
        (f"{PREFIX}teacher (onnxruntime fp32)", 1),
        (TITLE, 2),
    ]
