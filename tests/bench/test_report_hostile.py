"""Results that somebody else wrote become a page and Markdown without their markup, and without their files."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from markdown_it import MarkdownIt
from sdcompress_bench.latency import Latency
from sdcompress_bench.report import render_html, render_markdown, write_report
from sdcompress_bench.results import Results, read_results
from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.paths import is_plain_path

from ..hostile_text import NAMES, TEXTS
from .report_results import HOSTILE, WEBP, Tags, make_results


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return make_results(tmp_path)


def hostile(results: Results, text: str) -> Results:
    """Returns the results with `text` in every place that holds a name, a caption, a message or a version."""
    words = {"onnxruntime": text, "Test CPU": text, "Linux": text, "kid": text, "kid at most 0.02": text}

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key if key not in ("a", HOSTILE) else text: change(each) for key, each in value.items()}
        if isinstance(value, list):
            return [change(each) for each in value]
        return words.get(value, text if value == HOSTILE else value) if isinstance(value, str) else value

    raw = change(dataclasses.asdict(results))
    runs = [Latency(**run) for run in raw.pop("latency")]
    free = {"captions": [text], "command": text, "created": text, "skipped": {text: text}, "warnings": [text]}
    return Results(**raw | {"latency": runs} | free)


def elements(page: str) -> set[tuple[str, frozenset[str]]]:
    """Returns each kind of element with the names of its attributes."""
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return {(tag, frozenset(attributes)) for tag, attributes in tags.seen}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_any_text_adds_no_element_and_no_attribute_to_the_page(results: Results, tmp_path: Path, text: str) -> None:
    page = render_html(hostile(results, text), tmp_path)
    assert elements(page) <= elements(render_html(results, tmp_path))
    tags = Tags()
    tags.feed(page)
    assert all(str(attributes["src"]).startswith("data:image/") for tag, attributes in tags.seen if tag == "img")
    write_report(hostile(results, text), tmp_path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_any_text_adds_no_markup_to_the_markdown(results: Results, text: str) -> None:
    parser = MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(render_markdown(hostile(results, text)))
    plain = parser.parse(render_markdown(hostile(results, "x")))
    assert {token.type for token in tokens} <= {token.type for token in plain}
    for kind in ("heading_open", "table_open", "tr_open", "td_open", "fence"):
        assert [t.type for t in tokens].count(kind) == [t.type for t in plain].count(kind)
    parts = [part.type for token in tokens for part in token.children or ()]
    assert set(parts) <= {"text", "strong_open", "strong_close"}


def test_the_page_may_run_and_load_nothing(results: Results, tmp_path: Path) -> None:
    page = render_html(results, tmp_path)
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]+)"', page)
    assert policy is not None
    assert policy[1].split("; ") == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        "base-uri 'none'",
        "form-action 'none'",
    ]


def take_picture(results: Results, name: Any) -> Results:
    column, *others = results.pictures
    return dataclasses.replace(results, pictures=[column | {"files": [name]}, *others])


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES)
def test_no_picture_name_embeds_a_file_from_elsewhere(results: Results, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside.webp").write_bytes(WEBP + b"secret")
    folder = tmp_path / "deep/report"
    folder.mkdir(parents=True, exist_ok=True)
    for climbing in (name, "../../outside.webp", str(tmp_path / "outside.webp")):
        changed = take_picture(results, climbing)
        changed.save(folder / "results.json")
        with pytest.raises(ArtifactError):
            render_html(changed, folder)
        if not is_plain_path(climbing):
            with pytest.raises(ArtifactError, match="a name inside"):
                read_results(folder / "results.json")


def test_a_picture_that_is_a_link_or_none_is_refused(results: Results, tmp_path: Path) -> None:
    (tmp_path / "pictures/link.webp").symlink_to(tmp_path / "pictures/a.webp")
    (tmp_path / "pictures/text.webp").write_text("secret")
    (tmp_path / "pictures/page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    os.mkfifo(tmp_path / "pictures/pipe.webp")
    for name, message in (
        ("link.webp", "is a link"),
        ("text.webp", "is no picture"),
        ("page.svg", "is no picture"),
        ("pipe.webp", "a named pipe"),
        ("gone.webp", "cannot be read"),
    ):
        with pytest.raises(ArtifactError, match=message):
            render_html(take_picture(results, f"pictures/{name}"), tmp_path)
