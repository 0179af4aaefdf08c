"""Do the exported graphs agree with torch? Every component of nano and a full-size UNet are compared.

    python bench/studies/parity.py -o bench/results/parity.json --work build/parity

fp32 graphs in ONNX Runtime against torch fp32 (limit: relative L2 1e-4), fp16 graphs against torch fp32 (limit: twice
the error of torch itself in fp16). Batches 1, 2, 3; three resolutions; 77 and 231 tokens; timesteps 1, 250, 500, 750,
999; the three signatures by name, order and dtype.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sdcompress_bench.environment import environment
from sdcompress_engines.runners import open_runner
from sdcompress_engines.signature import HOSTS

from sdcompress.export.components import Precision, part_of, signature_of
from sdcompress.export.onnx import export_onnx
from sdcompress.export.parity import compare_onnx, grid
from sdcompress.models.load import load_pipeline
from sdcompress.models.random import random_pipeline

BATCHES, TOKENS = (1, 2, 3), (77, 231)
COMPONENTS = ("unet", "text_encoder", "vae_decoder", "vae_encoder")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
LARGE = "SD1.5 bk-tiny"
LATENTS = {"nano": [(8, 8), (16, 16), (24, 16)], LARGE: [(16, 16), (24, 16), (32, 32)]}
"""Model → height and width of the latents in each case."""


def list_cases() -> list[tuple[str, str, Precision, str]]:
    """Returns model, component, precision and host of each comparison."""
    cases: list[tuple[str, str, Precision, str]] = [
        ("nano", component, precision, "diffusers") for component in COMPONENTS for precision in PRECISIONS
    ]
    cases += [("nano", "unet", "fp32", host) for host in HOSTS if host != "diffusers"]
    return cases + [(LARGE, "unet", precision, "diffusers") for precision in PRECISIONS]


def compare_component(
    pipeline: Any, component: str, precision: Precision, host: str, latents: list[tuple[int, int]], work: Path
) -> dict[str, Any]:
    """Export one component and compare it with torch over the whole grid; returns the row.

    Args:
        pipeline: in torch.
        component: one of `COMPONENTS`.
        precision: of the graph.
        host: of the signature: a key of `HOSTS`.
        latents: height and width of the latents in each case.
        work: folder for the graph.
    """
    folder = work / "graph"
    export_onnx(pipeline, folder, precision=precision, components=(component,), host=host, force=True)
    part = part_of(pipeline, component)
    signature = signature_of(component, part, precision, host)
    with open_runner(folder / f"{component}.onnx") as runner:
        exact = runner.inputs == signature.inputs and runner.outputs == signature.outputs
    cases = grid(
        signature,
        BATCHES,
        [(0, 0)] if component == "text_encoder" else latents,
        TOKENS if component == "unet" else (77,),
    )
    comparison = compare_onnx(component, part, precision, folder / f"{component}.onnx", host, cases)
    return asdict(comparison) | {
        "signature_exact": exact,
        "inputs": [str(spec) for spec in signature.inputs],
        "outputs": [str(spec) for spec in signature.outputs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="emptied first")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    pipelines = {"nano": load_pipeline("nano").pipeline, LARGE: random_pipeline("sd1", "bk-tiny", dtype=torch.float16)}
    rows: list[dict[str, Any]] = []
    for model, component, precision, host in list_cases():
        row = {"model": model, "component": component, "precision": precision, "signature": host}
        row |= compare_component(pipelines[model], component, precision, host, LATENTS[model], args.work)
        rows.append(row)
        print(format_row(row), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(args.work)
    if any(row["share_of_limit"] > 1 or not row["signature_exact"] for row in rows):
        raise SystemExit("over the limit")


def format_row(row: dict[str, Any]) -> str:
    """Returns a row as one line of text."""
    floor = "" if row["torch_relative_l2"] is None else f", torch {row['precision']} {row['torch_relative_l2']:.1e}"
    return (
        f"{row['model']:<14} {row['component']:<14} {row['precision']} {row['signature']:<10} relative L2"
        f" {row['relative_l2']:.1e}{floor}; {row['share_of_limit']:.0%} of the limit; {row['cases']} cases; signature"
        f" {'exact' if row['signature_exact'] else 'WRONG'}"
    )


if __name__ == "__main__":
    main()
