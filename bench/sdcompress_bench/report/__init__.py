"""The report of a bench run, from `Results` alone: one self-contained HTML page, and its tables in Markdown."""

from .formatting import format_estimate, format_seconds
from .page import render_html, render_markdown, write_report
from .text import headline

__all__ = ["format_estimate", "format_seconds", "headline", "render_html", "render_markdown", "write_report"]
