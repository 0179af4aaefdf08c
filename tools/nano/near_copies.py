"""Whether two pictures are nearly the same: a held-out picture must not be one that a model has as good as seen."""

from __future__ import annotations

import numpy as np
from PIL import Image

SMALL_PX, NEAR = 32, 0.07
"""Two pictures are nearly the same if their RMSE is below this, at this size and in [0, 1]: as near as a training
picture and the same one moved a little and passed through the VAE (`copies.py`)."""


def views(picture: Image.Image, shifts: range) -> np.ndarray:
    """Returns the picture as 32 x 32 pixels in [0, 1], shifted in both directions, (views, 3072).

    Args:
        picture: RGB.
        shifts: in pixels of the small picture; white comes in at the edges.
    """
    small = np.asarray(picture.resize((SMALL_PX, SMALL_PX), Image.Resampling.BOX), dtype=np.float64) / 255
    edge = max(map(abs, shifts))
    padded = np.pad(small, [(edge, edge), (edge, edge), (0, 0)], constant_values=1.0)
    return np.stack(
        [padded[edge + y : edge + y + SMALL_PX, edge + x : edge + x + SMALL_PX].ravel() for y in shifts for x in shifts]
    )


def is_near_copy(picture: Image.Image, others: list[Image.Image]) -> bool:
    """Returns whether a picture is nearly the same as one of others, shifted by up to 1/32 of its side.

    Args:
        picture: RGB.
        others: RGB, of the same concept.
    """
    return bool(others) and bool(find_near_copies([picture], others)[0])


def find_near_copies(pictures: list[Image.Image], others: list[Image.Image]) -> np.ndarray:
    """Returns for each picture, (N,), whether it is nearly the same as one of the others.

    Each is also tried shifted, by up to 1/32 of its side.

    Args:
        pictures: N pictures, RGB.
        others: RGB, at least one.
    """
    fixed = np.concatenate([views(other, range(1)) for other in others])
    squares = (fixed**2).sum(1)
    found = []
    for picture in pictures:
        moved = views(picture, range(-1, 2))
        distances = (moved**2).sum(1)[:, None] + squares - 2 * moved @ fixed.T
        found.append(distances.min() < NEAR**2 * fixed.shape[1])
    return np.array(found)
