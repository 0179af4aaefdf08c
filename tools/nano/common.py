"""What the nano training scripts share: the data in memory, a resumable loop's bookkeeping, the config."""

from __future__ import annotations

import argparse
import io
import json
import math
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from sdcompress_engines.files import replace_file

from sdcompress.train.precision import resolve_precision

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "sdcompress/assets/nano/data"
CONFIG = Path(__file__).with_name("config.json")


def mixed_precision(device_type: str) -> torch.autocast:
    """Returns an autocast to bf16, which does nothing on a device that would only emulate it, many times as slowly."""
    return torch.autocast(device_type, torch.bfloat16, enabled=resolve_precision("auto", device_type) == "bf16")


def config(section: str) -> dict[str, Any]:
    return json.loads(CONFIG.read_text(encoding="utf-8"))[section]


@dataclass
class Split:
    """Pictures (N, 3, 128, 128) uint8 with their captions and metadata, in shard order."""

    images: torch.Tensor
    captions: list[str]
    metas: list[dict[str, Any]]

    def pixels(self, index: torch.Tensor) -> torch.Tensor:
        """float32 in [-1, 1], (B, 3, 128, 128)."""
        return self.images[index].float().div(127.5).sub(1)

    def take(self, kept: list[int]) -> Split:
        """Returns the split of some of its pictures."""
        return Split(self.images[kept], [self.captions[i] for i in kept], [self.metas[i] for i in kept])


def load(split: str, data: Path = DATA, count: int | None = None) -> Split:
    """Returns a split of a data set.

    Args:
        split: `train` or `heldout`.
        data: folder of the shards and their index.
        count: how many of its pictures; None is all.
    """
    images, captions, metas = [], [], []
    for shard in json.loads((data / "index.json").read_text(encoding="utf-8"))["shards"][split]:
        with tarfile.open(data / shard) as tar:
            for member in tar:
                payload = tar.extractfile(member).read()
                if member.name.endswith(".webp"):
                    picture = Image.open(io.BytesIO(payload)).convert("RGB")
                    images.append(
                        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
                        .view(*picture.size[::-1], 3)
                        .permute(2, 0, 1)
                    )
                elif member.name.endswith(".txt"):
                    captions.append(payload.decode())
                else:
                    metas.append(json.loads(payload))
    return Split(torch.stack(images[:count]).contiguous(), captions[:count], metas[:count])


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Returns pictures as `Split.images` has them, (B, 3, H, W), uint8.

    Args:
        pixels: (B, 3, H, W), in [-1, 1].
    """
    return pixels.add(1).mul(127.5).round().byte()


def batch_indices(step: int, batch: int, count: int, seed: int) -> torch.Tensor:
    """Returns the sample indices of a step, (batch,), int64; each epoch has its own permutation.

    Args:
        step: number of the step.
        batch: samples in a step.
        count: samples in the data.
        seed: of the permutations.
    """
    positions = torch.arange(step * batch, (step + 1) * batch)
    out = torch.empty(batch, dtype=torch.long)
    for epoch in (positions // count).unique().tolist():
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        mask = positions // count == epoch
        out[mask] = order[positions[mask] % count]
    return out


def augment(
    pixels: torch.Tensor, generator: torch.Generator, strength: float = 1.0, turned: bool = False
) -> torch.Tensor:
    """Returns pictures shifted, scaled and darkened a little: on white, what stays the same picture.

    Args:
        pixels: (B, 3, H, W), float32 in [-1, 1].
        generator: of the random numbers.
        strength: 1 shifts by up to 4 px of 128, scales by 0.94 to 1.04 and darkens by up to 2%; 2 by twice as much.
        turned: also turn pictures by up to 12 degrees and mix their colors a little.
    """
    count = len(pixels)
    scale = 1 / (1 + strength * (0.1 * torch.rand(count, generator=generator) - 0.06))
    shift = (torch.rand(count, 2, generator=generator) - 0.5) * 0.125 * strength
    angle = (torch.rand(count, generator=generator) - 0.5) * (0.42 if turned else 0.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale * angle.cos()
    theta[:, 0, 1], theta[:, 1, 0] = -scale * angle.sin(), scale * angle.sin()
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels - 1, grid, mode="bicubic", align_corners=False).clamp(-2, 0) + 1
    if turned:
        mix = torch.eye(3) + 0.12 * torch.randn(count, 3, 3, generator=generator)
        mix = mix / mix.sum(-1, keepdim=True)  # white and gray stay as they are
        moved = torch.einsum("bij,bjhw->bihw", mix, moved).clamp(-1, 1)
    return (moved + 1) * (1 - 0.02 * strength * torch.rand(count, 1, 1, 1, generator=generator)) - 1


def mirror_some(pixels: torch.Tensor, may_mirror: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns pictures of which about half of those that may be are mirrored.

    Args:
        pixels: (B, 3, H, W).
        may_mirror: whether a mirrored picture still shows its concept, (B,), bool.
        generator: of the random numbers.
    """
    mirrored = may_mirror & (torch.rand(len(pixels), generator=generator) < 0.5)
    return torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)


def training_arguments(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that every training script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints, logs and results")
    parser.add_argument("--data", type=Path, default=DATA, help="shards to train on")
    parser.add_argument("--pictures", type=int, default=None, help="take only the first so many of each split")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=None, help="default: that of config.json")
    parser.add_argument("--batch", type=int, default=None, help="default: that of config.json")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="end after this long, one process alone; the learning rate falls in time for it",
    )
    return parser


def read_settings(args: argparse.Namespace, *sections: str) -> dict[str, Any]:
    """Returns a section of config.json with the command line's `--steps` and `--batch`.

    Args:
        args: of the command line.
        sections: name of the section, then of the parts in it that go over it.
    """
    whole = config(sections[0])
    settings = whole | {name: value for part in sections[1:] for name, value in whole[part].items()}
    return settings | {name: value for name in ("steps", "batch") if (value := getattr(args, name)) is not None}


class Progress:
    """Checkpoints by atomic rename, one JSON line every `every` steps.

    Args:
        work: folder of the checkpoint and the log.
        name: of both.
        minutes: of training, after which `share` is 1; those of earlier processes count.
        every: steps between two lines.
    """

    def __init__(self, work: Path, name: str, minutes: float = math.inf, every: int = 50) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.checkpoint = work / f"{name}.ckpt"
        self.log = work / f"{name}.jsonl"
        self.every, self.name, self.limit_s = every, name, 60 * minutes
        self.started, self.elapsed = time.time(), 0.0

    def resume(self) -> dict[str, Any] | None:
        if not self.checkpoint.exists():
            return None
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.elapsed = state["seconds"]
        return state

    def seconds(self) -> float:
        return self.elapsed + time.time() - self.started

    def share(self, step: int, steps: int) -> float:
        """Returns how much of the training is done, 0 to 1, in steps or in time, whichever is further."""
        return min(1.0, max(step / steps, self.seconds() / self.limit_s))

    def save(self, **state: Any) -> None:
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state | {"seconds": self.seconds()}, temporary)
        replace_file(temporary, self.checkpoint)

    def note(self, step: int, **figures: float) -> None:
        line = {"step": step, "seconds": round(self.seconds(), 1)} | {k: round(v, 5) for k, v in figures.items()}
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        print(f"{self.name} " + " ".join(f"{k}={v}" for k, v in line.items()), flush=True)
