"""Figures of sets of pictures, worked out in a process of its own: what a CLIP sees in them, how far a student's are
from its teacher's, and how far all are from real ones.
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
"""Pictures under which FID and KID would say nothing."""


def judge(case: dict[str, Any]) -> dict[str, Any]:
    """`{"quality": model → figures, "students": student → figures against the first model, "skipped": what → why not}`.

    Figures are shares (`quality.Share`), estimates (`metrics.Estimate`) or, of FID and KID to real pictures, `fid_real`
    and `kid_real`, all as plain values.

    Args:
        case: `folders`, model → where its pictures are, the teacher first; `prompts` as [caption, style]; `metric`,
            `styles`, `real` and `device` of the suite; `size_px`.
    """
    prompts = [Prompt(*prompt) for prompt in case["prompts"]]
    pictures = {name: read_pictures(Path(folder), len(prompts)) for name, folder in case["folders"].items()}
    found: dict[str, Any] = {"quality": {name: {} for name in pictures}, "students": {}, "skipped": {}}
    real, real_prompts = _real(case, prompts)
    if case["metric"]:
        clip = quality.ClipMetric(Path(case["metric"]), case["device"])
        sets = dict(pictures) | ({"real": real} if real and isinstance(real, list) else {})
        for name, images in sets.items():
            asked = real_prompts if name == "real" else prompts
            figures = quality.judge(clip, images, asked, dict(case["styles"]))
            per_picture = metrics.clip_score(clip, _tensor(images), [p.caption for p in asked])
            figures["clip_score"] = metrics.mean_of(per_picture)
            found["quality"].setdefault(name, {}).update({key: asdict(value) for key, value in figures.items()})
    teacher, *students = pictures
    pairs = _if_there(lambda: metrics.Lpips(device=case["device"]), "LPIPS", found["skipped"])
    for name in students:
        x, y = _tensor(pictures[name]), _tensor(pictures[teacher])
        measured = {"psnr_db": metrics.psnr(x, y), "ssim": metrics.ssim(x, y)} | (
            {"lpips": pairs(x, y)} if pairs else {}
        )
        found["students"][name] = {key: asdict(metrics.mean_of(values)) for key, values in measured.items()}
    if len(prompts) < LEAST_FOR_SETS:
        found["skipped"]["FID, KID"] = (
            f"{len(prompts)} pictures say nothing; {LEAST_FOR_SETS} at least, {metrics.FID_PICTURES} for figures to"
            " quote"
        )
    elif inception := _if_there(lambda: metrics.InceptionFeatures(case["device"]), "FID, KID", found["skipped"]):
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
    """The real pictures, and their prompts where they have any: of a shard those of the prompts, of a folder all."""
    if not case["real"]:
        return [], []
    path = Path(case["real"])
    return (read_reference(path, case["size_px"]), []) if path.is_dir() else quality.real_pictures(path, prompts)


def _tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """(N, 3, H, W) uint8."""
    return torch.stack([quality.to_pixels(image).mul(255).round().byte() for image in images])


def _if_there(make: Callable[[], Any], what: str, skipped: dict[str, str]) -> Any:
    try:
        return make()
    except BackendMissing as error:
        skipped[what] = str(error)
        return None
