"""Prompts of nano: those that people see first, and what it says about a prompt that it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
from sdcompress_engines.manifest import sha256_tree, write_manifest

from sdcompress.data.nano_prompts import SHOWN, describe_unknown, draw_prompts, shown_prompts
from sdcompress.data.sources import open_source
from sdcompress.models import nano


def test_the_prompts_that_people_see_first_were_trained_on() -> None:
    trained = {record.caption for record in open_source(nano.shards("train"))}
    assert set(SHOWN) <= trained
    assert tuple(prompt.caption for prompt in shown_prompts()) == SHOWN
    assert {prompt.style for prompt in shown_prompts()} == set(nano.styles())


def test_held_out_prompts_were_not_trained_on() -> None:
    trained = {record.caption for record in open_source(nano.shards("train"))}
    assert not {prompt.caption for prompt in draw_prompts("heldout", 150)} & trained


@pytest.mark.parametrize("prompt", [*SHOWN, "a cat", "A Flat Icon of a   Fox", "a cartoon of a big red apple", ""])
def test_nothing_is_said_about_what_nano_knows(prompt: str) -> None:
    assert describe_unknown(prompt) is None


@pytest.mark.parametrize(
    ("prompt", "wanted", "nearest"),
    [
        ("a flat icon of a puppy", "puppy", "dog face"),
        ("a cartoon of a kitten", "kitten", "cat face"),
        ("a 3d render of cats", "cats", "cat"),
        ("a boat", "boat", "sailboat"),
        ("an oil painting of a bunny", "bunny", "rabbit face"),
    ],
)
def test_an_unknown_thing_is_named_with_the_nearest_known(prompt: str, wanted: str, nearest: str) -> None:
    line = describe_unknown(prompt)
    assert line == f"nano was not trained on {wanted!r}; the nearest that it knows is {nearest!r}"


def test_where_nothing_is_near_it_shows_what_to_try() -> None:
    line = describe_unknown("a photo of quantum chromodynamics")
    assert line is not None
    assert "knows nothing like 'quantum chromodynamics'" in line
    assert all(repr(caption) in line for caption in SHOWN[:3])


def test_an_unknown_style_is_answered_with_the_styles() -> None:
    line = describe_unknown("an oil painting of a cat")
    assert line is not None
    assert all(repr(phrase) in line for phrase in nano.styles().values())


def test_only_nano_and_what_is_made_of_it_draw_like_nano(tmp_path: Path) -> None:
    for kind, inputs in {
        "student": {"teacher": sha256_tree(nano.teacher_folder())},
        "finetuned": {"teacher": sha256_tree(nano.teacher_folder())},
        "other": {"teacher": "0" * 64},
    }.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "weights").write_bytes(b"w")
        write_manifest(tmp_path / kind, "student" if kind == "other" else kind, inputs=inputs)
    assert nano.draws_like_nano("nano")
    assert nano.draws_like_nano("nano-tiny")
    assert nano.draws_like_nano(tmp_path / "student")
    assert not nano.draws_like_nano(tmp_path / "finetuned")
    assert not nano.draws_like_nano(tmp_path / "other")
    assert not nano.draws_like_nano("runwayml/stable-diffusion-v1-5")
