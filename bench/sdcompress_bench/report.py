"""One self-contained HTML page, and the same table in Markdown, from `Results`: the answer first, then what backs it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import _page, _plots
from .results import Results, Row
from .scenario import BACKEND_NAMES

_HEAD = ("model", "parameters", "UNet size", "backend", "UNet step", "pictures/s", "speed-up", "peak memory", "off PyTorch")


def write_report(results: Results, folder: Path) -> None:
    """Write `report.html` and `report.md` into `folder`, where the results' pictures already are."""
    (folder / "report.html").write_text(render_html(results, folder), encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(results), encoding="utf-8")


def render_markdown(results: Results) -> str:
    """The headline, the table, the quality figures and the command."""
    cells = [[text.replace("|", "\\|") for text in _cells(results, row)] for row in results.rows()]
    lines = [f"# {headline(results)}", "", _subline(results), "", f"| {' | '.join(_HEAD)} |", f"|{'---|' * 3}---|{'---:|' * 5}", *(f"| {' | '.join(row)} |" for row in cells)]
    for title, head, rows in _quality_tables(results):
        lines += [
            "",
            f"**{title}**",
            "",
            f"| {' | '.join(head)} |",
            f"|---|{'---:|' * (len(head) - 1)}",
            *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
        ]
    lines += ["", *(f"- {warning}" for warning in _warnings(results)), "", f"Machine: {_machine(results)}.", "", "```", results.command, "```"]
    return "\n".join(lines) + "\n"


def render_html(results: Results, folder: Path) -> str:
    """The page as one string; pictures are read from `folder` and embedded."""
    title = headline(results)
    table = _table(_HEAD, [_cells(results, row) for row in results.rows()], "answer", tones=[row.backend for row in results.rows()])
    sections = [
        ("Speed", _speed(results)),
        ("Same prompt, same seed", _pictures(results, folder)),
        ("Quality", "".join(f"<h3>{escape(name)}</h3>{_table(head, rows)}" for name, head, rows in _quality_tables(results))),
        ("Distance, timestep by timestep", _errors(results)),
        ("Training", _losses(results)),
        ("Read this first" if results.failed_gates() else "Notes", _bullets(_warnings(results))),
        ("Method", "".join(f"<p>{escape(text)}</p>" for text in _method(results))),
        ("Machine", _facts(results)),
        ("Again", f"<pre>{escape(results.command)}</pre>"),
    ]
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections if content)
    return _page.PAGE.format(
        title=escape(title), style=_page.STYLE, headline=escape(title), subline=escape(_subline(results)), table=table, body=body, created=escape(results.created)
    )


def _name(model: str, backend: str, batch: int | None = None) -> str:
    return f"{model} · {BACKEND_NAMES.get(backend, backend)}" + (f" · batch {batch}" if batch else "")


def headline(results: Results) -> str:
    """The answer in one line."""
    rows = [row for row in results.rows() if row.speedup is not None]
    best = max(rows, key=lambda row: row.speedup or 0.0, default=None)
    if best is None:
        return f"{results.teacher} in PyTorch could not be measured"
    if best.speedup is None or best.speedup <= 1.0 or (best.model == results.teacher and best.backend == "torch"):
        return f"Nothing here is faster than {results.teacher} in PyTorch"
    reference = next(row for row in rows if row.model == results.teacher and row.backend == "torch" and row.batch == best.batch)
    shaky = [s for s in (best.end_to_end, reference.end_to_end) if s is None or s.noisy or s.count < 3]
    claim = f"{best.model} on {BACKEND_NAMES[best.backend]} makes pictures {best.speedup:.2f}× as fast as {results.teacher} in PyTorch"
    return claim + (", if these few or scattered samples can be trusted" if shaky else "")


