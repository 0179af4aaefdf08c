"""Make a work folder from the weights that ship, so that the training of every part goes on from a clone
alone.

    python tools/nano/unpack.py --work build/nano
    python tools/nano/train_unet.py --work build/nano --steps 20000 --cooldown 800

The optimizer's moments are not shipped: they start anew, with a new warm-up.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from sdcompress_bench.resnet_clip import load_clip

from sdcompress.models import nano
from sdcompress.models.load import load_pipeline


def last_step(log: str) -> int:
    return json.loads((Path(__file__).parent / f"logs/{log}.jsonl").read_text(encoding="utf-8").splitlines()[-1])[
        "step"
    ]


def write_checkpoint(path: Path, weights: dict[str, torch.Tensor], step: int, **more: Any) -> None:
    torch.save({"model": weights, "step": step, "seconds": 0.0} | more, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--step", type=int, default=last_step("unet"), help="the step the shipped UNet has")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline("nano").pipeline
    torch.save(pipeline.vae.state_dict(), args.work / "vae.pt")
    write_checkpoint(args.work / "vae.ckpt", pipeline.vae.state_dict(), last_step("vae"))
    shutil.copytree(nano.teacher_folder() / "tokenizer", args.work / "tokenizer", dirs_exist_ok=True)
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    weights = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    write_checkpoint(args.work / "unet.ckpt", weights, args.step, ema=weights)
    torch.save(weights, args.work / "unet.pt")
    metric = load_clip(nano.metric_folder())
    write_checkpoint(args.work / "clip-metric.ckpt", metric.state_dict(), last_step("clip-metric"))
    print(f"{args.work}: ready to go on from step {args.step}")


if __name__ == "__main__":
    main()
