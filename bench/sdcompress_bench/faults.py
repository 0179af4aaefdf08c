"""Faults planted into a UNet, to see whether a gate on relative L2 catches them, and how small a one it can see.

A backend goes wrong in a few ways that leave pictures plausible: a weight packed with a wrong scale, an attention head
lost in a fused kernel, values past what fp16 holds. Each can be put in, in memory, and taken out again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, get_args

import numpy as np
import torch
from sdcompress_engines.errors import ModelError
from sdcompress_engines.exactness import relative_l2

from . import fidelity
from .fidelity import Probe

Kind = Literal["scaled", "head", "overflow", "saturated"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SCALE = 1.02
"""What a `scaled` weight is multiplied by."""
OVERFLOW_SHARE = 0.01
"""Share of a layer's output, its largest values, that a planted overflow takes.

Of normally distributed values, clamping so many is an error of 4% of the layer: no smaller than `SCALE`'s.
"""
LARGEST_CHANGE = 1.0
"""Where the search for the least change seen gives up: a doubled weight."""


@dataclass(frozen=True)
class Place:
    """Where a fault goes.

    Attributes:
        layer: dotted name of a convolution or linear layer in the UNet; of a head, its attention's output projection.
        family: `convolution`, `linear`, `self-attention` or `cross-attention`.
        head: which one, of kind `head`.
    """

    layer: str
    family: str
    head: int | None = None

    def __str__(self) -> str:
        return self.layer if self.head is None else f"{self.layer.removesuffix('.to_out.0')} head {self.head}"


@dataclass(frozen=True)
class Sensitivity:
    """How small a fault a gate can see.

    Attributes:
        least: the smallest relative change of one weight tensor that passes the limit, median over the places;
            `least_low` and `least_high` its range. None where that is over `LARGEST_CHANGE`.
        places, blind: how many places, and at how many of them no change up to `LARGEST_CHANGE` is seen.
        heads, heads_unseen: attention heads zeroed one at a time, and how many of them stay inside the limit.
        scaled: the least change at each place, None where none is seen; `zeroed`: the worst relative L2 of each zeroed
            head.
    """

    least: float | None
    least_low: float | None
    least_high: float | None
    places: int
    blind: int
    heads: int
    heads_unseen: int
    scaled: dict[str, float | None]
    zeroed: dict[str, float]


def candidates(unet: torch.nn.Module, kind: Kind) -> list[Place]:
    """Every place for a fault of a kind: each attention head, or each convolution and linear layer.

    Raises:
        ModelError: not a PyTorch UNet, or one without any.
    """
    found: list[Place] = []
    inside: dict[str, str] = {}
    for name, module in unet.named_modules() if isinstance(unet, torch.nn.Module) else ():
        if all(hasattr(module, part) for part in ("to_q", "to_k", "to_v", "to_out", "heads")):
            inside[name] = "cross-attention" if module.is_cross_attention else "self-attention"
            found += [
                Place(f"{name}.to_out.0", inside[name], head) for head in range(module.heads if kind == "head" else 0)
            ]
        elif kind != "head" and isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            own = "convolution" if isinstance(module, torch.nn.Conv2d) else "linear"
            found.append(
                Place(name, next((family for parent, family in inside.items() if name.startswith(f"{parent}.")), own))
            )
    if not found:
        raise ModelError(f"{type(unet).__name__} has no place for a fault of kind {kind}", expected="a PyTorch UNet")
    return found


def spread(among: Sequence[Place], count: int, seed: int = 0) -> list[Place]:
    """`count` of some places: by turns from every family of layers, and in each from all over the UNet's depth; the
    seed chooses among neighbours.

    Raises:
        ModelError: there are fewer.
    """
    if len(among) < count:
        raise ModelError(f"{count} places for a fault were asked for", expected=f"at most the {len(among)} there are")
    random = np.random.default_rng(seed)
    families = {
        family: [place for place in among if place.family == family]
        for family in dict.fromkeys(place.family for place in among)
    }
    shares = dict.fromkeys(families, 0)
    while sum(shares.values()) < count:
        for family, members in families.items():
            if shares[family] < len(members) and sum(shares.values()) < count:
                shares[family] += 1
    return [
        members[random.integers(i * len(members) // share, (i + 1) * len(members) // share)]
        for members, share in zip(families.values(), shares.values(), strict=True)
        for i in range(share)
    ]


def places(unet: torch.nn.Module, kind: Kind, count: int, seed: int = 0) -> list[Place]:
    """`spread` over all `candidates` of a UNet."""
    return spread(candidates(unet, kind), count, seed)


@contextmanager
def plant(unet: torch.nn.Module, kind: Kind, place: Place, scale: float = SCALE) -> Iterator[None]:
    """A fault in the UNet for the block; after it every weight is bit for bit what it was.

    `scaled`: the layer's weight times `scale`. `head`: what the output projection reads of one head is zero.
    `overflow`: the layer's largest values, a share of `OVERFLOW_SHARE`, come out infinite, as if the layer worked in
    units where only they pass what fp16 holds; `saturated`: they come out as the largest value that is left, as of
    runtimes that clamp.
    """
    layer: Any = unet.get_submodule(place.layer)
    if kind in ("overflow", "saturated"):
        hook = layer.register_forward_hook(_saturate if kind == "saturated" else _overflow)
        try:
            yield
        finally:
            hook.remove()
        return
    weight = layer.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            if place.head is None:
                weight.mul_(scale)
            else:
                attention: Any = unet.get_submodule(place.layer.removesuffix(".to_out.0"))
                width = weight.shape[1] // attention.heads
                weight[:, place.head * width : (place.head + 1) * width] = 0
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def _overflow(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    size = output.abs()
    return torch.where(size >= _bound(size), output.sign() * math.inf, output)


def _saturate(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    size = output.abs()
    largest = torch.where(size < _bound(size), size, 0).max()
    return output.clamp(-largest, largest)


def _bound(size: torch.Tensor) -> torch.Tensor:
    """The magnitude that `OVERFLOW_SHARE` of the values reach, at least one; more where several are equal, as in a time
    embedding's rows.
    """
    return size.flatten().topk(max(1, round(OVERFLOW_SHARE * size.numel()))).values[-1]


def thin(probe: Probe, timesteps: int, pictures: int) -> Probe:
    """At most so many timesteps of a probe, evenly spread with the first and the last, and its first pictures."""
    chosen = _evenly(len(probe.timesteps), timesteps)
    given: dict[str, Any] = {
        field: None if (value := getattr(probe, field)) is None else value[:pictures]
        for field in ("encoder_hidden_states", "text_embeds", "time_ids")
    }
    return replace(
        probe, latents=probe.latents[chosen, :pictures], timesteps=tuple(probe.timesteps[i] for i in chosen), **given
    )


def _evenly(length: int, count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, length - 1, min(count, length))})


def sensitivity(
    model: Any,
    probe: Probe,
    limit: float | Sequence[float],
    floor: float | Sequence[float] = 0.0,
    count: int = 10,
    seed: int = 0,
    timesteps: int = 3,
    pictures: int = 2,
) -> Sensitivity:
    """How small a fault a gate of `limit` can see in a backend that is off by `floor` without one; each one figure, or
    one for each of the probe's timesteps.

    The error is nearly linear in the change, so at each place it is measured at 2%, once more where the line meets the
    limit, and read off from there. A fault adds to what the backend is off by as independent errors do, in squares: the
    whole is over the limit where the fault alone is over sqrt(limit² - floor²). With `floor` left at 0 the answer is
    the cautious one.

    Args:
        model: a PyTorch pipeline or UNet in fp32; it is as before afterwards.
        count: places for a scaled weight, and for a zeroed head; fewer where the UNet has fewer.
        timesteps, pictures: how much of the probe is used; 3 x `count` UNet calls of `pictures` at each timestep.

    Raises:
        ModelError: not a PyTorch UNet in fp32.
        ValueError: a limit that is not a positive number, or a floor that is not a number.
    """
    holder = model if hasattr(model, "unet") else SimpleNamespace(unet=model)
    unet = holder.unet
    if not isinstance(unet, torch.nn.Module) or unet.dtype != torch.float32:
        raise ModelError(
            f"{type(unet).__name__} is no PyTorch UNet in fp32", expected="the reference that the gate compares with"
        )
    limits, floors = (
        np.broadcast_to(np.asarray(given, dtype=np.float64), len(probe.timesteps)) for given in (limit, floor)
    )
    if not (np.isfinite(limits) & np.isfinite(floors) & (limits > 0)).all():
        raise ValueError(f"a gate of {limit} over a floor of {floor} judges nothing")
    chosen = _evenly(len(probe.timesteps), timesteps)
    needed = np.sqrt(np.maximum(limits**2 - floors**2, 1e-24))[chosen]
    probe = thin(probe, timesteps, pictures)
    reference = fidelity.predict(holder, probe)

    def errors(kind: Kind, place: Place, change: float = SCALE - 1) -> np.ndarray:
        with plant(unet, kind, place, 1 + change):
            return np.array(
                [
                    relative_l2(output, right)
                    for output, right in zip(fidelity.predict(holder, probe), reference, strict=True)
                ]
            )

    def least_change(place: Place) -> float | None:
        """The relative change whose error is the one needed; None where `LARGEST_CHANGE` makes less."""
        with np.errstate(divide="ignore"):
            first = float((needed / errors("scaled", place)).min())
            change = min(LARGEST_CHANGE, (SCALE - 1) * first)
            if change < 1e-6:  # lost in the rounding of the weight
                return change
            again = float((needed / errors("scaled", place, change)).min())
        return None if change == LARGEST_CHANGE and again > 1 else change * again

    def some(kind: Kind) -> list[Place]:
        every = candidates(unet, kind)
        return spread(every, min(count, len(every)), seed)

    scaled = {str(place): least_change(place) for place in some("scaled")}
    zeroed = {str(place): errors("head", place) for place in some("head")}
    least = [math.inf if change is None else change for change in scaled.values()]
    median, low, high = (
        None if value == math.inf else value for value in (statistics.median(least), min(least), max(least))
    )
    return Sensitivity(
        median,
        low,
        high,
        len(scaled),
        least.count(math.inf),
        len(zeroed),
        sum(bool((found <= needed).all()) for found in zeroed.values()),
        scaled,
        {place: float(found.max()) for place, found in zeroed.items()},
    )
