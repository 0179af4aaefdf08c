"""Renders the report as HTML and as Markdown, and writes both."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.files import write_atomically

from sdcompress.backends.registry import backends

from ..markdown import table_lines
from ..results import Results
from ..scenario import BackendSetup
from . import figures, tables, text
from .tables import Table

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_INTERVAL = re.compile(r"(\([^()]{1,24}\))")


def write_report(results: Results, folder: Path) -> None:
    """Write `report.html` and `report.md` into the folder that has the results' pictures."""
    write_atomically(folder / "report.html", render_html(results, folder))
    write_atomically(folder / "report.md", render_markdown(results))


def render_html(results: Results, folder: Path) -> str:
    """Returns the page as one self-contained string; the pictures are read from `folder` and embedded."""
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            title=text.headline(results),
            subline=text.subline(results),
            backends=backends().values(),
            answer=tables.answer_table(results),
            speed_plots=figures.speed_plots(results),
            stages=tables.stage_table(results),
            columns=[_column(entry) for entry in results.pictures],
            pictures_note=text.pictures_note(results),
            picture_rows=list(_picture_rows(results, folder)),
            quality=tables.quality_tables(results),
            error_plots=figures.error_plots(results),
            limits=tables.limit_tables(results),
            loss_plots=figures.loss_plots(results),
            gates=tables.gate_tables(results),
            failed_gates=results.failed_gates(),
            notes=text.notes(results),
            method=text.method(results),
            facts=text.machine_facts(results),
        )
    )


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("sdcompress_bench", "templates")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters["keep_intervals"] = _keep_intervals
    return found


def _keep_intervals(cell: str) -> Markup:
    """Returns a cell as HTML in which an interval is not broken across lines."""
    from markupsafe import Markup, escape

    return Markup(_INTERVAL.sub(r"<i>\1</i>", str(escape(cell))))


def _column(entry: dict[str, Any]) -> tuple[str, str]:
    """Returns the model and the backend setup of a column of the picture grid."""
    return str(entry["model"]), str(BackendSetup(entry["backend"], entry["precision"]))


def _picture_rows(results: Results, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields each caption with its pictures in base64, one a column; nothing where there are no pictures."""
    for index, caption in enumerate(results.captions if results.pictures else ()):
        files = [folder / entry["files"][index] for entry in results.pictures]
        yield caption, [base64.b64encode(file.read_bytes()).decode() for file in files]


def render_markdown(results: Results) -> str:
    """Returns the headline, the tables, the notes and the command as Markdown."""
    lines = [f"# {text.headline(results)}", "", text.subline(results), ""]
    lines += _markdown_table(tables.answer_table(results))
    for table in (*tables.quality_tables(results), *tables.limit_tables(results), *tables.gate_tables(results)):
        lines += ["", f"**{table.title}**", "", *_markdown_table(table)]
    lines += ["", *(f"- {note}" for note in text.notes(results)), "", f"Machine: {text.machine(results)}."]
    lines += ["", "```", results.command, "```"]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    rows = ([cell.replace("|", r"\|") for cell in row] for row in table.rows)
    return table_lines(table.head, rows, table.left)
