"""Artifacts on disk, and what a folder holds before and after a command."""

from __future__ import annotations

import os
from pathlib import Path

from sdcompress_engines.manifest import write_manifest


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Every path below a folder with its content: bytes of a file, target of a link, None of a folder."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def make_artifact(folder: Path, kind: str = "results") -> Path:
    """An artifact with one file in a subfolder."""
    (folder / "part").mkdir(parents=True)
    (folder / "part/file").write_text("before")
    write_manifest(folder, kind)
    return folder
