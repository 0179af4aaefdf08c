"""CLIP's vocabulary, which all families share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache

from sdcompress.families.configs import CONFIGS

VOCABULARY = "sd1/tokenizer"  # CLIP's, which all families share


@cache
def _vocabulary() -> dict[str, int]:
    vocabulary: dict[str, int] = json.loads((CONFIGS / VOCABULARY / "vocab.json").read_text(encoding="utf-8"))
    return vocabulary


def shared_vocabulary() -> Mapping[str, int]:
    """CLIP's vocabulary, token → number, as the package carries it."""
    return _vocabulary()
