"""A batch or prompt that an engine does not take runs in the fewest calls, with the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.calls import split_batch
from sdcompress_engines.exactness import relative_l2

from .comfyui_cases import PROFILES, WIDTH, change, profile
from .comfyui_host import REAL

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning" if REAL else "error")


@pytest.mark.parametrize("limits", PROFILES)
@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_batch_that_the_profile_does_not_take_runs_in_parts_with_the_same_result(
    limits: str, count: int, models: Path, parts: Any, student: Any
) -> None:
    change(models / "tiny", profiles={"unet": [profile(*PROFILES[limits])]})
    model = parts.model.EngineModel(parts.folders.read_folder("tiny", models / "tiny"))
    x, times = torch.randn(count, 4, 8, 16), torch.arange(count) * 100.0
    shorts = torch.randn(count, 77, WIDTH)
    context = shorts.repeat(1, 4, 1)  # ComfyUI does so if another prompt is longer
    with torch.no_grad():
        wanted = student.unet(x, times, shorts).sample
    shapes = []
    engine = model.open(x.device)
    real = engine.runner.infer

    def infer(feeds: Any) -> Any:
        shapes.append((len(feeds["x"]), feeds["context"].shape[1]))
        return real(feeds)

    engine.runner.infer = infer
    assert relative_l2(model(x, times, context), wanted) < 1e-5
    (least, most), _, (fewest, longest) = PROFILES[limits]
    assert all(least <= rows <= most and fewest <= tokens <= longest for rows, tokens in shapes)
    assert len(shapes) == -(-count // most)
    model.close()


@pytest.mark.parametrize("least", [1, 2, 4])
@pytest.mark.parametrize("most", [4, 5, 8])
def test_every_sample_is_run_once_in_the_fewest_parts(least: int, most: int) -> None:
    for count in range(1, 20):
        parts = split_batch(count, least, most)
        assert [at for part in parts for at in range(part.start, part.stop)] == list(range(count))
        assert all(least <= part.rows <= most and part.rows >= part.stop - part.start for part in parts)
        assert len(parts) == -(-count // most)


def planned(
    parts: Any, limits: list[Any], shape: tuple[int, ...], context: torch.Tensor
) -> list[tuple[int, int, int, int]]:
    """Returns (start, stop, rows, tokens) of each call."""
    calls = parts.calls.plan_calls(limits, torch.Size(shape), context)
    return [(call.part.start, call.part.stop, call.part.rows, call.tokens) for call in calls]


def test_the_profile_with_the_fewest_calls_is_chosen(parts: Any) -> None:
    Limits = parts.calls.Limits
    small, large = Limits((1, 2), (8, 16), (8, 16), (77, 77)), Limits((4, 8), (8, 8), (8, 8), (77, 231))
    context = torch.randn(6, 77, 8)
    assert planned(parts, [small, large], (6, 4, 8, 8), context) == [(0, 6, 6, 77)]
    assert planned(parts, [small, large], (6, 4, 8, 16), context) == [(0, 2, 2, 77), (2, 4, 2, 77), (4, 6, 2, 77)]
    assert planned(parts, [small, large], (6, 4, 32, 32), context) == [(0, 6, 6, 77)], "the runner reports the fault"


def test_prompts_of_two_lengths_run_apart(parts: Any) -> None:
    wide = parts.calls.Limits((1, 8), (8, 16), (8, 16), (77, 231))
    short, long = torch.randn(2, 154, 8), torch.randn(1, 231, 8)
    repeated = torch.cat([short.repeat(1, 3, 1), long.repeat(1, 2, 1)])  # to 462, their common multiple
    assert planned(parts, [wide], (3, 4, 8, 8), repeated) == [(0, 2, 2, 154), (2, 3, 1, 231)]
    assert planned(parts, [wide], (1, 4, 8, 8), torch.randn(1, 308, 8)) == [(0, 1, 1, 308)], "nothing in it repeats"
    endless = parts.calls.Limits((1, 8), (8, 16), (8, 16), (77 * 10**12 - 1, 10**15))
    assert planned(parts, [endless], (1, 4, 8, 8), short[:1, :77]) == [(0, 1, 1, 77 * 10**12)], "found without a search"
