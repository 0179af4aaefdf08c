"""Figures of picture sets: CLIP figures, students against the teacher, and all models against real pictures.

They are computed in a process of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sdcompress_engines.errors import BackendMissing

from . import metrics, quality
from .outputs import read_pictures
from .prompts import Pictures, read_reference
from .scenario import Prompt

LEAST_FOR_SETS = 10
"""The fewest pictures for FID and KID."""


def judge(case: dict[str, Any]) -> dict[str, Any]:
    """Returns `quality` (model → figures), `students` (student → figures against the first model) and `skipped`.

    Figures are `quality.Share` or `metrics.Estimate` as plain values; `fid_real` and `kid_real` are against real
    pictures. `skipped` maps what was left out to the reason.

    Args:
        case: `folders`, model → folder of its pictures, the teacher first; `prompts` as [caption, style];
            `first`, how many pictures in a folder are not theirs and come before; `metric`, `styles`, `real` and
            `device` of the suite; `size_px`.
    """
    prompts = [Prompt(*prompt) for prompt in case["prompts"]]
    judged = slice(case["first"], case["first"] + len(prompts))
    pictures = {name: read_pictures(Path(folder))[judged] for name, folder in case["folders"].items()}
    found: dict[str, Any] = {"quality": {name: {} for name in pictures}, "students": {}, "skipped": {}}
    real, real_prompts = _real(case, prompts)
    if case["metric"]:
        clip = quality.ClipMetric(Path(case["metric"]), case["device"])
        sets = dict(pictures) | ({"real": real} if real and isinstance(real, list) else {})
        for name, images in sets.items():
            shown = real_prompts if name == "real" else prompts
            figures = quality.judge(clip, images, shown, dict(case["styles"]))
            per_picture = metrics.clip_score(clip, _tensor(images), [prompt.caption for prompt in shown])
            figures["clip_score"] = metrics.mean_of(per_picture)
            found["quality"].setdefault(name, {}).update({key: asdict(value) for key, value in figures.items()})
    teacher, *students = pictures
    lpips = _open(lambda: metrics.Lpips(device=case["device"]), "LPIPS", found["skipped"])
    for name in students:
        x, y = _tensor(pictures[name]), _tensor(pictures[teacher])
        measured = {"psnr_db": metrics.psnr(x, y), "ssim": metrics.ssim(x, y)} | (
            {"lpips": lpips(x, y)} if lpips else {}
        )
        found["students"][name] = {key: asdict(metrics.mean_of(values)) for key, values in measured.items()}
    if len(prompts) < LEAST_FOR_SETS:
        found["skipped"]["FID, KID"] = (
            f"{len(prompts)} pictures are too few; {LEAST_FOR_SETS} are needed, and {metrics.FID_PICTURES} for figures"
            " to publish"
        )
    elif inception := _open(lambda: metrics.InceptionFeatures(case["device"]), "FID, KID", found["skipped"]):
        features = {name: inception(_tensor(images)) for name, images in pictures.items()}
        for name in students:
            found["students"][name] |= _sets(features[name], features[teacher])
        if real:
            truth = inception(real if isinstance(real, Pictures) else _tensor(real))
            for name in pictures:
                found["quality"][name] |= {f"{key}_real": value for key, value in _sets(features[name], truth).items()}
    return found


def _sets(features: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    return {"fid": asdict(metrics.fid(features, reference)), "kid": asdict(metrics.kid(features, reference))}


def _real(case: dict[str, Any], prompts: Sequence[Prompt]) -> tuple[list[Image.Image] | Pictures, Sequence[Prompt]]:
    """Returns the real pictures and their prompts: a shard's for the prompts, or all of a folder, without prompts."""
    if not case["real"]:
        return [], []
    path = Path(case["real"])
    return (read_reference(path, case["size_px"]), []) if path.is_dir() else quality.real_pictures(path, prompts)


def _tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Returns images as a tensor, (N, 3, H, W), uint8."""
    return torch.stack([quality.to_pixels(image).mul(255).round().byte() for image in images])


def _open(create: Callable[[], Any], what: str, skipped: dict[str, str]) -> Any:
    """Returns what `create` returns, or None where its weights are missing; the reason goes to `skipped`."""
    try:
        return create()
    except BackendMissing as error:
        skipped[what] = str(error)
        return None
