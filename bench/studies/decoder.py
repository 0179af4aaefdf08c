"""How near a small decoder comes to the VAE that it was made from, and how much faster it is.

    python bench/studies/decoder.py --model nano --decoder small/decoder -o decoder.json

The latents are those of pictures that it has not seen: by default nano's held-out split. Both decode the same ones.
Decoding is timed one picture at a time, the two in turn; the last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from sdcompress_bench.metrics import Lpips, mean_of, psnr
from sdcompress_engines.files import write_atomically

from sdcompress.data.sources import open_source
from sdcompress.models import nano
from sdcompress.models.load import load_pipeline
from sdcompress.prune.cost import count_parameters
from sdcompress.support.pipeline import native_size_px
from sdcompress.train.decoder import count_decoder


@torch.inference_mode()
def draw(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Returns the pictures of latents as the UNet makes them, (B, 3, H, W) in [0, 1]."""
    parts = (vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(8))
    return (torch.cat(list(parts)) / 2 + 0.5).clamp(0, 1)


@torch.inference_mode()
def encode(vae: Any, source: Any, count: int, size_px: int) -> torch.Tensor:
    """Returns the latents of the first pictures of a source, as the UNet takes them."""
    latents = []
    for record in islice(source, count):
        picture = record.picture().convert("RGB").resize((size_px, size_px))
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size_px, size_px, 3)
        latents.append(vae.encode(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).latent_dist.mode())
    return torch.cat(latents) * vae.config.scaling_factor


def time_in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median time of each call in ms."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: sorted(taken[2:])[rounds // 2] for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--decoder", type=Path, required=True)
    parser.add_argument("--data", help="pictures that neither has seen; by default nano's held-out split")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    loaded, small = load_pipeline(args.model), load_pipeline(args.model, decoder=args.decoder)
    pipeline, vae, decoder = loaded.pipeline, loaded.pipeline.vae, small.pipeline.vae
    source = open_source(args.data or nano.shards("heldout"))
    latents = encode(vae, source, args.count, native_size_px(pipeline))
    expected, drawn = draw(vae, latents), draw(decoder, latents)
    figures = {f"lpips_{net}": mean_of(Lpips(net)(drawn, expected)) for net in ("alex", "vgg")}
    figures["psnr_db"] = mean_of(psnr(drawn, expected))
    one = latents[:1]
    times = time_in_turn({"vae": lambda: draw(vae, one), "small": lambda: draw(decoder, one)}, args.rounds)
    result = {
        "model": loaded.name,
        "pictures": len(latents),
        "parameters": {"vae": count_decoder(vae), "small": count_decoder(decoder)},
        "encoder_parameters": count_parameters(decoder.encoder),
        **{name: [round(each, 4) for each in (found.value, found.low, found.high)] for name, found in figures.items()},
        "decode_ms": {name: round(taken, 2) for name, taken in times.items()},
        "times_faster": round(times["vae"] / times["small"], 1),
        "threads": torch.get_num_threads(),
    }
    if args.output:
        write_atomically(args.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
