"""The settings of a drawn data set, and the prompts it shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdcompress_engines.errors import UsageError

from sdcompress.backends.registry import backend_name
from sdcompress.data.records import read_prompt_lines
from sdcompress.support.bounds import (
    LEAST_PX,
    MOST_BATCH,
    MOST_GUIDANCE,
    MOST_PICTURES,
    MOST_PX,
    MOST_SEED,
    MOST_STEPS,
    STEP_PX,
)

SAVE_OPTIONS: dict[str, dict[str, Any]] = {"webp": {"quality": 95}, "png": {}}
"""Picture format → Pillow's options for it."""


@dataclass(frozen=True)
class GenerateSettings:
    """What decides every byte of a drawn data set, besides the teacher, the prompts and the device.

    Attributes:
        count: number of pictures. Picture i shows prompt i % len(prompts) and is drawn from seed + i.
        batch_size: pictures drawn at once. More is faster and takes more memory. It may change last bits, because sums
            are computed in another order.
        steps: denoising steps; None is the teacher's own number.
        guidance_scale: of classifier-free guidance, 1 turns it off; None is the teacher's own scale.
        size_px: side of the pictures, a multiple of 8; None is the side that the UNet was made for.
        seed: of the first picture.
        backend: a name or alias of the registry, or `auto`.
        picture_format: webp (quality 95, a fifth of the disk) or png (lossless).
        latents: write the latents of the pictures, too: 2 bytes a value, 32 KiB a picture of SD1.x at 512 px.
    """

    count: int
    batch_size: int = 16
    steps: int | None = None
    guidance_scale: float | None = None
    size_px: int | None = None
    seed: int = 0
    backend: str = "torch"
    picture_format: Literal["webp", "png"] = "webp"
    latents: bool = True

    def check(self) -> None:
        """Refuse invalid settings. One message names all of them.

        Raises:
            UsageError: an invalid count, batch size, picture size, seed or number of steps, or an unknown format or
                backend.
        """
        backend_name(self.backend)
        checks = (
            (1 <= self.count <= MOST_PICTURES, f"{self.count} pictures, 1 to {MOST_PICTURES:,} are possible"),
            (1 <= self.batch_size <= MOST_BATCH, f"batches of {self.batch_size}, 1 to {MOST_BATCH:,} are possible"),
            (
                self.steps is None or 1 <= self.steps <= MOST_STEPS,
                f"{self.steps} steps, 1 to {MOST_STEPS} are possible",
            ),
            (
                self.guidance_scale is None or 0 <= self.guidance_scale <= MOST_GUIDANCE,
                f"guidance {self.guidance_scale}, 0 to {MOST_GUIDANCE:g} is possible",
            ),
            (
                self.size_px is None or (LEAST_PX <= self.size_px <= MOST_PX and self.size_px % STEP_PX == 0),
                f"{self.size_px} px, a multiple of {STEP_PX} from {LEAST_PX} to {MOST_PX} is needed",
            ),
            (0 <= self.seed <= MOST_SEED, f"seed {self.seed}, 0 to {MOST_SEED} is possible"),
            (
                self.picture_format in SAVE_OPTIONS,
                f"format {self.picture_format!r}, {' or '.join(SAVE_OPTIONS)} is needed",
            ),
        )
        faults = [text for is_valid, text in checks if not is_valid]
        if faults:
            raise UsageError(f"cannot draw: {'; '.join(faults)}")


def read_prompts(file: Path) -> list[str]:
    """Returns the prompts of a text file, one a line. Empty lines are left out.

    Raises:
        UsageError: there is no such file.
        DataError: it cannot be read, is no UTF-8 text, or holds no prompt.
    """
    if not file.exists():
        raise UsageError("does not exist", where=file, expected="a text file of prompts, one a line")
    return read_prompt_lines(file)
