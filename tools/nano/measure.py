"""Measure nano: VAE, style accuracy and retrieval against the same figures of real pictures, and what is remembered.

    python tools/nano/measure.py -o bench/results/nano-teacher.json [--sheet sheet.webp]

200 prompts seen in training and all held-out (style, concept) pairs, 25 steps, nano's own guidance scale, one seed
a picture. The judge is nano-CLIP, which conditions nothing; its own figures on the real pictures are the ceiling, and
those on the real pictures that passed through the VAE are the ceiling of the UNet. How near the pictures are to
training pictures is measured as `copies.py` says.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from common import load, mixed_precision, to_bytes
from copies import measure_copies, pass_through
from sdcompress_bench.environment import environment
from sdcompress_bench.quality import ClipMetric, Share, judge, to_pixels
from sdcompress_bench.scenario import Prompt
from train_unet import to_picture
from train_vae import psnr

from sdcompress.data import nano_prompts
from sdcompress.data.sources import open_source
from sdcompress.families.stable_diffusion import NANO
from sdcompress.models import nano
from sdcompress.models.load import load_pipeline
from sdcompress.sampling import generate, grid

STEPS, GUIDANCE = 25, NANO.guidance_scale


def plain(figures: dict) -> dict:
    return {k: asdict(v) if isinstance(v, Share) else v for k, v in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--sheet", type=Path, default=None, help="contact sheet of 64 of the pictures, half seen, half held out"
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--model", default="nano")
    args = parser.parse_args()
    started = time.time()
    loaded = load_pipeline(args.model)
    pipeline = loaded.pipeline
    metric = ClipMetric(nano.metric_folder())
    styles = nano.styles()
    heldout = load("heldout")
    result: dict = {
        "model": args.model,
        "sha256": loaded.sha256,
        "parameters": {
            name: sum(p.numel() for p in getattr(pipeline, name).parameters())
            for name in ("unet", "vae", "text_encoder")
        },
        "vae_psnr_db": psnr(pipeline.vae, heldout.pixels(torch.arange(len(heldout.captions)))),
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
    }
    drawn = {}
    counts = {"seen": args.count, "heldout": min(args.count, len(heldout.captions))}
    for split, shards in (("seen", nano.shards("train")), ("heldout", nano.shards("heldout"))):
        prompts = [Prompt(p.caption, p.style) for p in nano_prompts.draw_prompts(split, counts[split])]
        with (
            torch.inference_mode(),
            mixed_precision("cpu"),
        ):
            images = generate(
                pipeline,
                [p.caption for p in prompts],
                seeds=list(range(len(prompts))),
                steps=STEPS,
                guidance_scale=GUIDANCE,
                batch_size=40,
            )
        result[split] = plain(judge(metric, images, prompts, styles))
        records = {record.caption: record for record in open_source(shards)}
        real = [records[p.caption].picture() for p in prompts]
        result[f"{split}_real_pictures"] = plain(judge(metric, real, prompts, styles))
        passed = pass_through(pipeline.vae, torch.stack([to_pixels(picture) for picture in real]) * 2 - 1)
        result[f"{split}_real_pictures_through_vae"] = plain(
            judge(metric, list(map(to_picture, to_bytes(passed))), prompts, styles)
        )
        drawn[split] = images
    result["nearest_training_picture"] = measure_copies(pipeline.vae, load("train"), heldout, drawn)
    result |= {"seconds": round(time.time() - started, 1), "environment": environment()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    if args.sheet:
        grid([image for images in drawn.values() for image in images[:32]], 8).save(args.sheet, quality=88)
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=1))


if __name__ == "__main__":
    main()
