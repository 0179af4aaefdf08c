"""Split a call of the UNet into calls that the engine's profiles take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .library import calls, signature


@dataclass(frozen=True)
class Limits:
    """What one optimization profile takes, each (min, max): samples, latent height and width, tokens."""

    batch: tuple[int, int]
    height: tuple[int, int]
    width: tuple[int, int]
    tokens: tuple[int, int]

    @classmethod
    def of(cls, profile: Mapping[str, Sequence[Sequence[int]]], host: str) -> Limits:
        """Returns the limits of a manifest's profile.

        Args:
            profile: input → (min, opt, max) shapes.
            host: whose names the inputs have, a key of `signature.HOSTS`.
        """
        names = signature.HOSTS[host]["unet"][0]
        least, _, most = profile[names["sample"]]
        fewest, _, longest = profile[names["encoder_hidden_states"]]
        ends = ((least[0], most[0]), (least[2], most[2]), (least[3], most[3]), (fewest[1], longest[1]))
        return cls(*((int(first), int(last)) for first, last in ends))

    def takes_picture(self, height: int, width: int) -> bool:
        """Returns whether latents of this height and width fit."""
        return _within(height, self.height) and _within(width, self.width)

    def takes_tokens(self, tokens: int) -> bool:
        """Returns whether a context of this length fits."""
        return _within(tokens, self.tokens)


@dataclass(frozen=True)
class Call:
    """One call of the engine.

    Attributes:
        part: its samples of the whole batch.
        tokens: the length of its context.
    """

    part: calls.Part
    tokens: int


def plan_calls(limits: Sequence[Limits], sample: torch.Size, context: torch.Tensor) -> list[Call]:
    """Returns the fewest calls that run a batch on an engine with these limits.

    A batch that is too large is split, and one that is too small is padded. A context that is too short is repeated.
    One that is too long is cut to the part that repeats in it, because ComfyUI repeats shorter prompts until all have
    one length. See `calls` in the engine package for why this does not change the result.

    Returns the call unchanged if nothing limits it, or if no split makes it fit. The runner then reports what the
    engine takes.

    Args:
        limits: of the engine's profiles.
        sample: the shape of the latents, (B, C, H/8, W/8).
        context: text embeddings, (B, T, D), any dtype, on any device.
    """
    count, tokens = sample[0], context.shape[1]
    unchanged = [Call(calls.Part(0, count, count), tokens)]
    fitting = [each for each in limits if each.takes_picture(sample[2], sample[3])]
    planned: list[Call] = []
    for start, stop, length in _equal_lengths(fitting, context) if fitting else []:
        options = [calls.split_batch(stop - start, *each.batch) for each in fitting if each.takes_tokens(length)]
        if not options:
            return unchanged
        best = min(options, key=lambda parts: (len(parts), sum(part.rows for part in parts)))
        planned += [Call(calls.Part(start + part.start, start + part.stop, part.rows), length) for part in best]
    return planned or unchanged


def _equal_lengths(limits: Sequence[Limits], context: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yields (start, stop, tokens) of neighboring samples that run with the same number of tokens."""
    count, tokens = context.shape[:2]
    if any(each.takes_tokens(tokens) for each in limits):
        yield 0, count, tokens
        return
    lengths = [_fitting_length(limits, calls.distinct_tokens(sample), tokens) for sample in context]
    start = 0
    for stop in range(1, count + 1):
        if stop == count or lengths[stop] != lengths[start]:
            yield start, stop, lengths[start]
            start = stop


def _fitting_length(limits: Sequence[Limits], distinct: int, default: int) -> int:
    """Returns the smallest multiple of `distinct` tokens that a profile takes, or `default`."""
    sizes = ((each, max(1, -(-each.tokens[0] // distinct)) * distinct) for each in limits)
    return min((size for each, size in sizes if each.takes_tokens(size)), default=default)


def _within(size: int, limits: tuple[int, int]) -> bool:
    return limits[0] <= size <= limits[1]
