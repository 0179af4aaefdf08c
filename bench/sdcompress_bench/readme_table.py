"""Results of `sdcompress bench` in the README: a table of the measured cases, and what its gates detect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .markdown import Cells
from .results import Results, Row


def machine(environment: Mapping[str, Any]) -> str:
    """Returns the processor of an environment that results carry, and the number of its cores."""
    return f"{environment['cpu']}, {environment['cores']} cores"


def answer_head(*more: str) -> Cells:
    """Returns the head of a report's table in the README; `more` stands before the memory."""
    head = ("model", "drawn in", "UNet parameters", "backend", "pictures/s", "speed-up", "one UNet step")
    return (*head, *more, "peak memory", "relative L2 to PyTorch fp32")


def answer_cells(row: Row, peak: bool = False) -> Cells:
    """Returns a row of a report's table in the README; with `peak` also the share of the peak."""
    cells = [row.model, str(row.sampling), f"{row.parameters / 1e6:,.1f} M", str(row.setup)]
    if row.failed or row.unet_step is None or row.images_per_s is None:
        return [*cells, f"failed: {row.failed}", *[None] * (5 if peak else 4)]
    step = row.unet_step
    time = f"{step.median:.1f} ms ({step.low:.1f} to {step.high:.1f})"
    if step.median >= 1000:
        time = f"{step.median / 1000:.2f} s ({step.low / 1000:.2f} to {step.high / 1000:.2f})"
    cells += [f"{row.images_per_s:.3g}", f"{row.speedup:.2f}×" if row.speedup else "–"]
    cells.append(time + (", noisy" if step.noisy else ""))
    if peak:
        cells.append(f"{row.share_of_peak:.0%}" if row.share_of_peak else "–")
    error = f"{row.fidelity:.1e}" if row.fidelity is not None else "reference"
    return [*cells, f"{row.peak_mib or 0:,.0f} MiB", error]


def format_limit(value: float | None) -> str:
    """Returns the smallest fault that a gate detects, a share of a weight; None is a fault of more than 100%."""
    return "over 100%" if value is None else f"{value:.2%}"


def sensitivity_sentences(found: Results) -> Iterator[str]:
    """Yields a sentence for each gate whose sensitivity was measured."""
    for entry in found.backends:
        if figures := entry.get("sensitivity"):
            least, low, high = (format_limit(figures[key]) for key in ("least", "least_low", "least_high"))
            yield (
                f"The smallest change of one layer's weights that the {entry['precision']} gate detects is {least}"
                f" (median of {len(figures['scaled'])} layers, {low} to {high}). It does not detect"
                f" {figures['heads_unseen']} of {figures['heads']} zeroed attention heads."
            )
