"""Which file of a drawn data set holds what, and what is drawn together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdcompress.data.drawn import latents_name
from sdcompress.generate.settings import GenerateSettings


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together.

    Attributes:
        numbers: of the pictures.
        latents: name of the file with their latents; None where latents are not written.
        pictures: names of their files.
    """

    numbers: range
    latents: str | None
    pictures: list[str]

    @property
    def files(self) -> list[str]:
        """Names of all its files."""
        return [*self.pictures, *([self.latents] if self.latents else [])]


class Layout:
    """Which file holds what.

    Args:
        prompts: what the pictures show, in turn.
        settings: of the pictures, with steps and guidance scale.

    Attributes:
        batches: in the order in which they are drawn.
    """

    def __init__(self, prompts: Sequence[str], settings: GenerateSettings) -> None:
        self.prompts, self.settings = prompts, settings
        self.batches = []
        for first in range(0, settings.count, settings.batch_size):
            numbers = range(first, min(first + settings.batch_size, settings.count))
            pictures = [f"{i:06d}.{settings.picture_format}" for i in numbers]
            self.batches.append(Batch(numbers, latents_name(first) if settings.latents else None, pictures))

    def files(self) -> list[str]:
        """Returns the names of all files with pictures or latents."""
        return [name for batch in self.batches for name in batch.files]

    def prompt_of(self, number: int) -> str:
        """Returns the prompt of a picture."""
        return self.prompts[number % len(self.prompts)]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the row of each picture in `metadata.jsonl`."""
        for batch in self.batches:
            for i, name in zip(batch.numbers, batch.pictures, strict=True):
                yield {
                    "file_name": name,
                    "text": self.prompt_of(i),
                    "seed": self.settings.seed + i,
                    "prompt_index": i % len(self.prompts),
                    "steps": self.settings.steps,
                    "guidance_scale": self.settings.guidance_scale,
                    **({"latents": batch.latents, "latents_row": i - batch.numbers[0]} if batch.latents else {}),
                }
