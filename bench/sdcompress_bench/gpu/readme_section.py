"""A result file of `bench/gpu.py` as Markdown: the UNet's steps, and a line each for pictures, training and tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..markdown import Cells, table_lines
from .results import UNET_PARTS, measured

HEAD = ("UNet", "batch", "eager", "fastest", "variant", "speed-up over SD1.5 eager", "of peak", "relative L2 to fp32")


def gpu_section(found: Mapping[str, Any]) -> str:
    """Returns the section of one gpu.json."""
    env, card, rows = found["environment"], found["card"], measured(found["rows"])
    name = f"{card['name']}, driver {card['driver']}" if card else f"{env['cpu']}, no GPU"
    lines = [
        f"{name}, torch {env['packages']['torch']}, random weights (`python bench/gpu.py --minutes"
        f" {found['minutes']:g}`):",
        "",
        *table_lines(HEAD, _step_rows(rows)),
        "",
        *_sentences(rows, found["headline"]),
    ]
    return "\n".join(lines) + "\n"


def _step_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[Cells]:
    """Yields a row for each UNet and batch, the teacher first."""
    known = {(row["part"], row["row"]): row for row in rows}
    steps = [row for row in rows if row["part"] in UNET_PARTS and "step_ms" in row]
    found = {(row["model"], row["batch"]) for row in steps}
    for model, batch in sorted(found, key=lambda key: (key[1], key[0] != "sd15", key[0])):
        own = (row for row in steps if (row["model"], row["batch"]) == (model, batch))
        best = min(own, key=lambda row: row["step_ms"])
        eager, teacher = known.get((3, f"{model} b{batch} eager")), known.get((3, f"sd15 b{batch} eager"))
        yield (
            model,
            str(batch),
            f"{eager['step_ms']:.2f} ms" if eager else "–",
            f"{best['step_ms']:.2f} ms",
            best["row"].removeprefix(f"{model} b{batch} "),
            f"{teacher['step_ms'] / best['step_ms']:.2f}×" if teacher else "–",
            f"{best['share_of_peak']:.0%}",
            f"{best['relative_l2']:.1e}",
        )


def _sentences(rows: Sequence[Mapping[str, Any]], headline: Mapping[str, Any]) -> list[str]:
    """Returns the sentences about pictures, training and tests, those that were measured."""
    known = {(row["part"], row["row"]): row for row in rows}
    lines = []
    if "picture_speedup" in headline:
        slow, fast = known[5, "sd15 eager"], known[5, "bk-tiny best"]
        lines.append(
            f"A picture with guidance takes {slow['picture_ms']:.0f} ms on SD1.5 in eager mode and"
            f" {fast['picture_ms']:.0f} ms on bk-tiny, where the host adds {fast['gap_ms_per_step']:.2f} ms to each"
            " step."
        )
    if "few_step_speedup" in headline:
        fast = known[5, "bk-tiny 4 steps small decoder best"]
        lines.append(
            f"In 4 steps without guidance, with a small decoder, bk-tiny takes {fast['picture_ms']:.0f} ms:"
            f" {1000 / fast['picture_ms']:.1f} pictures a second, {headline['few_step_speedup']:.0f} times SD1.5's."
        )
    loops = [f"{row['row']} {row['samples_per_s']:.1f}" for row in rows if row["part"] == 6 and "samples_per_s" in row]
    if loops:
        lines.append(f"Training samples a second: {', '.join(loops)}.")
    if "tests_passed" in headline:
        passed, others = headline["tests_passed"], headline["tests_not_passed"]
        lines.append(f"Tests that need a GPU: {passed} passed, {others} did not.")
    return lines
