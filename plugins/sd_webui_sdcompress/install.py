"""Run by the WebUI at every start. It installs nothing: it reports what is missing and what to type."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path

RUNTIMES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13", "onnxruntime": "onnxruntime"}
"""Module → the package that provides it."""


def find_missing(folder: Path) -> list[str]:
    """Returns a line for each missing part, with the command that installs it."""
    lines = []
    if not (folder / "sdcompress_engines" / "__init__.py").is_file() and util.find_spec("sdcompress_engines") is None:
        lines.append(
            "sdcompress: the extension lacks its engine package. Type where sdcompress is installed: sdcompress install"
            " webui WEBUI ENGINE"
        )
    if not any(util.find_spec(module) for module in RUNTIMES):
        first, *others = RUNTIMES.values()
        lines.append(
            "sdcompress: no runtime for engines is installed. Install the one of your engines, in the version they were"
            f" built with: {sys.executable} -m pip install {first} (or {', or '.join(others)})"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(find_missing(Path(__file__).resolve().parent)))
