"""Results with a hostile name, and a parser of the page that is made from them."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

from sdcompress_bench.latency import STAGES, Latency
from sdcompress_bench.results import Results

GATE = {"limit": 1e-4, "error": 2e-6, "timestep": 999, "limits": [1e-4] * 3, "passed": True}
HOSTILE = '<script>alert("tiny")</script> & |co'
WEBP = base64.b64decode("UklGRiIAAABXRUJQVlA4IBYAAAAwAQCdASoBAAEADsD+JaQAA3AAAAAA")


def latency(model: str, backend: str, ms: float, failed: str | None = None) -> Latency:
    key = f"{model}-{backend}"
    if failed:
        return Latency(key, model, backend, "fp32", 128, 1, 2, 25, 7.5, failed=failed)
    samples = {stage: [[ms, ms * 1.01, ms * 0.99], [ms * 1.02, ms, ms]] for stage in STAGES}
    limit = {
        "macs": 7 * 10**8,
        "moved_bytes": 10**8,
        "share_of_matmul_peak": 0.37,
        "share_of_bandwidth": 0.06,
        "least_ms": 14.8,
        "bound": "compute",
    }
    return Latency(
        key,
        model,
        backend,
        "fp32",
        128,
        1,
        2,
        25,
        7.5,
        samples,
        [80.0, 82.0],
        [900.0, 880.0],
        700.0,
        None,
        {"unet": 12.5},
        41.0,
        2,
        [],
        limit,
    )


def distances(scale: float) -> dict[str, object]:
    steps = [
        {"timestep": t, "relative_l2": scale * (1 + t / 1000), "cosine": 0.9999, "psnr_db": 40.0} for t in (1, 501, 999)
    ]
    return {
        "relative_l2": scale * 2,
        "relative_l2_mean": scale,
        "cosine": 0.9999,
        "picture_psnr_db": 31.5,
        "picture_ssim": 0.97,
        "steps": steps,
        "pictures": [],
    }


def estimate(value: float) -> dict[str, object]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value, "count": 60, "warning": ""}


SETTINGS = {
    "sizes_px": [128],
    "steps": 25,
    "guidance_scale": 7.5,
    "baseline": ["torch", "fp32"],
    "seed": 7,
    "quality_pictures": 60,
    "rounds": 2,
    "samples": 3,
    "end_to_end_samples": 1,
    "timesteps": [1, 501, 999],
    "probes": 2,
}
ENVIRONMENT = {
    "cpu": "Test CPU",
    "cores": 2,
    "memory_mib": 8192,
    "load_average": 0.1,
    "gpu": [],
    "os": "Linux",
    "python": "3.11",
    "torch_threads": 2,
    "packages": {"torch": "2"},
    "commit": None,
}
SHARE = {"share": 0.8, "low": 0.7, "high": 0.87, "count": 60}
COLUMN = {"backend": "torch", "precision": "fp32"}


def student_figures() -> dict[str, object]:
    fid = estimate(30.0) | {"warning": "FID of 60 pictures is biased upwards"}
    return distances(0.2) | {"fid": fid, "kid": estimate(0.0123), "lpips": estimate(0.21)}


def make_results(folder: Path) -> Results:
    """A teacher and a student with a hostile name, each on two backends, and every section of a report."""
    (folder / "pictures").mkdir()
    for name in ("a", "b"):
        (folder / f"pictures/{name}.webp").write_bytes(WEBP)
    gate = {"figure": "kid", "model": HOSTILE, "way": "", "value": 0.0123, "limit": "kid at most 0.02", "passed": True}
    scores = {"real": 30.0, "nano": 28.0, HOSTILE: 25.0}
    return Results(
        created="2026-01-01T00:00:00+00:00",
        command="sdcompress bench nano 'tiny=<x>' -o report",
        settings=SETTINGS,
        environment=ENVIRONMENT,
        peaks={"fp32": {"matmul_flops_per_s": 9.5e10, "bandwidth_bytes_per_s": 1.2e10, "precision": "fp32"}},
        models=[
            {"name": "nano", "sha256": "ab" * 32, "parameters": {"unet": 4_000_000}},
            {"name": HOSTILE, "sha256": "cd" * 32, "parameters": {"unet": 1_000_000}},
        ],
        latency=[
            latency("nano", "torch", 40.0),
            latency("nano", "onnxruntime", 20.0),
            latency(HOSTILE, "torch", 16.0),
            latency(HOSTILE, "onnxruntime", 0.0, "its process was ended by SIGKILL"),
        ],
        backends=[{"model": "nano", "backend": "onnxruntime", "precision": "fp32", "gate": GATE} | distances(1e-6)],
        students={HOSTILE: student_figures()},
        quality={name: {"clip_score": score, "style": SHARE} for name, score in scores.items()},
        captions=["a <b>cat</b>"],
        pictures=[
            {"model": "nano", "files": ["pictures/a.webp"]} | COLUMN,
            {"model": HOSTILE, "files": ["pictures/b.webp"]} | COLUMN,
        ],
        gates=[gate],
        losses={HOSTILE: {"task_loss": [[1, 1.0], [2, 0.5]], "output_kd_loss": [[1, 0.1], [2, 0.04]]}},
        skipped={"TensorRT": "no GPU is here"},
    )


class Tags(HTMLParser):
    """Collects tags, and fails on a closing tag that does not match the open one."""

    VOID = ("meta", "img", "link", "br", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
