"""Names and texts as somebody may put them into a manifest, a record or results, for property tests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from sdcompress_engines.manifest import canonical

_PARTS = ["..", ".", "", "a", "x.py", "__init__.py", "scripts", "C:", "con", "nul.txt", "a.", "a ", "~", "link", "\\"]
NAMES: st.SearchStrategy[str] = st.one_of(
    st.lists(st.sampled_from(_PARTS), min_size=1, max_size=6).map("/".join),
    st.lists(st.sampled_from(_PARTS), min_size=1, max_size=6).map("\\".join),
    st.text(max_size=60),
    st.sampled_from(
        ["/etc/passwd", "../../../scripts/x.py", "//host/share", "\\\\host\\share", "C:x", "a" * 300, "\0"]
    ),
)
"""Names of files: plain ones, and such as lead elsewhere."""
TEXTS: st.SearchStrategy[str] = st.one_of(
    st.text(max_size=80),
    st.lists(
        st.sampled_from(
            ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![x](http://x/y.png)", "[x](javascript:a)",
             "\n---\n", "---", "|", "\\", "`", "```\n", "\n# x\n", "\n\n", "- ", "1. ", "</pre>", "</style>", "\"", "'",
             "<!--", "]]>", "&lt;", "<a href=data:text/html,x>", "{{ 7*7 }}", "\x00", "\ud800", "\u202e", "$$", "\r",
             "<svg/onload=a>", "&#60;b>", "[x]: http://y\n", "*", "_", "~~", "text"]
        ),
        max_size=8,
    ).map("".join),
)  # fmt: skip
"""Text with markup of HTML, Markdown and YAML."""


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest or a record with the seal that belongs to its content, as anybody can compute it."""
    seal = hashlib.sha256(canonical(content)).hexdigest()
    path.write_text(json.dumps(content | {"seal": seal}), encoding="utf-8")
