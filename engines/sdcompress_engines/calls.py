"""Run a batch or prompt that an engine does not take as it is: split the batch, pad it, cut or repeat the context.

Attention over a context and over copies of it gives the same result: softmax shares the weight among the copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .signature import CONTEXT_TOKENS


@dataclass(frozen=True)
class Part:
    """The samples of one call of an engine.

    Attributes:
        start, stop: the samples of the whole batch.
        rows: how many samples the engine gets. Those beyond `stop - start` are padding.
    """

    start: int
    stop: int
    rows: int


def even_size(count: int, most: int) -> int:
    """Returns the samples of each part if `count` samples are split into the fewest equal parts of at most `most`."""
    parts = -(-count // most)
    return -(-count // parts)


def cut_batch(count: int, size: int, least: int) -> list[Part]:
    """Returns `count` samples in parts of `size`. The last one may have fewer.

    Args:
        count: samples of the whole batch.
        size: samples of a part.
        least: samples that the engine needs. A part with fewer is padded.
    """
    stops = [(start, min(start + size, count)) for start in range(0, count, size)]
    return [Part(start, stop, max(stop - start, least)) for start, stop in stops]


def split_batch(count: int, least: int, most: int) -> list[Part]:
    """Returns `count` samples in as few parts as an engine allows, of sizes as equal as possible.

    Args:
        count: samples of the whole batch.
        least, most: samples that the engine takes in one call.
    """
    return cut_batch(count, even_size(count, most), least)


def take_part(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """Returns the samples of a part, padded with copies of its last one.

    Args:
        tensor: (B, ...), any dtype, on any device.
        part: which samples to take.
    """
    samples = tensor[part.start : part.stop]
    missing = part.rows - len(samples)
    return torch.cat([samples, samples[-1:].expand(missing, *samples.shape[1:])]) if missing > 0 else samples


def set_tokens(context: torch.Tensor, tokens: int) -> torch.Tensor:
    """Returns a context of `tokens`: its beginning, or the context repeated.

    Args:
        context: text embeddings, (B, T, D), any dtype, on any device.
        tokens: of the result, (B, tokens, D).
    """
    length = context.shape[1]
    return context[:, :tokens] if tokens <= length else context.repeat(1, -(-tokens // length), 1)[:, :tokens]


def distinct_tokens(context: torch.Tensor) -> int:
    """Returns the smallest number of tokens, in whole CLIP windows, of which a context is a repetition.

    Args:
        context: text embeddings of one sample, (T, D), any dtype, on any device.
    """
    length = len(context)
    return next(
        (
            size
            for size in range(CONTEXT_TOKENS, length, CONTEXT_TOKENS)
            if length % size == 0 and torch.equal(context[size:], context[:-size])
        ),
        length,
    )
