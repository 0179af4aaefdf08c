"""Text of others in Markdown: names, prompts, captions and messages, which must not become markup."""

from __future__ import annotations

import re
from html import escape

from sdcompress_engines.errors import shorten

_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, those that turn the direction of writing, and halves of characters."""
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)|(?<=[Ww]{3})\.|(?<=\s)#(?=#*\s*$)")
"""The last is the closing sequence of a heading. The two before it begin an address, which the hub makes a link of."""
_BLOCK = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=-{2,}|=|[-+](?:\s|$)|#))")
"""What begins a list, a heading or a rule at the start of a line."""
_PLAIN_NAME = re.compile(r"[\w./:@+=-]+", re.ASCII)
_LONGEST = 1000


def escape_markdown(text: object, length: int = _LONGEST) -> str:
    """Returns a text as one line of Markdown that shows it as it is: no HTML, link, image, list, heading or table.

    Args:
        text: of any origin.
        length: longer texts are cut.
    """
    line = escape(shorten(_INVISIBLE.sub(" ", str(text)), length), quote=False)
    return _BLOCK.sub(r"\1\\", _MARKUP.sub(r"\\\g<0>", line))


def code_span(name: object) -> str:
    """Returns a name, such as a hub id or a hash, as code; other text is escaped instead."""
    text = str(name)
    return f"`{text}`" if len(text) <= _LONGEST and _PLAIN_NAME.fullmatch(text) else escape_markdown(text)


def code_block(text: str) -> list[str]:
    """Returns the lines of a block of code; its fence is longer than any in the text."""
    lines = [_INVISIBLE.sub(" ", line) for line in text.splitlines()]
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return [fence, *lines, fence]
