"""The tables of the report, as text cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..latency import LORA_SWAP
from ..results import Results, Row
from ..scenario import BackendSetup
from .formatting import (
    NO_FIGURE,
    format_figure,
    format_large,
    format_millions,
    format_ms,
    format_or_dash,
    format_rate,
    format_seconds,
    format_setup,
)

_QUALITY_NAMES = {
    "clip_score": "CLIP score",
    "top1": "caption found first",
    "top5": "among five",
    "style": "style recognized",
    "fid_real": "FID to real",
    "kid_real": "KID to real",
}
_STUDENT_NAMES = {
    "relative_l2_mean": "UNet off the teacher, mean",
    "relative_l2": "worst step",
    "fid": "FID",
    "kid": "KID",
    "lpips": "LPIPS",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
}


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: heading; may be empty.
        head: names of the columns.
        rows: cells, as many in each row as there are columns.
        tones: CSS class of each row, the name of its backend; may be empty.
        left: how many columns are aligned to the left in Markdown.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    tones: Sequence[str] = field(default=())
    left: int = 1


def answer_table(results: Results) -> Table:
    """Returns the main table: a row for each model, backend setup, size and batch. Whole pictures stand first."""
    head = (
        "model",
        "drawn in",
        "parameters",
        "UNet size",
        "backend",
        "s a picture",
        "pictures/s",
        "speed-up",
        "one UNet step",
        "of peak",
        "peak memory",
        "relative L2 to PyTorch fp32",
    )
    rows = list(results.rows())
    return Table("", head, [_answer_cells(results, row) for row in rows], [row.setup.backend for row in rows], left=5)


def _answer_cells(results: Results, row: Row) -> list[str]:
    setup = format_setup(results, row)
    names = [row.model, str(row.sampling), format_millions(row.parameters)]
    if row.failed or row.unet_step is None or row.images_per_s is None or row.peak_mib is None:
        return [*names, NO_FIGURE, setup, f"failed: {row.failed}"] + [NO_FIGURE] * 6
    return [
        *names,
        f"{row.unet_mib:,.1f} MiB",
        setup,
        format_seconds(1 / row.images_per_s),
        format_rate(row.images_per_s),
        f"{row.speedup:.2f}×" if row.speedup else NO_FIGURE,
        format_ms(row.unet_step.median) + (" (noisy)" if row.unet_step.noisy else ""),
        f"{row.share_of_peak:.0%}" if row.share_of_peak else NO_FIGURE,
        f"{row.peak_mib:,.0f} MiB",
        _fidelity(row),
    ]


def _fidelity(row: Row) -> str:
    if row.fidelity is None:
        return "reference" if row.setup == BackendSetup("torch", "fp32") else NO_FIGURE
    return f"{row.fidelity:.1e}" + ("" if row.fidelity_passed is not False else " over its limit")


def stage_table(results: Results) -> Table:
    """Returns the times of every stage, of loading and of building."""
    head = (
        "model",
        "backend",
        "end to end",
        "text encoder",
        "one UNet step",
        "p90",
        "p99",
        "VAE decode",
        "load",
        "first picture",
        "build",
    )
    return Table("", head, list(_stage_rows(results)))


def _stage_rows(results: Results) -> Iterable[list[str]]:
    for run in results.latency:
        text, step = run.summary("text_encoder"), run.summary("unet_step")
        vae, whole = run.summary("vae_decode"), run.summary("end_to_end")
        if text and step and vae and whole:
            first = min(load + picture for load, picture in zip(run.load_ms, run.first_image_ms, strict=True))
            build = NO_FIGURE if run.build_s is None else f"{run.build_s:,.0f} s"
            times = [whole.median, text.median, step.median, step.p90, step.p99, vae.median, min(run.load_ms), first]
            yield [run.model, format_setup(results, run), *map(format_ms, times), build]


def swap_tables(results: Results) -> list[Table]:
    """Returns the table of how long it takes to swap LoRAs, if a model has some."""
    rows, loras = list[list[str]](), results.loras()
    for run in results.latency:
        directions: tuple[Literal["set", "reset", "again"], ...] = ("set", "reset", "again")
        summaries = [run.summary(LORA_SWAP), *map(run.swap_summary, directions)]
        if summaries[0]:
            times = [NO_FIGURE if each is None else format_ms(each.median) for each in summaries]
            rows.append([run.model, format_setup(results, run), loras.get(run.model, NO_FIGURE), *times])
    head = ("model", "backend", "LoRAs", "in and out", "in", "out", "the same in again")
    return [Table("Swapping LoRAs in an open pipeline", head, rows, left=3)] if rows else []


def quality_tables(results: Results) -> list[Table]:
    """Returns the tables of picture sets, of students and of backends; those without figures are left out."""
    return [*_set_tables(results), *_student_tables(results), *_backend_tables(results)]


def _set_tables(results: Results) -> Iterable[Table]:
    if results.quality:
        keys = _present(_QUALITY_NAMES, results.quality)
        rows = [
            ["real pictures" if name == "real" else name, *(format_figure(figures.get(key)) for key in keys)]
            for name, figures in results.quality.items()
        ]
        count = results.settings["quality_pictures"]
        title = f"{count} pictures of each, with 95% intervals" if count else "The pictures, with 95% intervals"
        yield Table(title, ["model", *(_QUALITY_NAMES[key] for key in keys)], rows)


def _student_tables(results: Results) -> Iterable[Table]:
    if results.students:
        keys = _present(_STUDENT_NAMES, results.students)
        rows = [[name, *(format_figure(figures.get(k)) for k in keys)] for name, figures in results.students.items()]
        title = f"Student against {results.teacher}, equal prompts and seeds"
        title += ", each in its own steps" if len(set(results.sampling().values())) > 1 else ""
        yield Table(title, ["student", *(_STUDENT_NAMES[key] for key in keys)], rows)


def _present(names: Mapping[str, str], entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the figures that at least one entry has."""
    return [key for key in names if any(key in figures for figures in entries.values())]


