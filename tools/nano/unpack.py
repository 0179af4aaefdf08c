"""Make a work folder from the weights that ship, so that the training of the UNet and of nano-CLIP goes on from a clone
alone.

    python tools/nano/unpack.py --work build/nano
    python tools/nano/train_unet.py --work build/nano --until 20000

The optimizer's moments are not shipped: they start anew, with a new warm-up.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from common import load
from train_clip import tokenize
from transformers import CLIPModel

from sdcompress.models import nano
from sdcompress.models.load import load_pipeline


def last_step(log: str) -> int:
    return json.loads((Path(__file__).parent / f"logs/{log}.jsonl").read_text(encoding="utf-8").splitlines()[-1])[
        "step"
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--step", type=int, default=last_step("unet"), help="the step the shipped UNet has")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline("nano").pipeline
    train = load("train")
    moments = [pipeline.vae.encode(train.pixels(i)).latent_dist for i in torch.arange(len(train.captions)).split(50)]
    ids = tokenize(pipeline.tokenizer, [*train.captions, ""])
    cache = {
        "mean": torch.cat([m.mean for m in moments]).half(),
        "std": torch.cat([m.std for m in moments]).half(),
        "scale": torch.tensor(pipeline.vae.config.scaling_factor),
        "text": torch.cat([pipeline.text_encoder(chunk)[0] for chunk in ids.split(256)]).half(),
    }
    torch.save(cache, args.work / "cache.pt")
    torch.save(pipeline.vae.state_dict(), args.work / "vae.pt")
    shutil.copytree(nano.teacher_folder() / "tokenizer", args.work / "tokenizer", dirs_exist_ok=True)
    weights = pipeline.unet.state_dict()
    torch.save({"model": weights, "ema": weights, "step": args.step, "seconds": 0.0}, args.work / "unet.ckpt")
    torch.save(weights, args.work / "unet.pt")
    metric = CLIPModel.from_pretrained(nano.metric_folder())
    torch.save(
        {"model": metric.state_dict(), "step": last_step("clip-metric"), "seconds": 0.0}, args.work / "clip-metric.ckpt"
    )
    print(f"{args.work}: ready to go on from step {args.step}")


if __name__ == "__main__":
    main()
