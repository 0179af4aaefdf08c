"""What is measured: models, the ways to run them, and one `Scenario` for each thing timed."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import UsageError

BACKEND_NAMES = {
    "torch": "PyTorch",
    "compile": "torch.compile",
    "aot": "AOTInductor",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
}
PRECISIONS = ("fp32", "fp16", "bf16")
FIGURES = {
    "speedup": "pictures a second over the first model on the first way to run it in PyTorch",
    "unet_step_ms": "median UNet step",
    "peak_mib": "peak memory",
    "relative_l2": "of a backend to PyTorch fp32 with the same weights, worst timestep",
    "teacher_relative_l2": "of a student's noise prediction to the teacher's, mean over timesteps",
    "lpips": "mean LPIPS of a student's pictures to the teacher's of equal seeds",
    "fid": "of a model's pictures to the teacher's, or to real ones for the teacher",
    "kid": "likewise",
    "clip_score": "mean, × 100",
    "style": "share of pictures whose style the metric recognises",
    "top5": "share of pictures whose caption is among the metric's first five",
}
"""What a gate may ask about."""


@dataclass(frozen=True)
class Prompt:
    """A caption, and its style where the metric knows styles (see `ClipMetric.style_accuracy`)."""

    caption: str
    style: str = ""


@dataclass(frozen=True)
class Random:
    """A model of a published shape with random weights, made when it is needed; see `sdcompress.models.random`."""

    family: str
    plan: str | None = None


@dataclass(frozen=True)
class ModelUnderTest:
    """A pipeline that is measured.

    Attributes:
        name: what the report calls it; unique in a suite.
        path: what `sdcompress.backends.assemble.open_pipeline` takes: a folder, a file, or a known name.
        onnx: its ONNX folder; None has it exported into a cache, outside of what is timed.
        engine: its TensorRT engine folder, likewise.
        sha256: hash of its weights.
        metrics: the `metrics.jsonl` of its training, for the loss curves.
        random: what `path` is made from where its weights are random: good for latency, not for pictures.
    """

    name: str
    path: str | Path
    onnx: Path | None = None
    engine: Path | None = None
    sha256: str = ""
    metrics: Path | None = None
    random: Random | None = None

    def artifacts(self, backend: str) -> Path | None:
        """The folder that the backend runs from, None where it is made on demand."""
        return {"onnxruntime": self.onnx, "tensorrt": self.engine}.get(backend)


@dataclass(frozen=True)
class Way:
    """A backend in a precision: how a model is run."""

    backend: str
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{BACKEND_NAMES.get(self.backend, self.backend)} {self.precision}"


@dataclass(frozen=True)
class Gate:
    """A limit on a figure of `FIGURES`; on every model or way where none is named, the first model left out of what
    compares with it.
    """

    figure: str
    model: str | None = None
    way: Way | None = None
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a figure is inside; one that is not a number never is."""
        inside = ((operator.ge, self.at_least), (operator.le, self.at_most))
        return all(compare(value, bound) for compare, bound in inside if bound is not None)

    def __str__(self) -> str:
        parts = [
            f"at least {self.at_least:g}" if self.at_least is not None else "",
            f"at most {self.at_most:g}" if self.at_most is not None else "",
        ]
        return f"{self.figure} {' and '.join(p for p in parts if p)}"


@dataclass(frozen=True)
class Scenario:
    """One measured set-up: a model run one way, at a size."""

    model: ModelUnderTest
    way: Way
    size_px: int
    batch: int
    steps: int
    guidance_scale: float

    @property
    def key(self) -> str:
        """A name safe in a file: `teacher-torch-fp32-512px-b1`."""
        return f"{slug(self.model.name)}-{self.way.backend}-{self.way.precision}-{self.size_px}px-b{self.batch}"

    @property
    def unet_batch(self) -> int:
        """Latents in one UNet call: classifier-free guidance runs every picture twice, with and without its prompt."""
        return self.batch * (2 if self.guidance_scale > 1 else 1)


