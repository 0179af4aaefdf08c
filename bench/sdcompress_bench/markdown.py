"""Writes tables and sections in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Cells = Sequence[str | None]
"""A row of a table; a cell that is None is empty and has no padding."""


def table_lines(head: Cells, rows: Iterable[Cells], left: int | None = None) -> list[str]:
    """Returns the lines of a table.

    Args:
        head: names of the columns.
        rows: cells, as many in each row as there are columns.
        left: how many columns are aligned to the left; the others are aligned to the right. None aligns none.
    """
    lines = ["".join("| " if cell is None else f"| {cell} " for cell in row) + "|" for row in (head, *rows)]
    count = len(head) if left is None else left
    return [lines[0], "|" + "---|" * count + "---:|" * (len(head) - count), *lines[1:]]


def section(intro: str, head: Cells, rows: Iterable[Cells], *after: str) -> str:
    """Returns a paragraph, a table, and further paragraphs.

    Args:
        intro: the first paragraph.
        head: names of the columns.
        rows: of the table.
        after: paragraphs below the table.
    """
    lines = [intro, "", *table_lines(head, rows)]
    for paragraph in after:
        lines += ["", paragraph]
    return "\n".join(lines) + "\n"
