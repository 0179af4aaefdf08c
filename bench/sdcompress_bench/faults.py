"""Plants faults into a UNet, to test whether a gate on relative L2 detects them, and how small they can be.

A backend can go wrong in a few ways that leave pictures plausible: a weight packed with a wrong scale, an attention
head lost in a fused kernel, values beyond the range of fp16. Each can be planted in memory and removed again.
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
"""The factor of a `scaled` weight."""
OVERFLOW_SHARE = 0.01
"""Share of a layer's output, its largest values, that a planted overflow changes.

If the values are normally distributed, clamping this share is an error of 4% of the layer: not less than `SCALE`'s.
"""
LARGEST_CHANGE = 1.0
"""Where the search for the least detected change ends: a doubled weight."""


@dataclass(frozen=True)
class Place:
    """The place of a fault.

    Attributes:
        layer: dotted name of a convolution or linear layer in the UNet; for a head, its attention's output projection.
        family: `convolution`, `linear`, `self-attention` or `cross-attention`.
        head: number of the head, for kind `head`.
    """

    layer: str
    family: str
    head: int | None = None

    def __str__(self) -> str:
        return self.layer if self.head is None else f"{self.layer.removesuffix('.to_out.0')} head {self.head}"


@dataclass(frozen=True)
class Sensitivity:
    """How small a fault a gate detects.

    Attributes:
        least: the smallest relative change of one weight tensor that exceeds the limit, median over the places; None
            where that is over `LARGEST_CHANGE`.
        least_low, least_high: its range over the places.
        places: number of places.
        blind: number of places where no change up to `LARGEST_CHANGE` is detected.
        heads: number of attention heads, zeroed one at a time.
        heads_unseen: number of heads whose error stays within the limit.
        scaled: place → least detected change, None where none is detected.
        zeroed: head → worst relative L2 with that head zeroed.
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
    """Returns every place for a fault of a kind: each attention head, or each convolution and linear layer.

    Raises:
        ModelError: this is no PyTorch UNet, or it has no such place.
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
    """Returns `count` places, spread over the families of layers and over the UNet's depth.

    Args:
        among: the places to choose from, in the order of depth.
        count: how many are chosen.
        seed: chooses among neighbors.

    Raises:
        ModelError: there are fewer places.
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
    """Returns places of a UNet for a fault; see `spread`.

    Args:
        unet: a PyTorch UNet.
        kind: of the fault.
        count: how many places.
        seed: chooses among neighbors.

    Raises:
        ModelError: this is no PyTorch UNet, or it has fewer places.
    """
    return spread(candidates(unet, kind), count, seed)


