"""Run by the WebUI at every start. It installs nothing: it says what is there and what to type."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path

RUNTIMES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13", "onnxruntime": "onnxruntime"}
"""Module → the package that brings it."""


def findings(folder: Path) -> list[str]:
    """What is missing, a line each with the command that helps; nothing where all is there."""
    lines = []
    if not (folder / "sdcompress_engines" / "__init__.py").is_file() and util.find_spec("sdcompress_engines") is None:
        lines.append(
            "sdcompress: the extension lacks its engine package. Type where sdcompress is installed: sdcompress install"
            " webui WEBUI ENGINE"
        )
    if not any(util.find_spec(module) for module in RUNTIMES):
        offers = ", or ".join(RUNTIMES.values())
        lines.append(
            "sdcompress: no runtime for engines is installed. For the kind of yours, and in the version it was built"
            f" with: {sys.executable} -m pip install {offers}"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(findings(Path(__file__).resolve().parent)))
