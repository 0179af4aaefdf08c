"""How near a small decoder comes to the VAE that it was made from, and how much faster it is.

    python bench/studies/decoder.py -o bench/results/decoder-nano.json
    python bench/studies/decoder.py --model MODEL --decoder small/decoder --data PICTURES -o decoder.json

The latents are those of pictures that it has not seen: by default nano's held-out split. Both decode the same ones.
Decoding is timed one picture at a time, the two in turn. For nano, nano-CLIP also judges the pictures of its held-out
prompts, each drawn with both decoders from one seed. The last line is the result as JSON.
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
from sdcompress_bench.environment import environment
from sdcompress_bench.metrics import Lpips, mean_of, psnr
from sdcompress_bench.quality import ClipMetric, judge
from sdcompress_bench.scenario import Prompt
from sdcompress_engines.files import write_atomically

from sdcompress.data import nano_prompts
from sdcompress.data.sources import open_source
from sdcompress.families.build import build_module
from sdcompress.models import nano
from sdcompress.models.load import load_pipeline
from sdcompress.models.random import family_configs, random_decoder
from sdcompress.prune.cost import count_parameters
from sdcompress.sampling import generate
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


def judge_both(pipelines: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Returns nano-CLIP's figures of the held-out prompts for each decoder, each with its 95% interval."""
    metric, prompts = ClipMetric(nano.metric_folder()), nano_prompts.draw_prompts("heldout", 154)
    captioned = [Prompt(each.caption, each.style) for each in prompts]
    found: dict[str, dict[str, list[float]]] = {}
    for name, pipeline in pipelines.items():
        pictures = generate(pipeline, [each.caption for each in captioned], seeds=range(len(prompts)), batch_size=50)
        shares = judge(metric, pictures, captioned, nano.styles())
        found[name] = {
            key: [round(each, 4) for each in (shares[key].share, shares[key].low, shares[key].high)]
            for key in ("top5", "style")
        }
    return found


def count_full_size() -> dict[str, int]:
    """Returns the parameters of SD1.5's decoder, and of a small one of TAESD's shape."""
    vae = family_configs("sd1")["vae"]
    with torch.device("meta"):
        own = build_module("vae", vae, "the config of SD1.5's VAE")
    return {"vae": count_decoder(own), "small": count_decoder(random_decoder(vae))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--decoder", default=nano.DECODER_NAME)
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
        "sd1_parameters": count_full_size(),
        "encoder_parameters": count_parameters(decoder.encoder),
        **{name: [round(each, 4) for each in (found.value, found.low, found.high)] for name, found in figures.items()},
        "decode_ms": {name: round(taken, 2) for name, taken in times.items()},
        "times_faster": round(times["vae"] / times["small"], 1),
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }
    if nano.draws_like_nano(args.model):
        result["judged"] = judge_both({"vae": pipeline, "small": small.pipeline})
    if args.output:
        write_atomically(args.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
