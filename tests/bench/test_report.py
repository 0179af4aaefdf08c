"""The report has all results, escapes hostile names, and loads nothing from elsewhere."""

from __future__ import annotations

import base64
import dataclasses
import os
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from markdown_it import MarkdownIt
from sdcompress_bench.latency import STAGES, Latency
from sdcompress_bench.report import headline, render_html, render_markdown, svg, write_report
from sdcompress_bench.results import Results, read_losses, read_results
from sdcompress_bench.scenario import Gate
from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.paths import is_plain_path

from ..hostile_text import NAMES, TEXTS

GATE = {"limit": 1e-4, "error": 2e-6, "timestep": 999, "limits": [1e-4] * 3, "passed": True}
HOSTILE = '<script>alert("tiny")</script> & |co'
WEBP = base64.b64decode("UklGRiIAAABXRUJQVlA4IBYAAAAwAQCdASoBAAEADsD+JaQAA3AAAAAA")


def latency(model: str, backend: str, ms: float, failed: str | None = None) -> Latency:
    key = f"{model}-{backend}"
    if failed:
        return Latency(key, model, backend, "fp32", 128, 1, 2, 25, 7.5, failed=failed)
    samples = {stage: [[ms, ms * 1.01, ms * 0.99], [ms * 1.02, ms, ms]] for stage in STAGES}
    limit = {
        "macs": 7 * 10**8,
        "moved_bytes": 10**8,
        "share_of_matmul_peak": 0.37,
        "share_of_bandwidth": 0.06,
        "least_ms": 14.8,
        "bound": "compute",
    }
    return Latency(
        key,
        model,
        backend,
        "fp32",
        128,
        1,
        2,
        25,
        7.5,
        samples,
        [80.0, 82.0],
        [900.0, 880.0],
        700.0,
        None,
        {"unet": 12.5},
        41.0,
        2,
        [],
        limit,
    )


def distances(scale: float) -> dict[str, object]:
    steps = [
        {"timestep": t, "relative_l2": scale * (1 + t / 1000), "cosine": 0.9999, "psnr_db": 40.0} for t in (1, 501, 999)
    ]
    return {
        "relative_l2": scale * 2,
        "relative_l2_mean": scale,
        "cosine": 0.9999,
        "picture_psnr_db": 31.5,
        "picture_ssim": 0.97,
        "steps": steps,
        "pictures": [],
    }


def estimate(value: float) -> dict[str, object]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value, "count": 60, "warning": ""}


SETTINGS = {
    "sizes_px": [128],
    "steps": 25,
    "guidance_scale": 7.5,
    "baseline": ["torch", "fp32"],
    "seed": 7,
    "quality_pictures": 60,
    "rounds": 2,
    "samples": 3,
    "end_to_end_samples": 1,
    "timesteps": [1, 501, 999],
    "probes": 2,
}
ENVIRONMENT = {
    "cpu": "Test CPU",
    "cores": 2,
    "memory_mib": 8192,
    "load_average": 0.1,
    "gpu": [],
    "os": "Linux",
    "python": "3.11",
    "torch_threads": 2,
    "packages": {"torch": "2"},
    "commit": None,
}
SHARE = {"share": 0.8, "low": 0.7, "high": 0.87, "count": 60}
COLUMN = {"backend": "torch", "precision": "fp32"}


def student_figures() -> dict[str, object]:
    fid = estimate(30.0) | {"warning": "FID of 60 pictures is biased upwards"}
    return distances(0.2) | {"fid": fid, "kid": estimate(0.0123), "lpips": estimate(0.21)}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """A teacher and a student with a hostile name, each on two backends, and every section of a report."""
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"pictures/{name}.webp").write_bytes(WEBP)
    gate = {"figure": "kid", "model": HOSTILE, "way": "", "value": 0.0123, "limit": "kid at most 0.02", "passed": True}
    scores = {"real": 30.0, "nano": 28.0, HOSTILE: 25.0}
    return Results(
        created="2026-01-01T00:00:00+00:00",
        command="sdcompress bench nano 'tiny=<x>' -o report",
        settings=SETTINGS,
        environment=ENVIRONMENT,
        peaks={"fp32": {"matmul_flops_per_s": 9.5e10, "bandwidth_bytes_per_s": 1.2e10, "precision": "fp32"}},
        models=[
            {"name": "nano", "sha256": "ab" * 32, "parameters": {"unet": 4_000_000}},
            {"name": HOSTILE, "sha256": "cd" * 32, "parameters": {"unet": 1_000_000}},
        ],
        latency=[
            latency("nano", "torch", 40.0),
            latency("nano", "onnxruntime", 20.0),
            latency(HOSTILE, "torch", 16.0),
            latency(HOSTILE, "onnxruntime", 0.0, "its process was ended by SIGKILL"),
        ],
        backends=[{"model": "nano", "backend": "onnxruntime", "precision": "fp32", "gate": GATE} | distances(1e-6)],
        students={HOSTILE: student_figures()},
        quality={name: {"clip_score": score, "style": SHARE} for name, score in scores.items()},
        captions=["a <b>cat</b>"],
        pictures=[
            {"model": "nano", "files": ["pictures/a.webp"]} | COLUMN,
            {"model": HOSTILE, "files": ["pictures/b.webp"]} | COLUMN,
        ],
        gates=[gate],
        losses={HOSTILE: {"task_loss": [[1, 1.0], [2, 0.5]], "output_kd_loss": [[1, 0.1], [2, 0.04]]}},
        skipped={"TensorRT": "no GPU is here"},
    )


class Tags(HTMLParser):
    """Collects tags, and fails on a closing tag that does not match the open one."""

    VOID = ("meta", "img", "link", "br", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


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
