"""Fixtures that several files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from sdcompress_engines.store import EngineStore


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    """An empty store."""
    return EngineStore(tmp_path / "store")
