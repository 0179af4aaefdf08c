"""CLIP's vocabulary, which all families share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache

from sdcompress.families.configs import CONFIGS

VOCABULARY = "sd1/tokenizer"
"""Its folder in `CONFIGS`, with `vocab.json` and `merges.txt`."""


@cache
def shared_vocabulary() -> Mapping[str, int]:
    """Returns token → number, as the package ships it."""
    vocabulary: dict[str, int] = json.loads((CONFIGS / VOCABULARY / "vocab.json").read_text(encoding="utf-8"))
    return vocabulary
