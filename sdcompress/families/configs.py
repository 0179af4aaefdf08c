"""The published configs of each family, kept in `assets/configs`."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "assets" / "configs"
