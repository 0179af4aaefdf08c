"""Prompts, profiles and changed engine folders for the tests of the ComfyUI node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.manifest import read_manifest, write_manifest

WIDTH = 96


SHAPE = (2, 4, 8, 16)


def text(tokens: int, seed: int, width: int = WIDTH, **extras: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), extras


UNET, SCHEDULER = "pipeline/unet/config.json", "pipeline/scheduler/scheduler_config.json"


def read_config(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def change(folder: Path, **config: Any) -> None:
    """Change a folder's manifest: entries of its config, and whole files, which have a `/` in their name."""
    made = read_manifest(folder)
    assert made
    files = {name: value for name, value in config.items() if "/" in name}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    write_manifest(
        folder,
        made.kind,
        config={**made.config, **{name: value for name, value in config.items() if name not in files}},
        inputs=made.inputs,
    )


def record_calls(patcher: Any) -> list[tuple[torch.Tensor, ...]]:
    """Returns a list that gets the arguments and the result of each following call of the diffusion model."""
    calls: list[tuple[torch.Tensor, ...]] = []

    def record(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        given = dict(zip(("x", "timesteps", "context"), args, strict=False)) | kwargs
        calls.append((given["x"].clone(), given["timesteps"].clone(), given["context"].clone(), output.clone()))

    patcher.model.diffusion_model.register_forward_hook(record, with_kwargs=True)
    return calls


PROFILES = {
    "two at a time": ([2, 2], [8, 16], [77, 154]),
    "exactly four": ([4, 4], [8, 16], [77, 77]),
    "long prompts": ([1, 8], [8, 16], [154, 308]),
    "one window": ([1, 2], [8, 16], [77, 77]),
}


def profile(batch: list[int], size: list[int], tokens: list[int]) -> dict[str, list[list[int]]]:
    """Returns a profile as a manifest has it. opt is min."""
    ends = [(batch[at], size[at], tokens[at]) for at in (0, 0, 1)]
    return {
        "x": [[b, 4, s, s] for b, s, _ in ends],
        "timesteps": [[b] for b, _, _ in ends],
        "context": [[b, t, WIDTH] for b, _, t in ends],
    }
