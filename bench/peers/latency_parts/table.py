"""Summarizes the rounds of each setup, and formats the table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .setups import REFERENCE, SETUPS, PeerSetup, Run, artifact_of, output_of


def unet_mib(setup: PeerSetup, folder: Path) -> float:
    """Returns the MiB of the UNet's file, with its external data."""
    artifact = artifact_of(setup, folder)
    found = [
        path
        for pattern in ("unet/*.safetensors", "unet/*.onnx*", "unet.*")
        for path in artifact.glob(pattern)
        if path.is_file()
    ]
    return sum(path.stat().st_size for path in found) / 2**20


def summarize_rows(run: Run, rows: dict[str, Any]) -> None:
    """Add medians with their intervals, and errors to the reference, to the rows."""
    import numpy as np
    from sdcompress_bench.stats import summarize_rounds

    truth = np.load(output_of(REFERENCE, run.folder)) if "failed" not in rows[REFERENCE] else None
    for name, row in rows.items():
        if "failed" in row:
            row.pop("rounds", None)
            continue
        rounds = row["rounds"]
        for figure in ("unet_step_ms", "picture_ms"):
            found = summarize_rounds([r[figure] for r in rounds])
            # Other work on the machine can only slow a round down.
            fastest = min(float(np.median(r[figure])) for r in rounds)
            row[figure] = {
                "median": found.median,
                "low": found.low,
                "high": found.high,
                "noisy": found.noisy,
                "fastest_round": fastest,
            }
        row["first_picture_s"] = (rounds[0]["load_ms"] + rounds[0]["first_picture_ms"]) / 1000
        row["peak_mib"] = max(r["device_mib"] if run.device == "cuda" else r["peak_rss_mib"] for r in rounds)
        row["unet_file_mib"] = unet_mib(SETUPS[run.device][name], run.folder)
        if truth is None:
            continue
        outputs = np.load(output_of(name, run.folder))
        expected = truth["unet"].astype(np.float64)
        row["relative_l2"] = float(np.linalg.norm(outputs["unet"] - expected) / np.linalg.norm(expected))
        error = float(np.mean((outputs["picture"].astype(np.float64) - truth["picture"]) ** 2))
        row["picture_psnr_db"] = None if error == 0 else 10 * math.log10(255**2 / error)


def format_table(rows: dict[str, Any]) -> str:
    """Returns the table, the reference first; a setup without figures has its reason."""
    reference = rows[REFERENCE]
    lines = [
        (
            "| | UNet step, ms | | its fastest round | whole picture, ms | | its fastest round | first picture, s |"
            " peak memory, MiB | UNet file, MiB | relative L2 | picture, dB |"
        ),
        "|---|" + "---|" * 11,
    ]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} |" + " |" * 10)
            continue
        cells = []
        for figure in ("unet_step_ms", "picture_ms"):
            found = row[figure]
            times = f"{reference[figure]['median'] / found['median']:.2f}×" if figure in reference else "–"
            cells += [
                (
                    f"{found['median']:,.1f} ({found['low']:,.1f} to"
                    f" {found['high']:,.1f}){', noisy' if found['noisy'] else ''}"
                ),
                times,
                f"{found['fastest_round']:,.1f}",
            ]
        psnr = row.get("picture_psnr_db")
        cells += [f"{row['first_picture_s']:.1f}", f"{row['peak_mib']:,.0f}", f"{row['unet_file_mib']:,.1f}"]
        cells += (
            ["–", "–"]
            if "relative_l2" not in row
            else [f"{row['relative_l2']:.1e}", "the same" if psnr is None else f"{psnr:.1f}"]
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
