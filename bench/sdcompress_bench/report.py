"""One self-contained HTML page, and the same table in Markdown, from `Results`: the answer first, then what backs it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import _page, _plots
from .latency import Latency
from .results import Results, Row
from .scenario import Way

_HEAD = (
    "model",
    "parameters",
    "UNet size",
    "run by",
    "UNet step",
    "pictures/s",
    "speed-up",
    "of peak",
    "peak memory",
    "off PyTorch",
)

_INTERVAL = re.compile(r"(\([^()]{1,24}\))")


def write_report(results: Results, folder: Path) -> None:
    """Write `report.html` and `report.md` into `folder`, where the results' pictures already are."""
    (folder / "report.html").write_text(render_html(results, folder), encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(results), encoding="utf-8")


def render_markdown(results: Results) -> str:
    """The headline, the table, the quality figures and the command."""
    lines = [
        f"# {headline(results)}",
        "",
        _subline(results),
        "",
        *_markdown_table(_HEAD, [_cells(results, row) for row in results.rows()], left=4),
    ]
    for title, head, rows in [*_quality_tables(results), *_limit_tables(results), *_gate_tables(results)]:
        lines += ["", f"**{title}**", "", *_markdown_table(head, rows)]
    lines += [
        "",
        *(f"- {warning}" for warning in _warnings(results)),
        "",
        f"Machine: {_machine(results)}.",
        "",
        "```",
        results.command,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * left}{'---:|' * (len(head) - left)}",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]


def render_html(results: Results, folder: Path) -> str:
    """The page as one string; pictures are read from `folder` and embedded."""
    title = headline(results)
    table = _table(
        _HEAD,
        [_cells(results, row) for row in results.rows()],
        "answer",
        tones=[row.way.backend for row in results.rows()],
    )
    warnings = _warnings(results)
    sections = [
        ("Speed", _speed(results)),
        ("Same prompt, same seed", _pictures(results, folder)),
        ("Quality", _titled(_quality_tables(results))),
        ("Distance, timestep by timestep", _errors(results)),
        ("How far the limit is", _titled(_limit_tables(results))),
        ("Training", _losses(results)),
        ("Gates", _titled(_gate_tables(results))),
        ("Read this first" if results.failed_gates() else "Notes", _bullets(warnings)),
        ("Method", "".join(f"<p>{escape(text)}</p>" for text in _method(results))),
        ("Machine", _facts(results)),
        ("Again", f"<pre>{escape(results.command)}</pre>"),
    ]
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections if content)
    return _page.PAGE.format(
        title=escape(title),
        style=_page.STYLE,
        headline=escape(title),
        subline=escape(_subline(results)),
        table=table,
        body=body,
        created=escape(results.created),
    )


def _titled(tables: Iterable[tuple[str, Sequence[str], list[list[str]]]]) -> str:
    return "".join(f"<h3>{escape(name)}</h3>{_table(head, rows)}" for name, head, rows in tables)


def _name(results: Results, row: Row | Latency) -> str:
    """Model and way, with size and batch where there are several."""
    return f"{row.model} · {row.way}{_shape(results, row)}"


def _shape(results: Results, row: Row | Latency) -> str:
    sizes, batches = {run.size_px for run in results.latency}, {run.batch for run in results.latency}
    return (f", {row.size_px} px" if len(sizes) > 1 else "") + (f", batch {row.batch}" if len(batches) > 1 else "")


def headline(results: Results) -> str:
    """The answer in one line."""
    rows = [row for row in results.rows() if row.speedup is not None]
    best = max(rows, key=lambda row: row.speedup or 0.0, default=None)
    base = f"{results.teacher} in {results.baseline}" if results.baseline else f"{results.teacher} in PyTorch"
    if best is None:
        return (
            f"{base} could not be measured"
            if results.baseline
            else f"{results.teacher}, measured without PyTorch to compare with"
        )
    if best.speedup is None or best.speedup <= 1.0 or (best.model == results.teacher and best.way == results.baseline):
        return f"Nothing here is faster than {base}"
    reference = next(
        row
        for row in rows
        if row.model == results.teacher
        and row.way == results.baseline
        and (row.size_px, row.batch) == (best.size_px, best.batch)
    )
    shaky = [s for s in (best.end_to_end, reference.end_to_end) if s is None or s.noisy or s.count < 3]
    claim = f"{best.model} on {best.way} makes pictures {best.speedup:.2f}× as fast as {base}"
    return claim + (", if these few or scattered samples can be trusted" if shaky else "")


