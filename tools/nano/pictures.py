"""Draw the pictures of the README: what nano draws, and what its students draw at the same seeds.

    python tools/nano/pictures.py sheet -o docs/nano.webp                     48 prompts that nano was trained on
    python tools/nano/pictures.py hero -o docs/students.webp nano-tiny nano-tiny-4step    by nano and by students of it

A model is what `sdcompress generate` takes. It draws with its own steps and guidance. Each name of the hero's rows has
the size of the UNet's weights in fp16, the steps, and the time of a picture, measured here in PyTorch in fp32. These
figures go to `bench/results/students.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from common import ROOT
from PIL import Image, ImageDraw, ImageFont
from sdcompress_bench.environment import environment

from sdcompress.data.nano_prompts import NanoPrompt, draw_prompts, shown_prompts
from sdcompress.families.sampling_defaults import sampling_defaults
from sdcompress.models.load import load_pipeline
from sdcompress.models.nano import styles
from sdcompress.prune.cost import count_parameters
from sdcompress.sampling import generate

SIDE_PX, GAP_PX, TEXT_PX = 128, 6, 12
SHEET_PROMPTS, SHEET_COLUMNS, HERO_PROMPTS = 48, 8, 6
TIMED_PICTURES = 10
FIGURES = ROOT / "bench/results/students.json"


def choose_sheet(seed: int) -> list[NanoPrompt]:
    """Returns the prompts that are shown first and others that were seen, drawn by lot, equally many of each style."""
    chosen = shown_prompts()
    others = draw_prompts("seen", 300, seed)
    random.Random(seed).shuffle(others)
    for prompt in others:
        share = SHEET_PROMPTS // len(styles())
        fits = sum(known.style == prompt.style for known in chosen) < share
        if fits and prompt.concept not in {known.concept for known in chosen}:
            chosen.append(prompt)
    return chosen[:SHEET_PROMPTS]


def paste(picture: Image.Image, column: int, row: int, sheet: Image.Image, left_px: int, below: str = "") -> None:
    """Put a picture into a cell of a sheet, with a line of text below it."""
    x = left_px + column * (SIDE_PX + GAP_PX)
    y = row * (SIDE_PX + GAP_PX + (TEXT_PX + 4 if below else 0))
    sheet.paste(picture, (x, y))
    if below:
        font = ImageFont.load_default(TEXT_PX)
        ImageDraw.Draw(sheet).text((x + SIDE_PX / 2, y + SIDE_PX + 1), below, "#555", font, anchor="ma")


def draw_sheet(seed: int) -> Image.Image:
    prompts = choose_sheet(seed)
    pictures = generate(load_pipeline("nano").pipeline, [p.caption for p in prompts], seeds=[seed] * len(prompts))
    rows = -(-len(prompts) // SHEET_COLUMNS)
    height = rows * (SIDE_PX + GAP_PX + TEXT_PX + 4)
    sheet = Image.new("RGB", (SHEET_COLUMNS * (SIDE_PX + GAP_PX) - GAP_PX, height), "white")
    for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        paste(picture, number % SHEET_COLUMNS, number // SHEET_COLUMNS, sheet, 0, f"{prompt.concept} ({prompt.style})")
    return sheet


def time_pictures_ms(pipelines: list[Any]) -> list[float]:
    """Returns the median time of a picture of each pipeline, from caption to pixels, in ms; they take turns."""
    times: list[list[float]] = [[] for _ in pipelines]
    caption = shown_prompts()[0].caption
    for _ in range(TIMED_PICTURES):
        for pipeline, own in zip(pipelines, times, strict=True):
            started = time.perf_counter()
            generate(pipeline, [caption], seeds=[0])
            own.append(1000 * (time.perf_counter() - started))
    return [statistics.median(each[2:]) for each in times]


def draw_hero(models: list[str], seed: int) -> Image.Image:
    """Returns the pictures of each model, one row a model; its figures also go to `FIGURES`."""
    prompts = shown_prompts()[:HERO_PROMPTS]
    left_px, row_px = 130, SIDE_PX + GAP_PX
    width = left_px + HERO_PROMPTS * (SIDE_PX + GAP_PX) - GAP_PX
    sheet = Image.new("RGB", (width, len(models) * row_px + 2 * TEXT_PX), "white")
    pen, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(17), ImageFont.load_default(TEXT_PX)
    every = [load_pipeline(model) for model in models]
    pictures_ms = time_pictures_ms([loaded.pipeline for loaded in every])
    rows = []
    for row, (model, loaded, picture_ms) in enumerate(zip(models, every, pictures_ms, strict=True)):
        pictures = generate(loaded.pipeline, [p.caption for p in prompts], seeds=[seed] * len(prompts))
        for column, picture in enumerate(pictures):
            paste(picture, column, row, sheet, left_px)
        name = loaded.name if model.startswith("nano") else Path(model).resolve().parent.name
        parameters = count_parameters(loaded.pipeline.unet)
        pen.text((0, row * row_px + 30), name, "#111", large)
        steps = sampling_defaults(loaded.pipeline).num_inference_steps
        speed = f"{pictures_ms[0] / picture_ms:.1f} times as fast" if row else ""
        text = f"{2 * parameters / 1e6:.1f} MB, {steps} steps\n{picture_ms:.0f} ms a picture\n{speed}"
        pen.text((0, row * row_px + 56), text, "#555", small)
        rows.append({"model": name, "parameters": parameters, "steps": steps, "picture_ms": round(picture_ms, 2)})
        print(json.dumps(rows[-1]))
    result = {"rows": rows, "environment": environment()}
    FIGURES.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    for column, prompt in enumerate(prompts):
        x = left_px + column * (SIDE_PX + GAP_PX) + SIDE_PX / 2
        pen.text((x, len(models) * row_px), f"{prompt.concept} ({prompt.style})", "#555", small, anchor="ma")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sheet", "hero"])
    parser.add_argument("models", nargs="*", help="students that the hero shows below nano")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()  # models may come after the options
    picture = draw_sheet(args.seed) if args.what == "sheet" else draw_hero(["nano", *args.models], args.seed)
    picture.save(args.output, quality=85, method=6)
    print(f"{args.output}: {picture.width} x {picture.height} px, {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
