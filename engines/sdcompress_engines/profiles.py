"""The shapes an engine is built for, in the units people type: calls, pixels, tokens; and by component the tensors'
shapes that follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .errors import UsageError
from .signature import CONTEXT_TOKENS, signature

Range = tuple[int, int, int]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """The shapes one optimization profile takes: input → (min, opt, max).

    TensorRT tunes for opt; min = max makes an input static.
    """

    shapes: Mapping[str, tuple[Shape, Shape, Shape]]

    def __post_init__(self) -> None:
        for name, (least, best, most) in self.shapes.items():
            if not len(least) == len(best) == len(most) or not all(
                0 < a <= b <= c for a, b, c in zip(least, best, most, strict=True)
            ):
                raise UsageError(
                    f"profile of {name}: {least} / {best} / {most}", expected="min ≤ opt ≤ max on every axis"
                )


def parse_range(text: str, what: str = "range") -> Range:
    """`512` → (512, 512, 512), one fixed size; `512:768:1024` → min, opt, max.

    Raises:
        UsageError: neither form, or not min ≤ opt ≤ max.
    """
    numbers = [int(part) for part in text.split(":")] if re.fullmatch(r"\d+(:\d+:\d+)?", text) else []
    values = numbers * 3 if len(numbers) == 1 else numbers
    if len(values) != 3 or not 0 < values[0] <= values[1] <= values[2]:
        raise UsageError(f"{what} {text!r}", expected="one size, or MIN:OPT:MAX that do not fall, like 512:768:1024")
    return values[0], values[1], values[2]


@dataclass(frozen=True)
class ShapeRanges:
    """One optimization profile as a person thinks of it, each field (min, opt, max).

    Attributes:
        batch: samples of one UNet call; guidance makes two of a picture.
        height, width: of the picture, in pixels.
        tokens: of the UNet's context: 77 for each part of a long prompt.
        pictures: that the VAE sees at once; None is half of `batch`, as guidance makes it. Without guidance it is
            `batch`.
    """

    batch: Range
    height: Range
    width: Range
    tokens: Range
    pictures: Range | None = None

    @property
    def is_static(self) -> bool:
        """Whether only one shape fits, so that a CUDA graph of it can be replayed."""
        return all(least == most for least, _, most in self._given().values())

    @property
    def vae_batch(self) -> Range:
        """The pictures that the VAE sees at once."""
        if self.pictures is not None:
            return self.pictures
        _, best, most = (-(-value // 2) for value in self.batch)
        return (1, best, most) if self.batch[0] != self.batch[2] else (best, best, best)

    def __str__(self) -> str:
        return " ".join(f"{name} {format_range(value)}" for name, value in self._given().items())

    def _given(self) -> dict[str, Range]:
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}


def format_range(values: Iterable[int]) -> str:
    """As `parse_range` reads it."""
    values = tuple(values)
    return str(values[0]) if len(set(values)) == 1 else ":".join(map(str, values))


@dataclass(frozen=True)
class Preset:
    """A named profile. Sizes are pixels, or shares of the size the model was trained on."""

    note: str
    batch: Range
    size: tuple[float, float, float]
    tokens: Range
    relative: bool = False

    def ranges(self, native_px: int, step_px: int) -> ShapeRanges:
        """For a model trained on `native_px` whose sizes are multiples of `step_px`."""
        least, best, most = (
            (round(share * native_px / step_px) or 1) * step_px if self.relative else int(share) for share in self.size
        )
        return ShapeRanges(self.batch, (least, best, most), (least, best, most), self.tokens)


PRESETS = {
    "dynamic": Preset(
        "up to 4 pictures with guidance, half to one and a half of the model's own size",
        (1, 2, 8),
        (0.5, 1, 1.5),
        (77, 77, 154),
        relative=True,
    ),
    "webui": Preset(
        "what a WebUI asks for: cond and uncond apart and together, prompts of three parts, hires-fix to twice the"
        " size",
        (1, 2, 8),
        (0.75, 1, 2),
        (77, 77, 231),
        relative=True,
    ),
    "sd15-512": Preset(
        "one 512 px picture with guidance; static, the fastest", (2, 2, 2), (512, 512, 512), (77, 77, 77)
    ),
    "sd15-dynamic": Preset(
        "up to 4 pictures with guidance, 256 to 1024 px", (1, 2, 8), (256, 512, 1024), (77, 77, 154)
    ),
    "sdxl-1024": Preset(
        "one 1024 px picture with guidance; static, the fastest", (2, 2, 2), (1024, 1024, 1024), (77, 77, 77)
    ),
}
DEFAULT_PRESET = "dynamic"


def parse_profile(text: str, native_px: int, step_px: int) -> ShapeRanges:
    """A preset's name, `batch=1:2:8,height=512,width=512:768:1024,tokens=77`, or a preset and what differs from it:
    `webui,batch=1:2:4`.

    What is left out is as in `dynamic`; a height or width given alone stands for both.

    Raises:
        UsageError: no such preset or field, or a range that is none.
    """
    parts = [part.strip() for part in text.split(",")]
    preset = PRESETS[parts.pop(0)] if parts[0] in PRESETS else PRESETS[DEFAULT_PRESET]
    known = [field.name for field in fields(ShapeRanges)]
    found: dict[str, Range] = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name.strip() not in known or not value:
            raise UsageError(
                f"profile {text!r}",
                expected=f"one of {', '.join(PRESETS)}, or {','.join(f'{field}=MIN:OPT:MAX' for field in known)}",
            )
        found[name.strip()] = parse_range(value.strip(), f"--{name.strip()}")
    for one, other in (("height", "width"), ("width", "height")):
        if one in found and other not in found:
            found[other] = found[one]
    return replace(preset.ranges(native_px, step_px), **found)


def check_ranges(ranges: ShapeRanges, step_px: int) -> None:
    """Refuse shapes that a UNet has no place for.

    Args:
        step_px: what a picture's sides must be divisible by: 8·2^(levels-1) for a UNet under an f8 VAE.

    Raises:
        UsageError: a side that is no multiple of `step_px`, or tokens that are no multiple of 77.
    """
    for name, step in (("height", step_px), ("width", step_px), ("tokens", CONTEXT_TOKENS)):
        values: Range = getattr(ranges, name)
        if any(value % step for value in values):
            near = format_range(max(step, round(value / step) * step) for value in values)
            raise UsageError(
                f"--{name} {format_range(values)}",
                expected=f"multiples of {step}, with this model",
                hint=f"--{name} {near}",
            )


def component_profile(
    component: str, config: Mapping[str, Any], ranges: ShapeRanges, vae_scale: int, host: str = "diffusers"
) -> Profile:
    """The input shapes of one component for these ranges.

    Text encoders take every batch from 1, as prompts and negative prompts are encoded apart. The VAE sees a picture
    where guidance shows the UNet two, so its batch is half where `pictures` does not give it; its activations are the
    largest of all and would otherwise decide the memory an engine needs.

    Args:
        vae_scale: pixels a latent pixel, 8 for Stable Diffusion.
    """
    batch = ranges.batch
    if component.startswith("text_encoder"):
        batch = (1, 1, max(ranges.batch[2], ranges.vae_batch[2]))
    elif component.startswith("vae"):
        batch = ranges.vae_batch
    sizes = {
        "batch": batch,
        "tokens": ranges.tokens,
        "image_height": ranges.height,
        "image_width": ranges.width,
        "height": tuple(value // vae_scale for value in ranges.height),
        "width": tuple(value // vae_scale for value in ranges.width),
    }

    def shape(of: tuple[int | str, ...], at: int) -> Shape:
        return tuple(sizes[size][at] if isinstance(size, str) else size for size in of)

    return Profile(
        {
            spec.name: (shape(spec.shape, 0), shape(spec.shape, 1), shape(spec.shape, 2))
            for spec in signature(component, config, host=host).inputs
        }
    )