def _subline(results: Results) -> str:
    teacher, *students = results.models
    whole = teacher["parameters"]["unet"]
    parts = [f"{s['name']} has {s['parameters']['unet'] / whole:.0%} of the UNet's {_millions(whole)} parameters" for s in students]
    judged = [(name, figures) for name, figures in results.quality.items() if "style" in figures or "top1" in figures]
    key, what = ("style", "Style recognised in") if judged and "style" in judged[0][1] else ("top1", "Caption found in")
    if judged:
        parts.append(f"{what} " + ", ".join(f"{figures[key]['share']:.0%} ({'real pictures' if name == 'real' else name})" for name, figures in judged))
    settings = results.settings
    parts.append(f"{settings['size_px']} px, {settings['steps']} steps, guidance {settings['guidance_scale']:g}, {settings['precision']}")
    return ". ".join(parts) + "."


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _rate(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _cells(results: Results, row: Row) -> list[str]:
    several = len({r.batch for r in results.rows()}) > 1
    backend = BACKEND_NAMES.get(row.backend, row.backend) + (f", batch {row.batch}" if several else "")
    if row.failed or row.unet_step is None or row.images_per_s is None or row.peak_mib is None:
        return [row.model, _millions(row.parameters), "–", backend, f"failed: {row.failed}", "–", "–", "–", "–"]
    mark = " (noisy)" if row.unet_step.noisy else ""
    if row.fidelity is None:
        fidelity = "reference" if row.backend == "torch" and results.settings["precision"] == "fp32" else "–"
    else:
        fidelity = f"{row.fidelity:.1e}" + ("" if row.fidelity_passed is not False else " over its limit")
    speedup = f"{row.speedup:.2f}×" if row.speedup else "–"
    return [
        row.model,
        _millions(row.parameters),
        f"{row.unet_mib:,.1f} MiB",
        backend,
        _ms(row.unet_step.median) + mark,
        _rate(row.images_per_s),
        speedup,
        f"{row.peak_mib:,.0f} MiB",
        fidelity,
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "", tones: Sequence[str] = ()) -> str:
    """Cells carry their column's name, which a narrow screen shows in place of the head."""
    body = []
    for index, row in enumerate(rows):
        tone = f' class="on-{tones[index]}"' if tones else ""
        body.append(f"<tr{tone}>" + "".join(f'<td data-name="{escape(name)}">{escape(cell)}</td>' for name, cell in zip(head, row, strict=True)) + "</tr>")
    return f'<table class="{kind}"><thead><tr>{"".join(f"<th>{escape(name)}</th>" for name in head)}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _speed(results: Results) -> str:
    rows = [row for row in results.rows() if not row.failed]
    several = len({row.batch for row in rows}) > 1
    plots = []
    for title, stage in (("One UNet step, ms (median, 95% interval)", "unet_step"), ("Prompt to picture, ms (median, 95% interval)", "end_to_end")):
        drawn = []
        for row in rows:
            summary = row.unet_step if stage == "unet_step" else row.end_to_end
            if summary:
                drawn.append(_plots.Bar(_name(row.model, row.backend, row.batch if several else None), summary.median, summary.low, summary.high, _ms(summary.median), row.backend))
        if drawn:
            plots.append(_plots.bars(title, drawn))
    dots, y_name, ceiling = _trade(results, rows)
    if dots:
        plots.append(_plots.scatter("Speed against quality", dots, "pictures/s", y_name, ceiling))
    stages = _table(("model", "backend", "text encoder", "UNet step", "VAE decode", "end to end", "p90", "p99", "load", "first picture"), list(_stage_rows(results)))
    return f'<div class="plots">{"".join(plots)}</div><details><summary>Every stage</summary>{stages}</details>'


def _stage_rows(results: Results) -> Iterable[list[str]]:
    for run in results.latency:
        found = [run.summary(stage) for stage in ("text_encoder", "unet_step", "vae_decode", "end_to_end")]
        whole = found[-1]
        if whole:
            medians = [_ms(s.median) if s else "–" for s in found]
            yield [run.model, f"{BACKEND_NAMES[run.backend]}, batch {run.batch}", *medians, _ms(whole.p90), _ms(whole.p99), _ms(min(run.load_ms)), _ms(min(run.first_image_ms))]


def _trade(results: Results, rows: list[Row]) -> tuple[list[_plots.Dot], str, tuple[float, str] | None]:
    """Speed of every row against its model's quality: the best figure there is, with its interval."""
    key, y_name = next(
        (
            (k, name)
            for k, name in (("style", "style recognised, %"), ("top1", "caption found first, %"), ("clip_score", "CLIP score"))
            if any(k in q for q in results.quality.values())
        ),
        ("", ""),
    )
    marks = {name: _band(figures[key]) for name, figures in results.quality.items() if key in figures}
    # A model's dots are at one height, so its name is written once, at the fastest.
    fastest = {row.model: max(r.images_per_s or 0 for r in rows if r.model == row.model) for row in rows}
    dots = [
        _plots.Dot(row.images_per_s, *marks[row.model], row.model if row.images_per_s == fastest[row.model] else "", row.backend)
        for row in rows
        if row.images_per_s and row.model in marks
    ]
    return dots, f"{y_name}; colour: backend", (marks["real"][0], "real pictures") if "real" in marks else None


def _band(figure: Any) -> tuple[float, float, float]:
    return (100 * figure["share"], 100 * figure["low"], 100 * figure["high"]) if isinstance(figure, dict) else (figure, figure, figure)


def _quality_tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    tables = []
    if results.quality:
        keys = list(next(iter(results.quality.values())))
        names = {"clip_score": "CLIP score", "top1": "caption found first", "top5": "among five", "style": "style recognised"}
        rows = [["real pictures" if m == "real" else m, *(_figure(figures.get(k)) for k in keys)] for m, figures in results.quality.items()]
        tables.append(("As a CLIP sees the pictures", ["model", *(names.get(k, k) for k in keys)], rows))
    if results.students:
        head = ["student", "UNet off the teacher, mean", "worst step", "PSNR of pictures", "SSIM of pictures"]
        rows = [
            [n, f"{d['relative_l2_mean']:.3f}", f"{d['relative_l2']:.3f}", _or_dash(d["picture_psnr_db"], "{:.1f} dB"), _or_dash(d["picture_ssim"], "{:.3f}")]
            for n, d in results.students.items()
        ]
        tables.append((f"Student against {results.teacher}, equal prompts and seeds", head, rows))
    measured = [b for b in results.backends if "relative_l2" in b]
    if measured:
        head = ["same weights, other backend", "relative L2, worst", "limit", "cosine", "PSNR of pictures", "SSIM of pictures"]
        rows = [
            [_name(b["model"], b["backend"]), f"{b['relative_l2']:.1e}", _or_dash(b.get("gate", {}).get("limit"), "{:.1e}"), f"{b['cosine']:.7f}",
             _or_dash(b["picture_psnr_db"], "{:.1f} dB"), _or_dash(b["picture_ssim"], "{:.5f}")]
            for b in measured
        ]  # fmt: skip
        tables.append(("Same weights, held against PyTorch fp32", head, rows))
    return tables


def _figure(figure: Any) -> str:
    if isinstance(figure, dict):
        return f"{figure['share']:.1%} ({figure['low']:.0%}–{figure['high']:.0%})"
    return _or_dash(figure, "{:.2f}")


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _pictures(results: Results, folder: Path) -> str:
    if not results.pictures:
        return ""
    heads = "".join(f"<b>{escape(name)}</b>" for name in results.pictures)
    cells = []
    for index, caption in enumerate(results.captions):
        cells.append(f'<p class="caption">{escape(caption)}</p>')
        for name, files in results.pictures.items():
            data = base64.b64encode((folder / files[index]).read_bytes()).decode()
            cells.append(f'<img alt="{escape(caption)}, {escape(name)}" src="data:image/webp;base64,{data}">')
    return f'<div class="scroll"><div class="pictures" style="--columns:{len(results.pictures)}">{heads}{"".join(cells)}</div></div>'


def _errors(results: Results) -> str:
    backends = [_line(_name(b["model"], b["backend"]), b, i) for i, b in enumerate(results.backends) if "steps" in b]
    students = [_line(name, figures, i) for i, (name, figures) in enumerate(results.students.items())]
    limits = {b["gate"]["limit"] for b in results.backends if "gate" in b}
    level = (limits.pop(), "limit") if len(limits) == 1 else None
    plots = _plots.lines("Same weights, other backend", backends, "timestep", "relative L2", log=True, level=level) if backends else ""
    plots += _plots.lines(f"Student against {results.teacher}", students, "timestep", "relative L2") if students else ""
    return f'<div class="plots">{plots}</div>' if plots else ""


def _line(label: str, figures: dict[str, Any], index: int) -> _plots.Line:
    return _plots.Line(label, [(step["timestep"], step["relative_l2"]) for step in figures["steps"]], f"s{index % 6}")


def _losses(results: Results) -> str:
    plots = [
        _plots.lines(model, [_plots.Line(name, [(step, value) for step, value in pairs], f"s{i % 6}") for i, (name, pairs) in enumerate(series.items())], "step", "loss", log=True)
        for model, series in results.losses.items()
    ]
    return f'<div class="plots">{"".join(plots)}</div>' if plots else ""


def _warnings(results: Results) -> list[str]:
    noisy = [_name(r.model, r.backend, r.batch) for r in results.rows() if r.unet_step and r.unet_step.noisy]
    unsteady = [f"{_name(r.model, r.backend, r.batch)} ({', '.join(r.unsteady)})" for r in results.latency if r.unsteady]
    return [
        *results.failed_gates(),
        *(f"{BACKEND_NAMES.get(backend, backend)} was not measured: {reason}" for backend, reason in results.skipped.items()),
        *(f"{_name(r.model, r.backend, r.batch)} failed: {r.failed}" for r in results.latency if r.failed),
        *([f"UNet step samples scatter by over 10% (interquartile range over median) for {', '.join(noisy)}: the machine was busy or too few were taken"] if noisy else []),
        *([f"Calls were not yet steady when timing began for {', '.join(unsteady)}"] if unsteady else []),
        *results.warnings,
    ]


def _bullets(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _method(results: Results) -> list[str]:
    s, guided = results.settings, results.settings["guidance_scale"] > 1
    return [
        f"Every model and backend runs in a fresh process, {s['rounds']} time(s), taking turns and never two at once. After a warm-up until calls agree within 10%, up to {s['samples']} calls of a stage "
        f"are timed a round ({s['end_to_end_samples']} whole pictures). Figures are medians over all rounds; intervals are 95% bootstrap intervals of the median. Raw samples are in results.json.",
        f"A UNet step is one call on {'2 × batch latents, as classifier-free guidance makes it' if guided else 'batch latents, without guidance'}. Speed-up compares pictures a second, prompt to pixels, "
        f"with {results.teacher} in PyTorch at the same batch. Peak memory is the GPU's where there is one, else the resident memory of the process, the Python runtime and its libraries included.",
        f"Off PyTorch: relative L2 of the UNet's output to PyTorch fp32 with the same weights, the worst of {len(s['timesteps'])} timesteps, on {s['probes']} pictures of the teacher noised to each timestep. "
        "fp32 must stay within 1e-4, a lower precision within twice PyTorch's own error at that precision.",
        "Student against teacher: the same UNet inputs to both; PSNR and SSIM (Wang et al. 2004) of pictures from equal initial noise. A student may draw another good picture, so read these with the "
        "CLIP figures, which ask only whether a picture shows its caption; intervals there are 95% Wilson intervals.",
    ]


def _machine(results: Results) -> str:
    env = results.environment
    gpu = "; ".join(f"{g['name']}, {g['memory_mib']:,} MiB, driver {g['driver']}" for g in env["gpu"])
    return ", ".join(part for part in (gpu, env["cpu"], f"{env['cores']} cores", f"{(env['memory_mib'] or 0) / 1024:,.0f} GiB", env["os"]) if part)


def _facts(results: Results) -> str:
    env = results.environment
    facts = [
        ("Machine", _machine(results)),
        ("Python", env["python"]),
        *env["packages"].items(),
        ("PyTorch threads", env["torch_threads"]),
        ("load average before", env["load_average"]),
        ("commit", env["commit"]),
    ]
    facts += [(f"sha256 of {model['name']}", model["sha256"]) for model in results.models]
    return "<dl>" + "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts if value not in (None, "")) + "</dl>"
