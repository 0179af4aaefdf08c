"""The report has all results, escapes hostile names, and loads nothing from elsewhere."""

from __future__ import annotations

import dataclasses
import re
from html import escape
from pathlib import Path

import pytest
from sdcompress_bench.latency import STAGES
from sdcompress_bench.report import headline, render_html, render_markdown, svg, write_report
from sdcompress_bench.results import Results, read_losses, read_results
from sdcompress_bench.scenario import Gate
from sdcompress_engines.errors import ArtifactError

from .report_results import (
    GATE,
    HOSTILE,
    Tags,
    latency,
    make_results,
)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return make_results(tmp_path)


def test_the_page_is_complete_and_loads_nothing_from_elsewhere(results: Results, tmp_path: Path) -> None:
    page = render_html(results, tmp_path)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"data:image/webp;base64,[^\"]*", "", page))
    assert not [tag for tag, _ in tags.seen if tag in ("script", "link", "iframe")]
    sources = [str(attributes["src"]) for tag, attributes in tags.seen if tag == "img"]
    assert len(sources) == 2
    assert "--first:url(data:image/webp;base64,UklGR" in page
    assert "seed 7" in page
    assert all(source.startswith("data:image/webp;base64,UklGR") for source in sources)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_names_are_escaped_everywhere(results: Results, tmp_path: Path) -> None:
    page = render_html(results, tmp_path)
    assert "<script>" not in page
    assert "a <b>cat</b>" not in page
    assert page.count("&lt;script&gt;") > 8
    assert "tiny=&lt;x&gt;" in page


def test_a_pipe_in_a_name_does_not_split_a_markdown_cell(results: Results) -> None:
    head, _, *rows = [line for line in render_markdown(results).splitlines() if line.startswith("|")][:6]
    cells = [re.split(r"(?<!\\)\|", row) for row in rows]
    assert [len(row) for row in cells] == [len(head.split("|"))] * 4
    assert cells[2][1].strip() == escape(HOSTILE, quote=False).replace("|", r"\|")


