"""Which pictures of a data set are used, and how one becomes a training sample."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DataConfig(BaseModel):
    """The `data` section of a recipe. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size_px: int | None = Field(
        None, ge=64, multiple_of=8, description="Side of the training pictures; none is what the UNet was made for."
    )
    where: tuple[str, ...] = Field(
        (), description='Conditions on numeric metadata, all of which must hold, such as "aesthetic >= 7.5".'
    )
    min_size_px: int = Field(
        0, ge=0, description="Pictures whose short side is smaller are left out; 0 takes all and enlarges."
    )
    max_aspect: float | None = Field(
        None, ge=1, description="Pictures longer than this many times their width (or the other way) are left out."
    )
    captions: dict[str, float] = Field(
        default_factory=dict,
        description="Metadata columns that hold captions, with the share each is drawn at; none is the usual one.",
    )
    buckets: bool = Field(
        False,
        description=(
            "Keep each picture's aspect ratio, to the nearest of a set of shapes of equal area, where a square would"
            " crop it."
        ),
    )
    crop: Literal["center", "random"] = Field(
        "center", description="Where the crop is taken when a picture is longer than its shape."
    )
    views: int = Field(
        1,
        ge=1,
        le=16,
        description="Crops kept of each picture in the cache; with crop: random, more is more variety and more disk.",
    )
    flip: bool = Field(
        False,
        description="Cache the mirrored picture too, and draw one of the two each time; not for pictures with writing.",
    )
    max_unusable: float = Field(
        0.05, ge=0, le=1, description="Share of broken or captionless pictures above which the run stops."
    )
