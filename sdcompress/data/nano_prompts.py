"""Prompts from the captions of nano's data set."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from sdcompress.models.nano import shards


@dataclass(frozen=True)
class NanoPrompt:
    """A caption of the data set with the style and concept it was made from."""

    caption: str
    style: str
    concept: str


def prompts(split: str, count: int, seed: int = 0) -> list[NanoPrompt]:
    """`count` captions drawn without replacement from the `seen` (training) or `heldout` pictures, each concept at most
    once.
    """
    drawn: list[NanoPrompt] = []
    concepts: set[str] = set()
    rows = list(_captions("train" if split == "seen" else "heldout"))
    random.Random(seed).shuffle(rows)
    for row in rows:
        if row.concept not in concepts:
            concepts.add(row.concept)
            drawn.append(row)
        if len(drawn) == count:
            return drawn
    raise ValueError(f"{split} has {len(drawn)} concepts, {count} prompts were asked for")


def _captions(split: str) -> Iterator[NanoPrompt]:
    from sdcompress.data.sources import open_source

    for record in open_source(shards(split)):
        yield NanoPrompt(record.caption, record.meta["style"], record.meta["concept"])
