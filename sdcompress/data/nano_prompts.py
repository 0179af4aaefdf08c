"""Prompts from the captions of nano's data set."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from sdcompress.data.sources import open_source
from sdcompress.models.nano import shards


@dataclass(frozen=True)
class NanoPrompt:
    """A caption of the data set, with the style and the concept that it joins."""

    caption: str
    style: str
    concept: str


def draw_prompts(split: str, count: int, seed: int = 0) -> list[NanoPrompt]:
    """Returns captions drawn without replacement, each concept at most once.

    Args:
        split: `seen`, the pictures of training, or `heldout`.
        count: number of captions.
        seed: the same seed gives the same captions.

    Raises:
        ValueError: the split has fewer concepts than `count`.
    """
    drawn: list[NanoPrompt] = []
    concepts: set[str] = set()
    prompts = list(_read_prompts("train" if split == "seen" else "heldout"))
    random.Random(seed).shuffle(prompts)
    for prompt in prompts:
        if prompt.concept not in concepts:
            concepts.add(prompt.concept)
            drawn.append(prompt)
        if len(drawn) == count:
            return drawn
    raise ValueError(f"{split} has {len(drawn)} concepts, {count} prompts were asked for")


def _read_prompts(split: str) -> Iterator[NanoPrompt]:
    for record in open_source(shards(split)):
        yield NanoPrompt(record.caption, record.meta["style"], record.meta["concept"])