@contextmanager
def plant(unet: torch.nn.Module, kind: Kind, place: Place, scale: float = SCALE) -> Iterator[None]:
    """Plant a fault in the UNet for the block. After it every weight is bit for bit what it was.

    Args:
        unet: the UNet in PyTorch.
        kind: `scaled` multiplies the layer's weight by `scale`. `head` zeroes what the output projection reads of one
            head. `overflow` makes the layer's largest values infinite, a share of `OVERFLOW_SHARE`, as where only they
            exceed fp16. `saturated` clamps them to the largest of the other values, as some runtimes do.
        place: where.
        scale: factor of the weight, for `scaled`.
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
    """Returns the magnitude that `OVERFLOW_SHARE` of the values reach, at least one value.

    More values reach it where several are equal, as in the rows of a time embedding.
    """
    return size.flatten().topk(max(1, round(OVERFLOW_SHARE * size.numel()))).values[-1]


def thin(probe: Probe, timesteps: int, pictures: int) -> Probe:
    """Returns a smaller probe.

    Args:
        probe: the whole one.
        timesteps: at most this many are kept, evenly spread, the first and the last among them.
        pictures: at most this many are kept, the first ones.
    """
    chosen = _evenly(len(probe.timesteps), timesteps)
    kept: dict[str, Any] = {
        field: None if (value := getattr(probe, field)) is None else value[:pictures]
        for field in ("encoder_hidden_states", "text_embeds", "time_ids")
    }
    return replace(
        probe, latents=probe.latents[chosen, :pictures], timesteps=tuple(probe.timesteps[i] for i in chosen), **kept
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
    """Returns how small a fault a gate detects in a backend.

    The error is nearly linear in the change. So at each place it is measured at 2%, and once more where the line meets
    the limit. A fault adds to the backend's own error as independent errors do, in squares: the sum is over the limit
    where the fault alone is over sqrt(limit² - floor²). With `floor` 0 the answer is the cautious one.

    Args:
        model: a PyTorch pipeline or UNet in fp32; it is unchanged afterwards.
        probe: the UNet's inputs.
        limit: the gate's limit on relative L2: one figure, or one for each of the probe's timesteps.
        floor: the backend's error without a fault, likewise.
        count: places for a scaled weight, and for a zeroed head; fewer where the UNet has fewer.
        seed: chooses the places.
        timesteps, pictures: how much of the probe is used; 3 × `count` UNet calls of `pictures` at each timestep.

    Raises:
        ModelError: this is no PyTorch UNet in fp32.
        ValueError: a limit is not a positive number, or a floor is not a number.
    """
    holder = model if hasattr(model, "unet") else SimpleNamespace(unet=model)
    unet = holder.unet
    if not isinstance(unet, torch.nn.Module) or unet.dtype != torch.float32:
        raise ModelError(
            f"{type(unet).__name__} is no PyTorch UNet in fp32", expected="the reference that the gate compares with"
        )
    detectable = _detectable_errors(len(probe.timesteps), limit, floor)[_evenly(len(probe.timesteps), timesteps)]
    test = _FaultTest(holder, thin(probe, timesteps, pictures), detectable)

    def choose(kind: Kind) -> list[Place]:
        every = candidates(unet, kind)
        return spread(every, min(count, len(every)), seed)

    scaled = {str(place): test.least_change(place) for place in choose("scaled")}
    zeroed = {str(place): test.errors("head", place) for place in choose("head")}
    least = [math.inf if change is None else change for change in scaled.values()]
    median, low, high = (
        None if value == math.inf else value for value in (statistics.median(least), min(least), max(least))
    )
    return Sensitivity(
        least=median,
        least_low=low,
        least_high=high,
        places=len(scaled),
        blind=least.count(math.inf),
        heads=len(zeroed),
        heads_unseen=sum(bool((errors <= detectable).all()) for errors in zeroed.values()),
        scaled=scaled,
        zeroed={place: float(errors.max()) for place, errors in zeroed.items()},
    )


def _detectable_errors(count: int, limit: float | Sequence[float], floor: float | Sequence[float]) -> np.ndarray:
    """Returns for each of `count` timesteps the relative L2 above which a fault alone exceeds the limit.

    Raises:
        ValueError: a limit is not a positive number, or a floor is not a number.
    """
    limits, floors = (np.broadcast_to(np.asarray(given, dtype=np.float64), count) for given in (limit, floor))
    if not (np.isfinite(limits) & np.isfinite(floors) & (limits > 0)).all():
        raise ValueError(f"a gate of {limit} over a floor of {floor} judges nothing")
    return np.sqrt(np.maximum(limits**2 - floors**2, 1e-24))


class _FaultTest:
    """Plants faults into a UNet and measures their errors.

    Args:
        holder: has the UNet as `unet`.
        probe: its inputs.
        detectable: for each timestep of the probe, the error that the gate detects.
    """

    def __init__(self, holder: Any, probe: Probe, detectable: np.ndarray) -> None:
        self.holder, self.probe, self.detectable = holder, probe, detectable
        self.reference = fidelity.predict(holder, probe)

    def errors(self, kind: Kind, place: Place, change: float = SCALE - 1) -> np.ndarray:
        """Returns the relative L2 at each timestep with a fault.

        Args:
            kind: of the fault.
            place: where it is planted.
            change: relative change of the weight, for `scaled`.
        """
        with plant(self.holder.unet, kind, place, 1 + change):
            outputs = fidelity.predict(self.holder, self.probe)
        return np.array([relative_l2(*pair) for pair in zip(outputs, self.reference, strict=True)])

    def least_change(self, place: Place) -> float | None:
        """Returns the smallest relative change of the weight that is detected, or None over `LARGEST_CHANGE`."""
        with np.errstate(divide="ignore"):
            first = float((self.detectable / self.errors("scaled", place)).min())
            change = min(LARGEST_CHANGE, (SCALE - 1) * first)
            if change < 1e-6:  # lost in the rounding of the weight
                return change
            again = float((self.detectable / self.errors("scaled", place, change)).min())
        return None if change == LARGEST_CHANGE and again > 1 else change * again
