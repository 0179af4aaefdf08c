"""How long does the cache's VAE take for a picture, and what error does its precision cause?

    python bench/studies/encoding.py -o bench/results/encoding-nano.json
    python bench/studies/encoding.py --model ./rv4.safetensors --data ./pictures --size 512 -o encoding-rv4.json

Time: `LatentEncoder`, which chooses its own batch size, in fp32 and in bf16, against fp32 in batches of 32, as in the
first version of the cache. The encoders run in turn, in another order each round. Error: the relative L2 of a picture's
latents (the mean of the posterior) to those in IEEE fp32, compared with the effect of saving the picture as JPEG at
quality 95.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sdcompress_bench.environment import environment
from sdcompress_engines.exactness import ieee_fp32, relative_l2

from sdcompress.data.encode import LatentEncoder
from sdcompress.data.precision import copy_encoder
from sdcompress.data.sources import open_source
from sdcompress.data.views import to_pixels
from sdcompress.models.load import load_pipeline

FIXED_BATCH = 32
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Encode = Callable[[torch.Tensor], torch.Tensor]
"""From pixels, (N, 3, H, W) in [-1, 1], to the posterior's mean, (N, C, H/8, W/8) float16, both on the CPU."""


def encode_by_chosen_batches(vae: Any, precision: Any) -> Encode:
    """Returns the cache's encoder, which chooses its own batch size."""
    encoder = LatentEncoder(vae, DEVICE, precision)
    return lambda pixels: encoder.encode(pixels)[0]


def encode_by_fixed_batches(vae: Any) -> Encode:
    """Returns an encoder in fp32 that takes `FIXED_BATCH` pictures at once."""
    encoder = copy_encoder(vae, DEVICE, "fp32")

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        batches = pixels.split(FIXED_BATCH)
        return torch.cat([encoder.encode(batch.to(DEVICE)).latent_dist.mean.half().cpu() for batch in batches])

    return encode


@torch.no_grad()
def measure_times(encoders: dict[str, Encode], pixels: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Returns encoder → milliseconds of a picture, one value for each round.

    Args:
        encoders: name → encoder.
        pixels: (N, 3, H, W), float32, in [-1, 1], on the CPU.
        rounds: how many are timed.
    """
    times: dict[str, list[float]] = {name: [] for name in encoders}
    order = list(encoders)
    for number in range(-1, rounds):  # the first round only warms up
        random.Random(number).shuffle(order)
        for name in order:
            started = time.perf_counter()
            encoders[name](pixels)
            if number >= 0:
                times[name].append(1000 * (time.perf_counter() - started) / len(pixels))
    return times


@torch.no_grad()
def measure_errors(
    vae: Any, encoders: dict[str, Encode], pictures: Sequence[Image.Image], size_px: int
) -> dict[str, Any]:
    """Returns the relative L2 of all latents, and that of the worst picture, for each encoder and for JPEG.

    Args:
        vae: in fp32; computes the reference.
        encoders: name → encoder.
        pictures: what is encoded.
        size_px: side of the pictures.
    """
    pixels = to_batch(pictures, size_px)
    encoder = copy_encoder(vae, DEVICE, "fp32")
    with ieee_fp32():
        exact, jpeg = (
            torch.cat([encoder.encode(each[None].to(DEVICE)).latent_dist.mean.cpu() for each in batch])
            for batch in (pixels, to_batch([save_as_jpeg(picture) for picture in pictures], size_px))
        )
    latents = {name: encode(pixels).float() for name, encode in encoders.items()} | {"JPEG at quality 95": jpeg}
    return {
        name: {
            "relative_l2": relative_l2(values, exact),
            "worst": float(((values - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max()),
        }
        for name, values in latents.items()
    }


def to_batch(pictures: Sequence[Image.Image], size_px: int) -> torch.Tensor:
    """Returns pictures as one tensor, (N, 3, size_px, size_px), float32, in [-1, 1]."""
    return torch.stack([to_pixels(picture, size_px) for picture in pictures])


def save_as_jpeg(picture: Image.Image) -> Image.Image:
    """Returns the picture after it was saved and loaded as JPEG at quality 95."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=95)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", default="nano", help="a source of pictures, as for distill --data")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    vae = load_pipeline(args.model).pipeline.vae
    pictures = [record.picture() for _, record in zip(range(args.pictures), open_source(args.data), strict=False)]
    before = f"fp32, batches of {FIXED_BATCH}"
    encoders: dict[str, Encode] = {before: encode_by_fixed_batches(vae)} | {
        precision: encode_by_chosen_batches(vae, precision) for precision in ("fp32", "bf16")
    }
    times = measure_times(encoders, to_batch(pictures, args.size), args.rounds)
    errors = measure_errors(vae, encoders, pictures, args.size)
    rows: dict[str, dict[str, Any]] = {
        name: {"ms_a_picture": statistics.median(values), "rounds": values} for name, values in times.items()
    }
    for row in rows.values():
        row["speedup"] = rows[before]["ms_a_picture"] / row["ms_a_picture"]
    settings = {name: str(value) for name, value in vars(args).items() if name != "output"}
    result = {"settings": settings, "times": rows, "errors": errors, "environment": environment()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    for name, row in rows.items():
        low, high = min(row["rounds"]), max(row["rounds"])
        print(f"{name:20} {row['ms_a_picture']:8.2f} ms a picture ({low:.2f} to {high:.2f}), {row['speedup']:.2f}x")
    for name, error in errors.items():
        print(f"{name:20} relative L2 {error['relative_l2']:.1e}, worst picture {error['worst']:.1e}")


if __name__ == "__main__":
    main()
