"""What LoRAs cost and do, as Markdown: training one, swapping them, and those of the whole model on its students."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .markdown import Cells, section
from .readme_table import machine

Figures = Mapping[str, Any]
_BACKENDS = {"onnxruntime": "ONNX Runtime", "aot": "AOTInductor"}
_WEIGHTS = (0.5, 1.0, 1.5, 2.0)


def adapting_section(found: Figures) -> str:
    """Returns the section of `bench/studies/adapting.py`: a word learned by LoRA and by finetuning.

    Args:
        found: its result.
    """
    rows = []
    for name, row in found["rows"].items():
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "–"
        rows.append((name, f"{row['style_accuracy']:.0%}", str(row.get("steps", "–")), seconds))
    speed = {name: statistics.median(values) for name, values in found["lora_steps_per_s"].items()}
    return section(
        f'nano-tiny learns a word it has never seen ("{found["word"]} ..." for line drawings), {found["prompts"]}'
        " held-out prompts:",
        (None, "drawn as the word asks", "steps", "seconds"),
        rows,
        f"LoRA training runs at {speed['nano-tiny']:.1f} steps a second on the student and {speed['nano']:.1f} on"
        f" the teacher: {found['lora_student_over_teacher']:.2f} times as fast.",
    )


def swap_section(found: Figures) -> str:
    """Returns the section of `bench/studies/lora_swaps.py`.

    Args:
        found: its result.
    """
    rows: Mapping[str, Figures] = found["rows"]
    swaps = next(iter(rows.values()))["swaps"]
    equal = all(row["reset_is_bit_equal"] for row in rows.values())
    slower = ", ".join(
        f"{statistics.median(times['exchangeable_s']) / statistics.median(times['fixed_s']) - 1:.0%} in {precision}"
        for precision, times in found["packages"].items()
    )
    return section(
        f"bk-tiny of SD1.5's size, a LoRA of {found['lora']}, {machine(found['environment'])};"
        f" medians of {swaps} swaps:",
        ("backend", "a LoRA in", "out", "error against the LoRA baked in (limit)", "memory during the swaps"),
        (_swap_cells(name, row) for name, row in rows.items()),
        f"Out again, the outputs were {'bit-equal to those before on each of them' if equal else 'NOT those before'}."
        f" On this CPU, a package of AOTInductor that takes LoRAs needs more time for a step than one that takes none:"
        f" {slower}.",
    )


def _swap_cells(name: str, row: Figures) -> Cells:
    backend, precision = name.split()
    times = [f"{statistics.median(row[f'{kind}_s']):.2f} s" for kind in ("set", "reset")]
    memory = [round(value) for value in row["resident_mib"]]
    low, high = min(memory), max(memory)
    trend = f"{low:,} to {high:,} MiB, first {memory[0]:,}, last {memory[-1]:,}" if low < high else f"{low:,} MiB"
    return [
        f"{_BACKENDS.get(backend, backend)} {precision}",
        *times,
        f"{row['relative_l2']:.1e} ({row['limit']:.1e})",
        trend,
    ]


def student_section(found: Figures) -> str:
    """Returns the section of `bench/studies/lora_remap.py`.

    Args:
        found: its result.
    """
    return section(
        f"A LoRA for a new word ({found['word']} …) on nano and its students, {found['prompts']} prompts, mean over the"
        " seeds of the LoRA: right style, and right caption in the judge's top 5.",
        ("model", "LoRA on", "trained on", *(f"weight {weight:g}" for weight in _WEIGHTS), "norm kept"),
        _student_cells([row for row in found["rows"] if row["prompts"] == "word" and row["kind"]]),
    )


def _student_cells(rows: Sequence[Figures]) -> Iterator[Cells]:
    """Yields a row of the table for each model, kind of LoRA and model that it was trained on, in their order."""
    arms = dict.fromkeys((row["model"], row["kind"], row["trained_on"]) for row in rows)
    for model, kind, trained_on in arms:
        own = [row for row in rows if (row["model"], row["kind"], row["trained_on"]) == (model, kind, trained_on)]
        kept = [row["kept_norm"] for row in own if row["kept_norm"] is not None]
        cells = []
        for weight in _WEIGHTS:
            at = [row for row in own if row["weight"] == weight]
            shares = (statistics.fmean(row[key] for row in at) for key in ("style_accuracy", "retrieval_top5") if at)
            cells.append(" / ".join(f"{share:.0%}" for share in shares) or "–")
        yield [model, kind, trained_on, *cells, f"{statistics.fmean(kept):.0%}" if kept else "–"]
