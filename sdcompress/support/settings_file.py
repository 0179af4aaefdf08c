"""Settings that people write in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from sdcompress_engines.errors import UsageError


def read_mapping(path: Path, content: str) -> dict[str, Any]:
    """Returns a YAML file's mapping; an empty file is an empty mapping.

    Args:
        path: the file.
        content: what the mapping holds, for the message: "knobs" or "settings".

    Raises:
        UsageError: the file is not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"is not YAML ({error})", where=path) from error
    if not isinstance(values, dict):
        raise UsageError(f"is not a mapping of {content}", where=path)
    return {str(name): value for name, value in values.items()}
