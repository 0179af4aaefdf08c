"""A program that makes pictures, and where it takes plugins and engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

RECORD = "installed.json"


@dataclass(frozen=True)
class Host:
    """A program that makes pictures, and where it takes plugins and models.

    Attributes:
        name: as it is typed. title: as people call it.
        plugin: its folder in `plugins/`. extension: where that goes. models: where engines go.
        marks: what its folder holds; of each entry one alternative.
        absent: what it does not hold, and which host that would be.
        programs: what it is started with, in its folder.
        signatures: of the engines its plugin calls, the first one preferred.
        steps: what to do in the program after an install.
    """

    name: str
    title: str
    plugin: str
    extension: str
    marks: tuple[tuple[str, ...], ...]
    programs: tuple[str, ...]
    signatures: tuple[str, ...]
    steps: tuple[str, ...]
    absent: Mapping[str, str] = field(default_factory=dict)
    models: str = "models/sdcompress"

    @property
    def record(self) -> str:
        return f"{self.extension}/{RECORD}"

    def missing(self, root: Path) -> str | None:
        """What of this host's marks `root` lacks, or None where it is one."""
        return next(
            (" or ".join(each) for each in self.marks if not any((root / path).exists() for path in each)), None
        )
