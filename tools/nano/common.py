"""What the nano training scripts share: the data in memory, a resumable loop's bookkeeping, the config."""

from __future__ import annotations

import io
import json
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sdcompress_engines.files import replace_file

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "sdcompress/assets/nano/data"
CONFIG = Path(__file__).with_name("config.json")


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


def load(split: str, data: Path = DATA) -> Split:
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
    return Split(torch.stack(images).contiguous(), captions, metas)


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


class Progress:
    """Checkpoints by atomic rename, one JSON line every `every` steps."""

    def __init__(self, work: Path, name: str, every: int = 50) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.checkpoint = work / f"{name}.ckpt"
        self.log = work / f"{name}.jsonl"
        self.every, self.name = every, name
        self.started, self.elapsed = time.time(), 0.0

    def resume(self) -> dict[str, Any] | None:
        if not self.checkpoint.exists():
            return None
        state = torch.load(self.checkpoint, weights_only=True)
        self.elapsed = state["seconds"]
        return state

    def seconds(self) -> float:
        return self.elapsed + time.time() - self.started

    def save(self, **state: Any) -> None:
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state | {"seconds": self.seconds()}, temporary)
        replace_file(temporary, self.checkpoint)

    def note(self, step: int, **figures: float) -> None:
        line = {"step": step, "seconds": round(self.seconds(), 1)} | {k: round(v, 5) for k, v in figures.items()}
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        print(f"{self.name} " + " ".join(f"{k}={v}" for k, v in line.items()), flush=True)
