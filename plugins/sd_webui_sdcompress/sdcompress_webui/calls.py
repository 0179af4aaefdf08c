"""Which engine and profile serve a call of the UNet, and in how many parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sdcompress_engines.runners.shapes import Ranges, Shape, choose_profile

SAMPLE, CONTEXT = "sample", "encoder_hidden_states"


@dataclass(frozen=True)
class Plan:
    """How a call runs.

    Attributes:
        profile: index of the one to run on.
        batch: samples of each part; the last may have fewer. least: what the profile needs; a part with fewer is filled
            up.
        repeats: how often the context is laid end to end. Attention over a context and over copies of it gives the
            same, as softmax shares the weight among them.
    """

    profile: int
    batch: int
    least: int
    repeats: int = 1

    def parts(self, total: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, samples to run) of each part."""
        for start in range(0, total, self.batch):
            stop = min(start + self.batch, total)
            yield start, stop, max(stop - start, self.least)


def plan_call(profiles: Sequence[Ranges], shapes: Mapping[str, Shape]) -> Plan | None:
    """The way to run a call of these shapes, or None: whole where a profile takes it, else with the context repeated,
    else in the fewest parts with the least filling.

    A call of cond and uncond together that exceeds a profile is so run apart, and one of cond alone on an engine for
    two is filled up.
    """
    total, tokens = shapes[SAMPLE][0], shapes[CONTEXT][1]
    longest = max((profile[CONTEXT][2][1] for profile in profiles), default=tokens)
    found: list[tuple[tuple[int, int, int], Plan]] = []
    for batch in _batches(profiles, total):
        for repeats in range(1, min(longest // max(tokens, 1), 8) + 1):
            asked = {
                name: (batch, shape[1] * repeats, *shape[2:]) if name == CONTEXT else (batch, *shape[1:])
                for name, shape in shapes.items()
            }
            index = choose_profile(profiles, asked)
            if index is not None:
                calls = math.ceil(total / batch)
                found.append(
                    (
                        (calls, repeats, max(0, batch - total)),
                        Plan(index, min(batch, total), profiles[index][SAMPLE][0][0], repeats),
                    )
                )
                break
    return min(found, key=lambda entry: entry[0])[1] if found else None


def _batches(profiles: Sequence[Ranges], total: int) -> list[int]:
    """Sizes of a part worth trying: the whole, and for each profile even parts that it takes."""
    sizes = {total}
    for profile in profiles:
        least, most = profile[SAMPLE][0][0], profile[SAMPLE][2][0]
        sizes.add(max(math.ceil(total / math.ceil(total / most)), least))
    return sorted(sizes, reverse=True)
