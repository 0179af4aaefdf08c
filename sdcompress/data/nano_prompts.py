"""Prompts from the captions of nano's data set, and whether nano knows what a prompt asks for."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from sdcompress.data.sources import open_source
from sdcompress.models.nano import concepts, shards, styles

SHOWN = (
    "a flat icon of a wine glass",
    "a cartoon of a red heart",
    "a cartoon of a fox",
    "a black line drawing of a bicycle",
    "a 3d render of a hamburger",
    "a flat icon of a sailboat",
    "a cartoon of a house",
    "a 3d render of a cactus",
)
"""Captions that nano was trained on, for the pictures that people see first."""
ALIKE = 0.8
"""The least share of letters that two words have in common, in order, to be called near."""


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


def shown_prompts() -> list[NanoPrompt]:
    """Returns the prompts of `SHOWN`, in their order."""
    known = {prompt.caption: prompt for prompt in _read_prompts("train")}
    return [known[caption] for caption in SHOWN]


def describe_unknown(prompt: str) -> str | None:
    """Returns one line that names what nano does not know in a prompt and the nearest that it knows, or None.

    Args:
        prompt: what a person typed.
    """
    text = " ".join(prompt.lower().split())
    phrase = next((phrase for phrase in styles().values() if text.startswith(f"{phrase} ")), "")
    wanted = _without_article(text.removeprefix(phrase))
    named = [name for name in concepts() if re.search(rf"\b{re.escape(name)}\b", wanted)]
    if not wanted or wanted in named or (named and phrase):
        return None
    if named:
        return f"nano draws four styles; start the prompt with {', '.join(map(repr, styles().values()))}"
    wanted = _without_article(wanted.rpartition(" of ")[2])
    nearest = _nearest_concept(wanted)
    if nearest is None:
        shown = ", ".join(repr(caption) for caption in SHOWN[:3])
        return f"nano knows nothing like {wanted!r} among its {len(concepts())} things; try {shown}"
    return f"nano was not trained on {wanted!r}; the nearest that it knows is {nearest!r}"


def _without_article(text: str) -> str:
    return re.sub(r"^(an?|the) ", "", text.strip())


def _nearest_concept(wanted: str) -> str | None:
    """Returns the concept whose name, or another word for it, is spelled most like a text or a word of it.

    Returns None where nothing is spelled alike.
    """
    words = {wanted, *re.findall(r"[a-z0-9-]{3,}", wanted)}

    def nearness(name: str, tags: list[str]) -> float:
        by_name = max(SequenceMatcher(None, word, part).ratio() for word in words for part in {name, *name.split()})
        by_tag = max((SequenceMatcher(None, word, tag).ratio() for word in words for tag in tags), default=0.0)
        return max(by_name, 0.95 * by_tag)  # equal words: the name's own count more

    nearest, score = max(((name, nearness(name, tags)) for name, tags in concepts().items()), key=lambda pair: pair[1])
    return nearest if score >= ALIKE else None
