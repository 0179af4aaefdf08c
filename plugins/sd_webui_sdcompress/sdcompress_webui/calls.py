"""Choose the engine profile that serves a call of the UNet, and the parts that the call is split into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdcompress_engines.calls import Part, cut_batch, even_size
from sdcompress_engines.runners.shapes import Ranges, Shape, choose_profile
from sdcompress_engines.signature import HOSTS

SIGNATURE = "webui"
_NAMES = HOSTS[SIGNATURE]["unet"][0]
SAMPLE, TIMESTEPS, CONTEXT, ADDED = (_NAMES[name] for name in ("sample", "timestep", "encoder_hidden_states", "y"))
"""The inputs of the UNet in the `webui` signature."""
_MOST_REPEATS = 8


@dataclass(frozen=True)
class Plan:
    """How to run a call.

    Attributes:
        profile: index of the profile to run on.
        batch: samples of each part. The last one may have fewer.
        least: samples that the profile needs. A part with fewer is padded.
        repeats: how often the context is repeated. That does not change the result, see `sdcompress_engines.calls`.
    """

    profile: int
    batch: int
    least: int
    repeats: int = 1

    def parts(self, total: int) -> list[Part]:
        """Returns the parts of a call with `total` samples."""
        return cut_batch(total, self.batch, self.least)


def plan_call(profiles: Sequence[Ranges], shapes: Mapping[str, Shape]) -> Plan | None:
    """Returns how to run a call of these shapes, or None if no profile can serve it.

    The plan with the fewest parts wins, then the one that repeats the context least, then the one with the least
    padding. So cond and uncond run apart where they exceed a profile together, and cond alone is padded on an engine
    that was built for both.

    Args:
        profiles: of all engines, input → (min, opt, max).
        shapes: of the call, by input.
    """
    total, tokens = shapes[SAMPLE][0], shapes[CONTEXT][1]
    longest = max((profile[CONTEXT][2][1] for profile in profiles), default=tokens)
    candidates: list[tuple[tuple[int, int, int], Plan]] = []
    for batch in _batch_sizes(profiles, total):
        for repeats in range(1, min(longest // max(tokens, 1), _MOST_REPEATS) + 1):
            index = choose_profile(profiles, _call_shapes(shapes, batch, repeats))
            if index is not None:
                cost = math.ceil(total / batch), repeats, max(0, batch - total)
                candidates.append((cost, Plan(index, min(batch, total), profiles[index][SAMPLE][0][0], repeats)))
                break
    return min(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


def _call_shapes(shapes: Mapping[str, Shape], batch: int, repeats: int) -> dict[str, Shape]:
    return {
        name: (batch, shape[1] * repeats, *shape[2:]) if name == CONTEXT else (batch, *shape[1:])
        for name, shape in shapes.items()
    }


def _batch_sizes(profiles: Sequence[Ranges], total: int) -> list[int]:
    """Returns the sizes of a part to try, largest first: the whole call, and for each profile equal parts."""
    sizes = {total}
    for profile in profiles:
        least, most = profile[SAMPLE][0][0], profile[SAMPLE][2][0]
        sizes.add(max(even_size(total, most), least))
    return sorted(sizes, reverse=True)
