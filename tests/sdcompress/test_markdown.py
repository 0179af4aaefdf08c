"""Text of others in Markdown shows as it is and never becomes markup."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from markdown_it import MarkdownIt
from markdown_it.token import Token

from sdcompress.support.markdown import code_block, code_span, escape_markdown

from ..hostile_text import TEXTS

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
_DROPPED = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def leaves(markdown: str) -> list[Token]:
    """Returns the parts of all text in a document."""
    return [child for token in MARKDOWN.parse(markdown) for child in token.children or ()]


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_escaped_text_is_only_text_wherever_it_stands(text: str) -> None:
    shown = " ".join(_DROPPED.sub(" ", text).split())
    escaped = escape_markdown(text)
    for context in (f"a {escaped}", f"- {escaped}", f"# {escaped}", f"**{escaped}** b", f"| a |\n|---|\n| {escaped} |"):
        parts = leaves(context)
        assert {part.type for part in parts} <= {"text", "strong_open", "strong_close"}
        assert shown in " ".join("".join(part.content for part in parts).split())
    assert len(MARKDOWN.parse(f"{escaped}\n")) == (3 if shown else 0)
    assert not shown or MARKDOWN.parse(escaped)[0].type == "paragraph_open"


@settings(deadline=None, max_examples=200)
@given(TEXTS)
def test_names_and_blocks_of_code_end_where_they_should(text: str) -> None:
    assert {part.type for part in leaves(f"a {code_span(text)} b")} <= {"text", "code_inline"}
    assert [token.type for token in MARKDOWN.parse("\n".join([*code_block(text), "after"]))] == [
        "fence",
        "paragraph_open",
        "inline",
        "paragraph_close",
    ]


@pytest.mark.parametrize(
    "text", ["nano · ONNX Runtime fp32", "sd_small-1.5 (fp16)", "2.00×", "-3.5%", "0.1 to 0.2", "–"]
)
def test_ordinary_text_stays_readable(text: str) -> None:
    assert escape_markdown(text) == text


@pytest.mark.parametrize(
    ("text", "escaped"), [("a www.example.com", r"a www\.example.com"), ("see http://a.b", r"see http:\//a.b")]
)
def test_an_address_becomes_no_link_on_github_or_the_hub(text: str, escaped: str) -> None:
    assert escape_markdown(text) == escaped


def test_long_text_is_cut() -> None:
    assert len(escape_markdown("x" * 100_000)) < 1100
