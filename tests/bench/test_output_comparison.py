"""Which prompts the models of a suite draw, and which of the pictures are judged."""

from __future__ import annotations

from typing import Any

from sdcompress_bench.output_comparison import choose_drawn
from sdcompress_bench.scenario import ModelUnderTest, Prompt, Suite

PROMPTS = tuple(Prompt(f"prompt {n}") for n in range(5))
SHOWN = tuple(Prompt(f"shown {n}") for n in range(3))


def suite(**more: Any) -> Suite:
    return Suite(models=(ModelUnderTest("nano", "nano"),), prompts=PROMPTS, seed=10, **more)


def test_pictures_of_shown_prompts_come_first_and_are_not_judged() -> None:
    drawn = choose_drawn(suite(shown=SHOWN, pictures=2, quality_pictures=4))
    assert drawn.prompts == SHOWN[:2] + PROMPTS[:4]
    assert drawn.seeds == (10, 11, 10, 11, 12, 13)
    assert (drawn.grid_count, drawn.prompts[drawn.judged]) == (2, PROMPTS[:4])


def test_without_shown_prompts_the_first_ones_are_drawn_once() -> None:
    drawn = choose_drawn(suite(pictures=2, quality_pictures=4))
    assert drawn.prompts == PROMPTS[:4]
    assert drawn.seeds == (10, 11, 12, 13)
    assert (drawn.grid_count, drawn.prompts[drawn.judged]) == (2, PROMPTS[:4])


def test_a_grid_that_is_longer_than_the_figures_is_drawn_whole() -> None:
    drawn = choose_drawn(suite(pictures=5, quality_pictures=2))
    assert (drawn.prompts, drawn.grid_count, drawn.prompts[drawn.judged]) == (PROMPTS, 5, PROMPTS[:2])


def test_where_nothing_else_is_judged_the_grid_is() -> None:
    drawn = choose_drawn(suite(shown=SHOWN, pictures=2))
    assert (drawn.prompts, drawn.prompts[drawn.judged]) == (SHOWN[:2], SHOWN[:2])
