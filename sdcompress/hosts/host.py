"""A program that makes pictures, and where it takes plugins and engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sdcompress_engines.paths import is_link

RECORD = "installed.json"
"""The name of the file that records what was installed; it lies in the plugin's folder."""


@dataclass(frozen=True)
class Host:
    """A program that makes pictures, and where it takes plugins and engines.

    Paths are relative to the program's folder, with `/`.

    Attributes:
        name: what a user types on the command line.
        title: the program's name in messages.
        plugin: the plugin's folder in `plugins/`.
        extension: the folder that the plugin is installed into.
        marks: what the program's folder contains. At least one path of each entry must exist.
        absent: path that the folder must not contain → name of the host whose folder contains it.
        programs: the scripts that start the program, in its folder.
        signatures: of the engines that the plugin can call, the preferred one first.
        steps: what to do in the program after an install.
        models: the folder that engines are installed into.
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
        """The path of the record of what was installed."""
        return f"{self.extension}/{RECORD}"

    @property
    def folders(self) -> tuple[str, str]:
        """The two folders that an install writes into."""
        return self.extension, self.models

    def owns(self, path: str) -> bool:
        """Returns whether a path is the plugin's folder, or lies in it or in the folder of the engines."""
        return path == self.extension or path.startswith(tuple(f"{folder}/" for folder in self.folders))

    def find_link_above(self, root: Path, path: str) -> Path | None:
        """Returns the outermost link among our folders above a path, or None.

        People may turn the host's own folders into links, such as `extensions` and `models/sdcompress`. Behind other
        links lies what no install has written.

        Args:
            root: the host's folder.
            path: of a file or folder in it.
        """
        above = map(str, reversed(PurePosixPath(path).parents))
        return next((root / folder for folder in above if self.owns(folder) and is_link(root / folder)), None)

    def missing_mark(self, root: Path) -> str | None:
        """Returns the first mark of this host that `root` lacks, or None if `root` is the host's folder."""
        return next(
            (" or ".join(paths) for paths in self.marks if not any((root / path).exists() for path in paths)), None
        )
