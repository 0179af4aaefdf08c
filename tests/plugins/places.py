"""The plugins' folders. Importing this module makes the WebUI extension's package importable, as its script does."""

from __future__ import annotations

import sys
from pathlib import Path

PLUGINS = Path(__file__).parents[2] / "plugins"
WEBUI_PLUGIN, COMFYUI_PLUGIN = PLUGINS / "sd_webui_sdcompress", PLUGINS / "comfyui_sdcompress"
sys.path.insert(0, str(WEBUI_PLUGIN))
