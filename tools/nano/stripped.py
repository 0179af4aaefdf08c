"""Pictures that have lost their style or their concept, for the training of a CLIP."""

from __future__ import annotations

import torch
import torch.nn.functional as F

TILES = (2, 4)


def strip_style(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns pictures in black on white, outlines with or without dark areas filled: a concept without its style.

    Args:
        pixels: (B, 3, H, W), float32 in [-1, 1].
        generator: of the random numbers.
    """
    count = len(pixels)
    gray = pixels.mean(1, keepdim=True)
    width = 2 * int(torch.randint(1, 4, (), generator=generator)) + 1
    outline = F.max_pool2d(gray, width, 1, width // 2) + F.max_pool2d(-gray, width, 1, width // 2)
    threshold = torch.rand(count, 1, 1, 1, generator=generator) - 0.5
    filled = (gray < threshold) & (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    drawn = torch.where(filled, -1.0, 1 - 2 * outline).clamp(-1, 1)
    return drawn.expand_as(pixels)


def strip_concept(pixels: torch.Tensor, style_of: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns pictures put together from tiles of pictures of one style: a style without a concept.

    Args:
        pixels: (B, 3, H, W), float32.
        style_of: each picture's style, (B,).
        generator: of the random numbers.
    """
    rows = int(TILES[torch.randint(len(TILES), (), generator=generator)])
    size = pixels.shape[-1] // rows
    tiles = pixels.unfold(2, size, size).unfold(3, size, size)  # (B, 3, rows, rows, size, size)
    mixed = torch.empty_like(tiles)
    for style in style_of.unique():
        members = torch.where(style_of == style)[0]
        for row in range(rows):
            for column in range(rows):
                source = members[torch.randperm(len(members), generator=generator)]
                there = torch.randint(rows, (2,), generator=generator)
                mixed[members, :, row, column] = tiles[source, :, there[0], there[1]]
    return mixed.permute(0, 1, 2, 4, 3, 5).reshape(pixels.shape)


def strip(
    pixels: torch.Tensor, style_of: torch.Tensor, shares: tuple[float, float], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a batch in which some pictures lost their style and some their concept, and what each has lost.

    Without this, the judge remembers which picture has which style, and knows a concept by its colors. The first
    picture stays whole, so that every loss has a picture: the mean of none is NaN.

    Args:
        pixels: (B, 3, H, W), float32 in [-1, 1].
        style_of: each picture's style, (B,).
        shares: of the pictures that lose their style, and their concept.
        generator: of the random numbers.
    """
    draw = torch.rand(len(pixels), generator=generator)
    draw[0] = 0.5
    lost = torch.where(draw < shares[0], 1, torch.where(draw > 1 - shares[1], 2, 0))
    pixels = pixels.clone()
    if (without := lost == 1).any():
        pixels[without] = strip_style(pixels[without], generator)
    if (without := lost == 2).any():
        pixels[without] = strip_concept(pixels[without], style_of[without], generator)
    return pixels, lost
