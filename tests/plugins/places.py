"""The plugins' folders. Importing this module makes the WebUI extension's package importable, as its script does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

PLUGINS = Path(__file__).parents[2] / "plugins"
WEBUI_PLUGIN, COMFYUI_PLUGIN = PLUGINS / "sd_webui_sdcompress", PLUGINS / "comfyui_sdcompress"
sys.path.insert(0, str(WEBUI_PLUGIN))


def deny(monkeypatch: pytest.MonkeyPatch, method: str, path: Path) -> None:
    """Let a method of `Path` fail for this path for lack of permission, which root always has."""
    original = getattr(Path, method)

    def call(self: Path, *args: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args)

    monkeypatch.setattr(Path, method, call)
