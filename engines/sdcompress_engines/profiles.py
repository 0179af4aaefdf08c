"""The shapes that an engine is built for: in samples, pixels and tokens, and as tensor shapes of each component."""

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
    """The shapes of one optimization profile: input → (min, opt, max).

    TensorRT tunes for opt. An input with min = max is static.

    Raises:
        UsageError: not min ≤ opt ≤ max on every axis.
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


MOST = {"batch": 1024, "height": 8192, "width": 8192, "tokens": 100 * CONTEXT_TOKENS}
"""Largest value of each range."""


def parse_range(text: str, what: str = "range") -> Range:
    """Returns min, opt and max: `512` is one fixed size, `512:768:1024` a range.

    Args:
        text: one of the two forms.
        what: the name of the range, a key of `MOST`.

    Raises:
        UsageError: neither form, not min ≤ opt ≤ max, or over the limit.
    """
    number = "[0-9]{1,9}"
    numbers = [int(part) for part in text.split(":")] if re.fullmatch(f"{number}(:{number}:{number})?", text) else []
    values = numbers * 3 if len(numbers) == 1 else numbers
    most = MOST.get(what, MOST["height"])
    if len(values) != 3 or not 0 < values[0] <= values[1] <= values[2] <= most:
        raise UsageError(
            f"{what} {text!r}",
            expected=f"one size, or MIN:OPT:MAX with MIN ≤ OPT ≤ MAX ≤ {most}, like 512:768:1024",
        )
    return values[0], values[1], values[2]


@dataclass(frozen=True)
class ShapeRanges:
    """One optimization profile in the units of the command line; each field is (min, opt, max).

    Attributes:
        batch: samples of one UNet call; guidance makes two of a picture.
        height, width: of the picture, in pixels.
        tokens: of the UNet's context: 77 for each part of a long prompt.
        pictures: of one VAE call; None is half of `batch`, which is right with guidance. Without guidance it has to be
            `batch`.
    """

    batch: Range
    height: Range
    width: Range
    tokens: Range
    pictures: Range | None = None

    @property
    def vae_batch(self) -> Range:
        """The pictures of one VAE call."""
        if self.pictures is not None:
            return self.pictures
        _, best, most = (-(-value // 2) for value in self.batch)
        return (1, best, most) if self.batch[0] != self.batch[2] else (best, best, best)

    def __str__(self) -> str:
        present = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        return " ".join(f"{name} {format_range(value)}" for name, value in present.items())


def format_range(values: Iterable[int]) -> str:
    """Returns a range in the form that `parse_range` reads."""
    values = tuple(values)
    return str(values[0]) if len(set(values)) == 1 else ":".join(map(str, values))


@dataclass(frozen=True)
class Preset:
    """A named profile.

    Attributes:
        note: what it is for.
        batch, tokens: see `ShapeRanges`.
        size: of height and width: pixels, or where `relative` shares of the size the model was trained on.
        pictures: see `ShapeRanges`.
    """

    note: str
    batch: Range
    size: tuple[float, float, float]
    tokens: Range
    relative: bool = False
    pictures: Range | None = None

    def ranges(self, native_px: int, step_px: int) -> ShapeRanges:
        """Returns the ranges for a model that was trained on `native_px` and whose sizes are multiples of `step_px`."""
        least, best, most = (
            (round(share * native_px / step_px) or 1) * step_px if self.relative else int(share) for share in self.size
        )
        return ShapeRanges(self.batch, (least, best, most), (least, best, most), self.tokens, self.pictures)


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
    "few-step": Preset(
        "one picture without guidance, of the model's own size; static, the fastest",
        (1, 1, 1),
        (1, 1, 1),
        (77, 77, 77),
        relative=True,
        pictures=(1, 1, 1),
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
GUIDANCE_FREE_PRESET = "few-step"
"""The default for a model that was trained to draw without guidance."""


def parse_profile(text: str, native_px: int, step_px: int, default: str = DEFAULT_PRESET) -> ShapeRanges:
    """Returns the shape ranges that a text describes.

    The text is a preset's name, `batch=1:2:8,height=512,width=512:768:1024,tokens=77`, or a preset with changes:
    `webui,batch=1:2:4`. Fields that are left out are those of `default`. A height or width alone counts for both, and
    without guidance a batch for the pictures too.

    Args:
        text: the description.
        native_px: the size that the model was trained on.
        step_px: what its sizes are multiples of.
        default: the preset that is changed where the text names none.

    Raises:
        UsageError: no such preset or field, or a malformed range.
    """
    parts = [part.strip() for part in text.split(",")]
    preset = PRESETS[parts.pop(0) if parts[0] in PRESETS else default]
    known = [field.name for field in fields(ShapeRanges)]
    given: dict[str, Range] = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name.strip() not in known or not value:
            raise UsageError(
                f"profile {text!r}",
                expected=f"one of {', '.join(PRESETS)}, or {','.join(f'{field}=MIN:OPT:MAX' for field in known)}",
            )
        given[name.strip()] = parse_range(value.strip(), name.strip())
    for one, other in (("height", "width"), ("width", "height")):
        if one in given and other not in given:
            given[other] = given[one]
    if preset.pictures is not None and "batch" in given:
        given.setdefault("pictures", given["batch"])
    return replace(preset.ranges(native_px, step_px), **given)


def check_ranges(ranges: ShapeRanges, step_px: int) -> None:
    """Refuse shapes that a UNet cannot compute.

    Args:
        ranges: the shapes.
        step_px: number that must divide a picture's sides: 8·2^(levels-1) for a UNet with an f8 VAE.

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
    """Returns the input shapes of one component for these ranges.

    Text encoders take every batch from 1 on, because prompts and negative prompts are encoded apart. With guidance the
    UNet has two samples for each picture of the VAE, so the VAE's batch is half of it where `pictures` does not give
    it. The VAE's activations are the largest of all, and a batch as large as the UNet's would decide the memory.

    Args:
        component: see `signature`.
        config: of the component, from diffusers or transformers.
        ranges: the shapes.
        vae_scale: pixels for each latent pixel, 8 for Stable Diffusion.
        host: a key of `signature.HOSTS`.
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
