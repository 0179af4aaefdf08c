"""Which optimization profile of an engine fits a call; where none does, an error that names the build flags."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

from ..errors import EngineMismatch
from .base import TensorSpec

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]
"""One optimization profile: input → (min, opt, max)."""

# Axis → its name in messages, the build flag that sets its range, and whether it counts latent pixels.
_UNITS = {
    "batch": ("batch", "--batch", False),
    "height": ("height", "--height", True),
    "width": ("width", "--width", True),
    "image_height": ("height", "--height", False),
    "image_width": ("width", "--width", False),
    "tokens": ("tokens", "--tokens", False),
}


def choose_profile(profiles: Sequence[Ranges], shapes: Mapping[str, Shape]) -> int | None:
    """Returns the index of the profile that fits these shapes best, or None.

    That is one tuned for exactly these shapes, else the narrowest that contains them; the first of several equal ones.

    Args:
        profiles: of the engine.
        shapes: of the inputs, by name.
    """
    fitting = [index for index, profile in enumerate(profiles) if _contains(profile, shapes)]
    return min(
        fitting,
        key=lambda index: (
            any(profiles[index][name][1] != shape for name, shape in shapes.items()),
            _spread(profiles[index]),
        ),
        default=None,
    )


def make_shape_error(
    profiles: Sequence[Ranges],
    shapes: Mapping[str, Shape],
    inputs: Iterable[TensorSpec],
    component: str,
    vae_scale: int,
    where: str | PathLike[str] | None,
) -> EngineMismatch:
    """Returns the error for shapes outside every profile: the nearest profile in pixels, and the flags that widen it.

    Args:
        profiles: of the engine.
        shapes: of the inputs, by name.
        inputs: with the axis names of the graph; an axis without a name gets no flag.
        component: the engine's. `--batch` counts samples of the UNet, and guidance makes two of a picture, so a VAE is
            built for half of it.
        vae_scale: pixels for each latent pixel.
        where: the engine's path, for the message.
    """
    calls = 2 if component.startswith("vae") else 1
    nearest = min(profiles, key=lambda profile: _distance(profile, shapes))
    requested, accepted, flags = [], [], []
    for label, flag, scale, size, (least, best, most) in _axes(nearest, shapes, inputs, vae_scale):
        unit = " px" if label in ("height", "width") else ""
        requested.append(f"{label} {size * scale}{unit}")
        accepted.append(f"{label} {least * scale}" + (f" to {most * scale}" if most != least else "") + unit)
        if flag and not least <= size <= most:
            factor = calls if label == "batch" else scale
            flags.append(f"{flag} {min(least, size) * factor}:{best * factor}:{max(most, size) * factor}")
    which = "the engine's profile" if len(profiles) == 1 else f"each of the engine's {len(profiles)} profiles"
    hint = f"build it with {' '.join(flags)}" if flags else "build it with a wider profile"
    return EngineMismatch(
        f"{', '.join(requested)} is outside {which}",
        where=where,
        expected=", ".join(accepted) + ("" if len(profiles) == 1 else ", as in the nearest"),
        hint=hint,
    )


def axis_names(name: str, sizes: Sequence[int], known: Any) -> tuple[int | str, ...]:
    """Returns the shape of a tensor with names for its free axes.

    Args:
        name: of the tensor; an axis that `known` does not name is `name.axis`.
        sizes: negative for a free axis.
        known: the shape in the manifest; ignored where it does not fit.
    """
    named: Sequence[Any] = (
        known if isinstance(known, (list, tuple)) and len(known) == len(sizes) else [None] * len(sizes)
    )
    return tuple(
        int(size) if size >= 0 else given if isinstance(given, str) else f"{name}.{axis}"
        for axis, (size, given) in enumerate(zip(sizes, named, strict=True))
    )


def _contains(profile: Ranges, shapes: Mapping[str, Shape]) -> bool:
    return all(
        len(profile[name][0]) == len(shape)
        and all(
            least <= size <= most for least, size, most in zip(profile[name][0], shape, profile[name][2], strict=True)
        )
        for name, shape in shapes.items()
    )


def _spread(profile: Ranges) -> float:
    """Returns how wide a profile is: the sum over its axes of log(max / min)."""
    return sum(
        math.log(high / max(low, 1))
        for least, _, most in profile.values()
        for low, high in zip(least, most, strict=True)
        if high > low
    )


def _distance(profile: Ranges, shapes: Mapping[str, Shape]) -> float:
    """Returns how far outside a profile the shapes are: the sum of the logarithms of the factors to their ranges."""
    axes = (
        (least, size, most)
        for name, shape in shapes.items()
        for least, size, most in zip(profile[name][0], shape, profile[name][2], strict=True)
    )
    return sum(abs(math.log(max(size, 1) / max(min(max(size, least), most), 1))) for least, size, most in axes)


def _axes(
    profile: Ranges, shapes: Mapping[str, Shape], inputs: Iterable[TensorSpec], vae_scale: int
) -> list[tuple[str, str | None, int, int, tuple[int, int, int]]]:
    """Returns each free axis once: label, build flag, scale to the label's unit, size of the call, range.

    Size and range are in the graph's units.
    """
    found: dict[str, tuple[str, str | None, int, int, tuple[int, int, int]]] = {}
    for spec in inputs:
        for axis, free in enumerate(spec.shape):
            if isinstance(free, str):
                label, flag, latent = _UNITS.get(free, (free, None, False))
                least, best, most = (shape[axis] for shape in profile[spec.name])
                found.setdefault(
                    free, (label, flag, vae_scale if latent else 1, shapes[spec.name][axis], (least, best, most))
                )
    return list(found.values())