def _backend_tables(results: Results) -> Iterable[Table]:
    head = (
        "same weights",
        "relative L2, worst",
        "of its limit",
        "cosine",
        "PSNR of pictures",
        "SSIM",
        "LPIPS",
        "smallest detected fault",
    )
    rows = [
        [
            f"{entry['model']} · {BackendSetup(entry['backend'], entry['precision'])}",
            f"{entry['relative_l2']:.1e}",
            _share_of_limit(entry.get("gate")),
            f"{entry['cosine']:.7f}",
            format_or_dash(entry["picture_psnr_db"], "{:.1f} dB"),
            format_or_dash(entry["picture_ssim"], "{:.5f}"),
            format_or_dash(entry.get("picture_lpips"), "{:.4f}"),
            _sensitivity(entry.get("sensitivity")),
        ]
        for entry in results.backends
        if "relative_l2" in entry
    ]
    if rows:
        yield Table("Same weights on other backends, compared with PyTorch fp32", head, rows)


def _share_of_limit(gate: Mapping[str, Any] | None) -> str:
    """Returns the error as a share of the limit, at the timestep where that share is largest."""
    return NO_FIGURE if not gate else f"{gate['error'] / gate['limit']:.0%} of {gate['limit']:.1e}"


def _sensitivity(figures: Mapping[str, Any] | None) -> str:
    """Returns the smallest fault that the gate detects.

    That is a relative change of one layer's weights, the median of the tried places; and the number of attention heads
    that can be zeroed without being detected.
    """
    if not figures:
        return NO_FIGURE
    low, median, high = (
        "none" if figures[key] is None else f"{figures[key]:.2%}" for key in ("least_low", "least", "least_high")
    )
    heads = f"{figures['heads_unseen']} of {figures['heads']} zeroed heads not detected"
    return f"{median} of a layer ({low} to {high}); {heads}"


def limit_tables(results: Results) -> list[Table]:
    """Returns the table of UNet steps against the device's measured limits, if the work was counted."""
    rows = [
        [
            run.model,
            format_setup(results, run),
            f"{line['macs'] / 1e9:,.1f}",
            format_ms(step.median),
            format_ms(line["least_ms"]),
            f"{line['share_of_matmul_peak']:.0%}",
            f"{line['share_of_bandwidth']:.0%}",
            line["bound"],
        ]
        for run in results.latency
        if (line := run.roofline) and (step := run.summary("unet_step"))
    ]
    if not rows:
        return []
    peaks = "; ".join(
        f"{name}: {format_large(peak['matmul_flops_per_s'])}FLOP/s, {format_large(peak['bandwidth_bytes_per_s'])}B/s"
        for name, peak in results.peaks.items()
    )
    title = f"A UNet step beside the best this device did in matrix products and copies ({peaks})"
    head = ("model", "backend", "GMACs", "step", "least possible", "of matmul peak", "of bandwidth", "bound by")
    return [Table(title, head, rows)]


def gate_tables(results: Results) -> list[Table]:
    """Returns the table of the suite's gates, if it has any."""
    rows = [
        [
            " · ".join(part for part in (gate["model"], gate["way"]) if part),
            gate["figure"],
            gate["limit"].removeprefix(gate["figure"]).strip(),
            format_or_dash(gate["value"], "{:.4g}"),
            "holds" if gate["passed"] else "fails",
        ]
        for gate in results.gates
    ]
    return [Table("Limits of the suite", ("of", "figure", "limit", "measured", ""), rows)] if rows else []
