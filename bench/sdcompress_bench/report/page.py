"""Renders the report as HTML and as Markdown, and writes both."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.files import write_atomically

from sdcompress.backends.registry import backends
from sdcompress.support.markdown import code_block, escape_markdown
from sdcompress.support.pictures import read_picture

from ..markdown import table_lines
from ..results import Results, picture_files
from ..scenario import BackendSetup
from . import figures, tables, text
from .tables import Table

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_INTERVAL = re.compile(r"(\([^()]{1,24}\))")


def write_report(results: Results, folder: Path) -> None:
    """Write `report.html` and `report.md` into the folder that has the results' pictures.

    Raises:
        ArtifactError: a picture is not there, lies outside the folder, or is none.
    """
    for name, page in (("report.html", render_html(results, folder)), ("report.md", render_markdown(results))):
        # Text of others may hold halves of characters, which UTF-8 has no bytes for.
        write_atomically(folder / name, page.encode("utf-8", "replace"))


def render_html(results: Results, folder: Path) -> str:
    """Returns the page as one self-contained string; the pictures are read from `folder` and embedded.

    Raises:
        ArtifactError: as of `write_report`.
    """
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
            swaps=tables.swap_tables(results),
            columns=[_column(results, entry) for entry in results.pictures],
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


def _column(results: Results, entry: dict[str, Any]) -> tuple[str, str]:
    """Returns the model and the backend setup of a column of the picture grid; with its steps where they differ."""
    sampling = results.sampling()
    differ = entry["model"] in sampling and len(set(sampling.values())) > 1
    setup = str(BackendSetup(entry["backend"], entry["precision"]))
    return str(entry["model"]), f"{setup}, {sampling[entry['model']]}" if differ else setup


def _picture_rows(results: Results, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields each caption with its pictures as `data:` addresses, one a column; nothing without pictures."""
    files = list(picture_files(results, folder))
    for index, caption in enumerate(results.captions if files else ()):
        yield caption, [_data_address(column[index]) for column in files]


def _data_address(picture: Path) -> str:
    content, media_type = read_picture(picture)
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def render_markdown(results: Results) -> str:
    """Returns the headline, the tables, the notes and the command as Markdown."""
    lines = [f"# {escape_markdown(text.headline(results))}", "", escape_markdown(text.subline(results)), ""]
    lines += _markdown_table(tables.answer_table(results))
    parts = (tables.swap_tables, tables.quality_tables, tables.limit_tables, tables.gate_tables)
    for table in (table for part in parts for table in part(results)):
        lines += ["", f"**{escape_markdown(table.title)}**", "", *_markdown_table(table)]
    lines += ["", *(f"- {escape_markdown(note)}" for note in text.notes(results))]
    lines += ["", f"Machine: {escape_markdown(text.machine(results))}.", "", *code_block(results.command)]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    head, *rows = ([escape_markdown(cell) for cell in row] for row in (table.head, *table.rows))
    return table_lines(head, rows, table.left)