def test_every_model_backend_and_failure_is_in_both_reports(results: Results, tmp_path: Path) -> None:
    write_report(results, tmp_path)
    for text in ((tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()):
        for expected in (
            "nano",
            "ONNX Runtime",
            "PyTorch",
            "2.00×",
            "2.50×",
            "ended by SIGKILL",
            "TensorRT was not measured: no GPU is here",
            "Test CPU",
        ):
            assert expected in text


def test_the_headline_is_the_best_speed_up_or_says_that_there_is_none(results: Results) -> None:
    assert headline(results).endswith("on PyTorch fp32 makes pictures 2.50× as fast as nano in PyTorch fp32")
    once = dataclasses.replace(
        results,
        latency=[
            dataclasses.replace(run, samples_ms={stage: [[40.0], [80.0]] for stage in STAGES}) if i == 0 else run
            for i, run in enumerate(results.latency)
        ],
    )
    assert headline(once).endswith("if these few or scattered samples can be trusted")
    alone = dataclasses.replace(results, latency=results.latency[:1])
    assert headline(alone) == "Nothing here is faster than nano in PyTorch fp32"
    broken = dataclasses.replace(results, latency=[latency("nano", "torch", 0.0, "no memory")])
    assert headline(broken) == "nano in PyTorch fp32 could not be measured"


def test_a_failed_teacher_without_pictures_still_has_a_page(results: Results, tmp_path: Path) -> None:
    bare = dataclasses.replace(
        results,
        latency=[latency("nano", "torch", 0.0, "no memory")],
        backends=[],
        students={},
        quality={},
        captions=[],
        pictures=[],
        losses={},
        peaks={},
        gates=[],
    )
    page = render_html(bare, tmp_path)
    assert "no memory" in page
    assert "Same prompt" not in page


def test_a_single_round_is_noted_and_two_are_not(results: Results, tmp_path: Path) -> None:
    once = dataclasses.replace(results, settings=results.settings | {"rounds": 1})
    assert "one process differs from the next" in render_html(once, tmp_path)
    assert "one process differs from the next" not in render_html(results, tmp_path)


def test_a_gate_over_its_limit_is_reported(results: Results, tmp_path: Path) -> None:
    off = dataclasses.replace(
        results, backends=[results.backends[0] | {"gate": GATE | {"limit": 1e-7, "passed": False}}]
    )
    assert off.failed_gates() == ["nano on ONNX Runtime fp32: relative L2 2.00e-06 over 1.00e-07 at timestep 999"]
    assert "over its limit" in render_html(off, tmp_path)
    broken = dataclasses.replace(
        results,
        backends=[
            {
                "model": "nano",
                "backend": "onnxruntime",
                "precision": "fp16",
                "failed": "values that are not finite",
                "gate": {"limit": None, "passed": False},
            }
        ],
    )
    assert broken.failed_gates() == ["nano on ONNX Runtime fp16: values that are not finite"]
    assert "Read this first" in render_html(broken, tmp_path)


def test_quality_limits_and_gates_are_reported_with_their_intervals(results: Results, tmp_path: Path) -> None:
    for text in (re.sub("<[^>]+>", "", render_html(results, tmp_path)), render_markdown(results)):
        for expected in (
            "30.0 (27.0 to 33.0)",
            "0.0123 (0.0111 to 0.0135)",
            "FID of 60 pictures is biased upwards",
            "80.0% (70%–87%)",
            "37%",
            "14.8 ms",
            "95.0 GFLOP/s",
            "at most 0.02",
            "holds",
        ):
            assert expected in text


def test_gates_are_judged_on_the_measured_figures(results: Results) -> None:
    fast, near, none = (
        Gate("speedup", at_least=2.2),
        Gate("kid", HOSTILE, at_most=0.01),
        Gate("clip_score", "nobody", at_least=1),
    )
    judged = dataclasses.replace(results, gates=results.judge([fast, near, none]))
    assert [(g["model"], g["passed"]) for g in judged.gates[:4]] == [
        ("nano", False),
        ("nano", False),
        (HOSTILE, True),
        (HOSTILE, False),
    ]
    failed = judged.failed_gates()
    assert f"{HOSTILE}: kid is 0.0123, wanted at most 0.01" in failed
    assert "nobody: clip_score was not measured, wanted at least 1" in failed


def test_results_survive_the_file(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "results.json")
    again = read_results(tmp_path / "results.json")
    assert again == results
    assert list(again.rows()) == list(results.rows())
    (tmp_path / "results.json").write_text('{"schema": 99}')
    with pytest.raises(ArtifactError, match="schema 99"):
        read_results(tmp_path / "results.json")


def test_losses_are_thinned_and_keep_their_mean(tmp_path: Path) -> None:
    lines = [f'{{"step": {step}, "task_loss": {step % 2}, "lr": 0.1}}' for step in range(1000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    losses = read_losses(tmp_path / "metrics.jsonl", points=100)
    assert list(losses) == ["task_loss"]
    assert len(losses["task_loss"]) == 100
    assert all(value == 0.5 for _, value in losses["task_loss"])


def test_the_page_says_where_its_pictures_are_of_other_prompts_than_its_figures(
    results: Results, tmp_path: Path
) -> None:
    note = "nano was trained on these prompts"
    assert note not in render_html(results, tmp_path)
    shown = dataclasses.replace(results, settings=results.settings | {"shown": 4})
    assert note in render_html(shown, tmp_path)


def test_the_labels_of_near_dots_do_not_cover_each_other() -> None:
    dots = [svg.Dot(x, y, y - 5, y + 5, name, "torch") for x, y, name in ((2.85, 75, "one"), (2.9, 75.2, "two"))]
    plot = svg.scatter("Speed", [*dots, svg.Dot(1.0, 75, 70, 80, "far", "torch")], "pictures/s", "style")
    height = {name: float(y) for y, name in re.findall(r'y="([\d.]+)" text-anchor[^>]*>(one|two|far)<', plot)}
    assert abs(height["one"] - height["two"]) > 12
    assert height["far"] == pytest.approx(height["one"])