def _subline(results: Results) -> str:
    teacher, *students = results.models
    whole = teacher["parameters"].get("unet") or 1
    parts = [
        f"{s['name']} has {s['parameters'].get('unet', 0) / whole:.0%} of the UNet's {_millions(whole)} parameters"
        for s in students
    ]
    judged = [(name, figures) for name, figures in results.quality.items() if "style" in figures or "top1" in figures]
    key, what = ("style", "Style recognised in") if judged and "style" in judged[0][1] else ("top1", "Caption found in")
    if judged:
        parts.append(
            f"{what} "
            + ", ".join(
                f"{figures[key]['share']:.0%} ({'real pictures' if name == 'real' else name})"
                for name, figures in judged
                if key in figures
            )
        )
    s = results.settings
    parts.append(
        f"{' and '.join(map(str, s['sizes_px']))} px, {s['steps']} steps, guidance"
        f" {s['guidance_scale']:g}{', random weights' if any(m.get('random') for m in results.models) else ''}"
    )
    return ". ".join(parts) + "."


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _rate(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _cells(results: Results, row: Row) -> list[str]:
    way = f"{row.way}{_shape(results, row)}"
    if row.failed or row.unet_step is None or row.images_per_s is None or row.peak_mib is None:
        return [row.model, _millions(row.parameters), "–", way, f"failed: {row.failed}", "–", "–", "–", "–", "–"]
    mark = " (noisy)" if row.unet_step.noisy else ""
    if row.fidelity is None:
        fidelity = "reference" if row.way == Way("torch", "fp32") else "–"
    else:
        fidelity = f"{row.fidelity:.1e}" + ("" if row.fidelity_passed is not False else " over its limit")
    return [
        row.model,
        _millions(row.parameters),
        f"{row.unet_mib:,.1f} MiB",
        way,
        _ms(row.unet_step.median) + mark,
        _rate(row.images_per_s),
        f"{row.speedup:.2f}×" if row.speedup else "–",
        f"{row.share_of_peak:.0%}" if row.share_of_peak else "–",
        f"{row.peak_mib:,.0f} MiB",
        fidelity,
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "", tones: Sequence[str] = ()) -> str:
    """Cells carry their column's name, which a narrow screen shows in place of the head; an interval in one is not
    broken.
    """
    body = []
    for index, row in enumerate(rows):
        tone = f' class="on-{tones[index]}"' if tones else ""
        body.append(
            f"<tr{tone}>"
            + "".join(
                f'<td data-name="{escape(name)}">{_unbroken(escape(cell))}</td>'
                for name, cell in zip(head, row, strict=True)
            )
            + "</tr>"
        )
    return (
        "<table"
        f' class="{kind}"><thead><tr>{"".join(f"<th>{escape(name)}</th>" for name in head)}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    )


def _unbroken(cell: str) -> str:
    return _INTERVAL.sub(r"<i>\1</i>", cell)


def _speed(results: Results) -> str:
    rows = [row for row in results.rows() if not row.failed]
    plots = []
    for title, stage in (
        ("One UNet step, ms (median, 95% interval)", "unet_step"),
        ("Prompt to picture, ms (median, 95% interval)", "end_to_end"),
    ):
        drawn = []
        for row in rows:
            summary = row.unet_step if stage == "unet_step" else row.end_to_end
            if summary:
                drawn.append(
                    _plots.Bar(
                        _name(results, row),
                        summary.median,
                        summary.low,
                        summary.high,
                        _ms(summary.median),
                        row.way.backend,
                    )
                )
        if drawn:
            plots.append(_plots.bars(title, drawn))
    dots, y_name, ceiling = _trade(results, rows)
    if dots:
        plots.append(_plots.scatter("Speed against quality", dots, "pictures/s", y_name, ceiling))
    head = (
        "model",
        "run by",
        "text encoder",
        "UNet step",
        "p90",
        "p99",
        "VAE decode",
        "end to end",
        "load",
        "first picture",
        "build",
    )
    return (
        f'<div class="plots">{"".join(plots)}</div><details><summary>Every stage</summary><div'
        f' class="scroll">{_table(head, list(_stage_rows(results)))}</div></details>'
    )


def _stage_rows(results: Results) -> Iterable[list[str]]:
    for run in results.latency:
        text, step, vae, whole = (
            run.summary(stage) for stage in ("text_encoder", "unet_step", "vae_decode", "end_to_end")
        )
        if text and step and vae and whole:
            first = [load + picture for load, picture in zip(run.load_ms, run.first_image_ms, strict=True)]
            build = "–" if run.build_s is None else f"{run.build_s:,.0f} s"
            cells = [
                text.median,
                step.median,
                step.p90,
                step.p99,
                vae.median,
                whole.median,
                min(run.load_ms),
                min(first),
            ]
            yield [run.model, f"{run.way}{_shape(results, run)}", *map(_ms, cells), build]


def _trade(results: Results, rows: list[Row]) -> tuple[list[_plots.Dot], str, tuple[float, str] | None]:
    """Speed of every row against its model's quality: the best figure there is, with its interval."""
    known = (
        ("style", "style recognised, %"),
        ("top1", "caption found first, %"),
        ("clip_score", "CLIP score"),
        ("fid_real", "FID to real pictures (lower is better)"),
    )
    key, y_name = next(((k, name) for k, name in known if any(k in q for q in results.quality.values())), ("", ""))
    marks = {name: _band(figures[key]) for name, figures in results.quality.items() if key in figures}
    # A model's dots are at one height, so its name is written once, at the fastest.
    fastest = {row.model: max(r.images_per_s or 0 for r in rows if r.model == row.model) for row in rows}
    dots = [
        _plots.Dot(
            row.images_per_s,
            *marks[row.model],
            row.model if row.images_per_s == fastest[row.model] else "",
            row.way.backend,
        )
        for row in rows
        if row.images_per_s and row.model in marks
    ]
    return dots, f"{y_name}; colour: what runs it", (marks["real"][0], "real pictures") if "real" in marks else None


def _band(figure: Any) -> tuple[float, float, float]:
    if not isinstance(figure, dict):
        return figure, figure, figure
    return (
        (100 * figure["share"], 100 * figure["low"], 100 * figure["high"])
        if "share" in figure
        else (figure["value"], figure["low"], figure["high"])
    )


def _quality_tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    tables = []
    if results.quality:
        names = {
            "clip_score": "CLIP score",
            "top1": "caption found first",
            "top5": "among five",
            "style": "style recognised",
            "fid_real": "FID to real",
            "kid_real": "KID to real",
        }
        keys = [key for key in names if any(key in figures for figures in results.quality.values())]
        rows = [
            ["real pictures" if m == "real" else m, *(_figure(figures.get(k)) for k in keys)]
            for m, figures in results.quality.items()
        ]
        count = results.settings["quality_pictures"]
        tables.append(
            (
                f"{count} pictures of each, with 95% intervals" if count else "The pictures, with 95% intervals",
                ["model", *(names[k] for k in keys)],
                rows,
            )
        )
    if results.students:
        names = {
            "relative_l2_mean": "UNet off the teacher, mean",
            "relative_l2": "worst step",
            "fid": "FID",
            "kid": "KID",
            "lpips": "LPIPS",
            "psnr_db": "PSNR, dB",
            "ssim": "SSIM",
        }
        keys = [key for key in names if any(key in figures for figures in results.students.values())]
        rows = [[name, *(_figure(figures.get(key)) for key in keys)] for name, figures in results.students.items()]
        tables.append(
            (
                f"Student against {results.teacher}, equal prompts and seeds",
                ["student", *(names[key] for key in keys)],
                rows,
            )
        )
    measured = [b for b in results.backends if "relative_l2" in b]
    if measured:
        head = [
            "same weights",
            "relative L2, worst",
            "of its limit",
            "cosine",
            "PSNR of pictures",
            "SSIM",
            "LPIPS",
            "least fault seen",
        ]
        rows = [
            [
                f"{b['model']} · {Way(b['backend'], b['precision'])}",
                f"{b['relative_l2']:.1e}",
                _of_limit(b.get("gate")),
                f"{b['cosine']:.7f}",
                _or_dash(b["picture_psnr_db"], "{:.1f} dB"),
                _or_dash(b["picture_ssim"], "{:.5f}"),
                _or_dash(b.get("picture_lpips"), "{:.4f}"),
                _seen(b.get("sensitivity")),
            ]
            for b in measured
        ]
        tables.append(("Same weights run otherwise, held against PyTorch fp32", head, rows))
    return tables


def _of_limit(gate: dict[str, Any] | None) -> str:
    """How much of what is allowed is used, at the timestep nearest to its limit."""
    return "–" if not gate else f"{gate['error'] / gate['limit']:.0%} of {gate['limit']:.1e}"


def _seen(sensitivity: dict[str, Any] | None) -> str:
    """How small a fault the gate could see: one layer's weights off by so much, in the median of the places tried, and
    attention heads that could be dead.
    """
    if not sensitivity:
        return "–"
    low, middle, high = (
        "none" if sensitivity[key] is None else f"{sensitivity[key]:.2%}"
        for key in ("least_low", "least", "least_high")
    )
    return (
        f"{middle} of a layer ({low} to {high}); {sensitivity['heads_unseen']} of {sensitivity['heads']} dead heads"
        " unseen"
    )


def _limit_tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """Steps beside what this device could do at best."""
    rows = [
        [
            run.model,
            f"{run.way}{_shape(results, run)}",
            f"{r['macs'] / 1e9:,.1f}",
            _ms(step.median),
            _ms(r["least_ms"]),
            f"{r['share_of_matmul_peak']:.0%}",
            f"{r['share_of_bandwidth']:.0%}",
            r["bound"],
        ]
        for run in results.latency
        if (r := run.roofline) and (step := run.summary("unet_step"))
    ]
    if not rows:
        return []
    peaks = "; ".join(
        f"{name}: {_si(peak['matmul_flops_per_s'])}FLOP/s, {_si(peak['bandwidth_bytes_per_s'])}B/s"
        for name, peak in results.peaks.items()
    )
    return [
        (
            f"A UNet step beside the best this device did in matrix products and copies ({peaks})",
            ["model", "run by", "GMACs", "step", "least possible", "of matmul peak", "of bandwidth", "bound by"],
            rows,
        )
    ]


def _si(value: float) -> str:
    return f"{value / 1e12:,.1f} T" if value >= 1e12 else f"{value / 1e9:,.1f} G"


def _gate_tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    rows = [
        [
            " · ".join(part for part in (gate["model"], gate["way"]) if part),
            gate["figure"],
            gate["limit"].removeprefix(gate["figure"]).strip(),
            _or_dash(gate["value"], "{:.4g}"),
            "holds" if gate["passed"] else "fails",
        ]
        for gate in results.gates
    ]
    return [("Limits of the suite", ["of", "figure", "limit", "measured", ""], rows)] if rows else []


def _figure(figure: Any) -> str:
    if isinstance(figure, dict):
        return (
            f"{figure['share']:.1%} ({figure['low']:.0%}–{figure['high']:.0%})"
            if "share" in figure
            else estimate_text(figure)
        )
    return _or_dash(figure, "{:.3f}")


def estimate_text(estimate: Mapping[str, Any]) -> str:
    """An estimate with its interval, in digits that its size asks for."""
    size = max(abs(estimate["low"]), abs(estimate["high"]))
    digits = 1 if size >= 10 else 3 if size >= 0.1 else 4
    value, low, high = (
        f"{round(estimate[key], digits) + 0.0:.{digits}f}" for key in ("value", "low", "high")
    )  # + 0.0: no minus before a zero
    return f"{value} ({low} to {high})"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _pictures(results: Results, folder: Path) -> str:
    """A row a caption, a column a model and way.

    The first column's picture is laid over the others, as a difference, where the switch is on.
    """
    if not results.pictures:
        return ""
    heads = "".join(
        f"<b>{escape(str(column['model']))}<br><small>{escape(str(Way(column['backend'], column['precision'])))}</small></b>"
        for column in results.pictures
    )
    rows = []
    for index, caption in enumerate(results.captions):
        data = [
            base64.b64encode((folder / column["files"][index]).read_bytes()).decode() for column in results.pictures
        ]
        cells = []
        for column, picture in zip(results.pictures, data, strict=True):
            label = f"{caption}, {column['model']}, {Way(column['backend'], column['precision'])}"
            cells.append(
                f'<span class="cell"><img alt="{escape(label)}" src="data:image/webp;base64,{picture}"></span>'
            )
        rows.append(
            f'<p class="caption">{escape(caption)} <small>· seed {results.settings["seed"] + index}</small></p><div'
            f' class="row" style="--first:url(data:image/webp;base64,{data[0]})">{"".join(cells)}</div>'
        )
    switch = (
        '<label class="switch"><input type="checkbox"> show the difference to the first column, eight times as'
        " strong</label>"
        if len(results.pictures) > 1
        else ""
    )
    return (
        f'{switch}<div class="scroll"><div class="pictures" style="--columns:{len(results.pictures)}"><div class="row'
        f' heads">{heads}</div>{"".join(rows)}</div></div>'
    )


def _errors(results: Results) -> str:
    backends = [
        _line(f"{b['model']} · {Way(b['backend'], b['precision'])}", b, i)
        for i, b in enumerate(results.backends)
        if "steps" in b
    ]
    students = [
        _line(name, figures, i) for i, (name, figures) in enumerate(results.students.items()) if "steps" in figures
    ]
    limits = {limit for b in results.backends for limit in b.get("gate", {}).get("limits", [])}
    level = (limits.pop(), "limit in fp32") if len(limits) == 1 else None
    plots = (
        _plots.lines(
            "Same weights run otherwise, to PyTorch fp32", backends, "timestep", "relative L2", log=True, level=level
        )
        if backends
        else ""
    )
    plots += _plots.lines(f"Student against {results.teacher}", students, "timestep", "relative L2") if students else ""
    return f'<div class="plots">{plots}</div>' if plots else ""


def _line(label: str, figures: dict[str, Any], index: int) -> _plots.Line:
    return _plots.Line(label, [(step["timestep"], step["relative_l2"]) for step in figures["steps"]], f"s{index % 6}")


def _losses(results: Results) -> str:
    plots = [
        _plots.lines(
            model,
            [
                _plots.Line(name, [(step, value) for step, value in pairs], f"s{i % 6}")
                for i, (name, pairs) in enumerate(series.items())
            ],
            "step",
            "loss",
            log=True,
        )
        for model, series in results.losses.items()
    ]
    return f'<div class="plots">{"".join(plots)}</div>' if plots else ""


def _warnings(results: Results) -> list[str]:
    noisy = [_name(results, r) for r in results.rows() if r.unet_step and r.unet_step.noisy]
    unsteady = [f"{_name(results, r)} ({', '.join(r.unsteady)})" for r in results.latency if r.unsteady]
    estimates = [
        figure
        for part in (*results.quality.values(), *results.students.values())
        for figure in part.values()
        if isinstance(figure, dict)
    ]
    return [
        *results.failed_gates(),
        *(f"{name} was not measured: {reason}" for name, reason in results.skipped.items()),
        *(f"{_name(results, r)} failed: {r.failed}" for r in results.latency if r.failed),
        *(
            f"{b['model']} on {Way(b['backend'], b['precision'])} could not be held against PyTorch: {b['failed']}"
            for b in results.backends
            if "failed" in b and "gate" not in b
        ),
        *(
            [
                "Every case ran in one round: the intervals do not know how one process differs from the next, and a"
                " busy machine may have slowed one case alone"
            ]
            if results.settings["rounds"] == 1
            else []
        ),
        *(
            [
                f"UNet step samples scatter by over 10% (interquartile range over median) for {', '.join(noisy)}: the"
                " machine was busy or too few were taken"
            ]
            if noisy
            else []
        ),
        *([f"Calls were not yet steady when timing began for {', '.join(unsteady)}"] if unsteady else []),
        *dict.fromkeys(str(estimate["warning"]) for estimate in estimates if estimate.get("warning")),
        *results.warnings,
    ]


def _bullets(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _method(results: Results) -> list[str]:
    s, guided = results.settings, results.settings["guidance_scale"] > 1
    found = [
        (
            f"Every case runs in a fresh process, {s['rounds']} time(s), taking turns and never two at once. After a"
            f" warm-up until calls agree within 10%, up to {s['samples']} calls of a stage are timed a round"
            f" ({s['end_to_end_samples']} whole pictures). Figures are medians over all rounds; intervals are 95% and"
            " take in how rounds differ, where there are two or more. Raw samples are in results.json."
        ),
        (
            "A UNet step is one call on"
            f" {'2 × batch latents, as classifier-free guidance makes it' if guided else 'batch latents, without guidance'}."
            f" Speed-up compares pictures a second, prompt to pixels, with {results.teacher} in"
            f" {results.baseline or 'PyTorch'} at the same size and batch. Peak memory is the GPU's where there is one,"
            " else the resident memory of the process, the Python runtime and its libraries included. The first"
            " picture takes loading and warming up in."
        ),
        (
            "Of peak: multiply-adds counted in convolutions, products and attention, over what this device reached in"
            " square matrix products of that precision in this run. Bytes are those an ideally fused execution has to"
            " move."
        ),
        "Off PyTorch: relative L2 of the UNet's output to PyTorch fp32 with the same weights, the worst of"
        f" {len(s['timesteps'])} timesteps, on {s['probes']} "
        + ("latents of noise. " if s.get("random") else "pictures of the teacher noised to each timestep. ")
        + "fp32 must stay within 1e-4 at each of them, a lower precision within twice PyTorch's own error in that"
        " precision at the same timestep; values that are not finite never pass.",
    ]
    if results.students:
        found.append(
            "Student against teacher: the same UNet inputs to both; LPIPS, PSNR and SSIM of pictures from equal initial"
            " noise, FID and KID of the two sets. A student may draw another good picture, so read the pairs with the"
            " figures of sets and the CLIP figures, which ask only whether a picture shows its caption. FID falls as"
            " pictures are added and compares only with FID of as many; KID does not."
        )
    if any("sensitivity" in b for b in results.backends):
        found.append(
            "Least fault seen: one layer's weights scaled until the error passes the gate, at several places; median"
            " and range of the change it takes. Dead heads: attention heads set to zero, one at a time."
        )
    return found


def _machine(results: Results) -> str:
    env = results.environment
    gpu = "; ".join(f"{g['name']}, {g['memory_mib']:,} MiB, driver {g['driver']}" for g in env["gpu"])
    return ", ".join(
        part
        for part in (gpu, env["cpu"], f"{env['cores']} cores", f"{(env['memory_mib'] or 0) / 1024:,.0f} GiB", env["os"])
        if part
    )


def _facts(results: Results) -> str:
    env = results.environment
    facts = [
        ("Machine", _machine(results)),
        ("Python", env["python"]),
        *env["packages"].items(),
        ("PyTorch threads", env["torch_threads"]),
        ("vector units", ", ".join(env.get("cpu_features", []))),
        ("clocks", env.get("clocks", "")),
        (
            "load average",
            " before, ".join(
                str(env[key]) for key in ("load_average", "load_average_after") if env.get(key) is not None
            )
            + (" after" if env.get("load_average_after") is not None else ""),
        ),
        ("commit", env["commit"]),
        ("took", f"{results.seconds / 60:.1f} min" if results.seconds else None),
    ]
    facts += [(f"sha256 of {model['name']}", model["sha256"]) for model in results.models]
    return (
        "<dl>"
        + "".join(
            f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
            for name, value in facts
            if value not in (None, "")
        )
        + "</dl>"
    )