@dataclass(frozen=True)
class Suite:
    """Everything a report is made from.

    The first model is the teacher: what students are held against, and speed-up 1.0 the first way it runs in PyTorch.

    Attributes:
        name: what the report is called where it has a name; for people.
        sizes_px: sides of the pictures; distances and pictures are taken at the first.
        batch: pictures at once, one or several; each is a row of its own.
        prompts: captions of the timed pictures, the grid and the quality figures, in that order of need.
        rounds: how often every scenario is started afresh; rounds are interleaved, so slow drift of the machine hits
            all alike.
        samples: timed calls a stage and round, at most; `stage_budget_s` ends a stage sooner, though never under 3
            samples of a UNet step and 1 of the others.
        pictures: how many prompts the grid and the picture comparison take.
        quality_pictures: how many the figures of sets take (CLIP, FID, KID); 0 leaves them out.
        timesteps: of 1000, where the UNets are compared.
        probes: latents compared at each timestep.
        sensitivity: places where a fault is planted to tell how small a one the gate of a lower precision can see; 0
            leaves that out.
        metric: folder of a CLIP that judges the pictures; None leaves the CLIP figures out.
        styles: style → phrase its captions start with; needed for `style_accuracy`.
        real: webdataset shard of real pictures with captions, or a folder of pictures (`--reference`): the ceiling of
            the CLIP figures and a reference of FID and KID.
        threads: CPU threads of every child, None for the runtime's own choice.
    """

    models: tuple[ModelUnderTest, ...]
    ways: tuple[Way, ...] = (Way("torch"), Way("onnxruntime"))
    name: str = ""
    device: str = "cpu"
    sizes_px: tuple[int, ...] = (512,)
    batch: tuple[int, ...] = (1,)
    steps: int = 25
    guidance_scale: float = 7.5
    prompts: tuple[Prompt, ...] = field(default=(Prompt("a photo of a lighthouse at dusk"),))
    seed: int = 0
    rounds: int = 5
    samples: int = 20
    end_to_end_samples: int = 3
    stage_budget_s: float = 10.0
    scenario_timeout_s: float = 3600.0
    pictures: int = 6
    quality_pictures: int = 0
    quality_batch: int = 8
    timesteps: tuple[int, ...] = (1, 101, 301, 501, 701, 901, 999)
    probes: int = 4
    sensitivity: int = 0
    metric: Path | None = None
    styles: tuple[tuple[str, str], ...] = ()
    real: Path | None = None
    threads: int | None = None
    gates: tuple[Gate, ...] = ()

    def __post_init__(self) -> None:
        names = [slug(model.name) for model in self.models]
        if not names or len(set(names)) != len(names):
            raise UsageError(
                f"model names {[m.name for m in self.models]}",
                expected="at least one model, each with a name of its own",
            )
        for way in self.ways:
            if way.backend not in BACKEND_NAMES:
                raise UsageError(f"unknown backend {way.backend!r}", expected=", ".join(BACKEND_NAMES))
            if way.precision not in PRECISIONS:
                raise UsageError(f"unknown precision {way.precision!r}", expected=", ".join(PRECISIONS))
        if not self.prompts:
            raise UsageError("no prompts", expected="at least one caption")
        if min(self.rounds, self.samples, self.end_to_end_samples, self.steps, *self.sizes_px, *self.batch) < 1:
            raise UsageError("a count under 1", expected="rounds, samples, steps, size and batch of at least 1")

    @property
    def baseline(self) -> Way | None:
        """The first way in PyTorch: the teacher's speed there is 1.0, and pictures for the quality figures are drawn by
        it. None where PyTorch is not measured.
        """
        return next((way for way in self.ways if way.backend == "torch"), None)

    def scenarios(self) -> Iterator[Scenario]:
        """Models × ways × sizes × batch sizes, model by model."""
        for model in self.models:
            for way in self.ways:
                for size_px in self.sizes_px:
                    for batch in self.batch:
                        yield Scenario(model, way, size_px, batch, self.steps, self.guidance_scale)

    def settings(self) -> dict[str, Any]:
        """What a results file keeps of the suite: plain values, the models and paths left out."""
        return {
            "name": self.name,
            "device": self.device,
            "ways": [[w.backend, w.precision] for w in self.ways],
            "sizes_px": list(self.sizes_px),
            "batch": list(self.batch),
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "rounds": self.rounds,
            "samples": self.samples,
            "end_to_end_samples": self.end_to_end_samples,
            "stage_budget_s": self.stage_budget_s,
            "pictures": self.pictures,
            "quality_pictures": self.quality_pictures,
            "timesteps": list(self.timesteps),
            "probes": self.probes,
            "sensitivity": self.sensitivity,
            "threads": self.threads,
            "prompts": len(self.prompts),
            "random": {m.name: m.random.family for m in self.models if m.random},
        }


def slug(name: str) -> str:
    """A name safe in a file or an HTML id."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name).strip("_.") or "model"
