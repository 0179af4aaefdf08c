"""Loads `bench/gpu.py` and the tools beside it, and reads result files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]


def load_script(path: Path) -> ModuleType:
    """Returns a script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(folder: Path) -> dict[str, Any]:
    """Returns the content of gpu.json."""
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return found
