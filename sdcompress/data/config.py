"""Which pictures of a data set are used, and how one becomes a training sample."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from sdcompress_engines.errors import UsageError

from sdcompress.data.filters import parse_conditions
from sdcompress.support.bounds import LEAST_PX, MOST_PX, STEP_PX
from sdcompress.support.settings import Settings


class DataConfig(Settings):
    """The `data` section of a recipe. Unknown keys are refused.

    The descriptions of the fields are also the help texts of the command line.
    """

    size_px: int | None = Field(
        None,
        ge=LEAST_PX,
        le=MOST_PX,
        multiple_of=STEP_PX,
        description="Side of the training pictures in pixels; by default the side that the UNet was made for.",
    )
    where: tuple[str, ...] = Field(
        (), description='Use only pictures whose metadata meets every condition, such as "aesthetic >= 7.5".'
    )
    min_size_px: int = Field(
        0,
        ge=0,
        le=10**6,
        description="Use only pictures whose short side has at least this many pixels; with 0, small pictures are"
        " enlarged.",
    )
    max_aspect: float | None = Field(
        None, ge=1, le=1e6, description="Use only pictures whose long side is at most this many times their short side."
    )
    captions: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = Field(
        default_factory=dict,
        description="Metadata columns that hold captions, each with the share at which it is drawn; by default the"
        " first of text, caption and prompt.",
    )
    buckets: bool = Field(
        False,
        description="Use shapes of about equal area instead of squares; each picture gets the shape with the nearest"
        " aspect ratio.",
    )
    crop: Literal["center", "random"] = Field(
        "center",
        description="Position of the crop in a picture whose aspect ratio differs from that of the training shape.",
    )
    views: int = Field(
        1,
        ge=1,
        le=16,
        description="With random crops: crops of each picture in the cache; more give more variety and take more disk.",
    )
    flip: bool = Field(
        False,
        description="Cache the mirrored pictures too and draw one of the two each time; not for pictures with writing.",
    )
    max_unusable: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Stop where a larger share of the pictures is broken or has no caption.",
    )

    @field_validator("where")
    @classmethod
    def _conditions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            parse_conditions(value)
        except UsageError as error:
            raise ValueError(f"{error.what}; expected {error.expected}") from error
        return value

    @model_validator(mode="after")
    def _with_effect(self) -> DataConfig:
        if self.captions and not any(self.captions.values()):
            raise ValueError("captions: every column has the share 0")
        if self.views > 1 and self.crop != "random":
            raise ValueError(f"views {self.views} needs crop random; centered crops of one picture are equal")
        return self
