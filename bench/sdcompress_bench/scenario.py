"""What is measured: models, the settings they all share, and one `Scenario` for each thing timed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sdcompress_engines.errors import UsageError

BACKENDS = ("torch", "onnxruntime", "tensorrt")
BACKEND_NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}


@dataclass(frozen=True)
class Prompt:
    """A caption, and its style where the metric knows styles (see `ClipMetric.style_accuracy`)."""

    caption: str
    style: str = ""


@dataclass(frozen=True)
class ModelUnderTest:
    """A pipeline that is measured.

    Attributes:
        name: what the report calls it; unique in a suite.
        path: what `sdcompress.pipeline.load_pipeline` takes: a folder, a file, or a known name.
        onnx: its ONNX folder; None has it exported into a cache, outside of what is timed.
        engine: its TensorRT engine folder, likewise.
        sha256: hash of its weights.
        metrics: the `metrics.jsonl` of its training, for the loss curves.
    """

    name: str
    path: str | Path
    onnx: Path | None = None
    engine: Path | None = None
    sha256: str = ""
    metrics: Path | None = None

    def artifacts(self, backend: str) -> Path | None:
        """The folder that the backend runs from, None where it is made on demand."""
        return {"onnxruntime": self.onnx, "tensorrt": self.engine}.get(backend)


@dataclass(frozen=True)
class Scenario:
    """One measured set-up: a model on a backend, in a precision, at a size."""

    model: ModelUnderTest
    backend: str
    precision: str
    size_px: int
    batch: int
    steps: int
    guidance_scale: float

    @property
    def key(self) -> str:
        """A name safe in a file: `teacher-torch-fp32-b1`."""
        return f"{slug(self.model.name)}-{self.backend}-{self.precision}-b{self.batch}"

    @property
    def unet_batch(self) -> int:
        """Latents in one UNet call: classifier-free guidance runs every picture twice, with and without its prompt."""
        return self.batch * (2 if self.guidance_scale > 1 else 1)


@dataclass(frozen=True)
class Suite:
    """Everything a report is made from. The first model is the teacher: speed-up 1.0 in PyTorch, and what students are held against.

    Attributes:
        batch: pictures at once, one or several; each is a row of its own.
        prompts: captions of the timed pictures, the grid and the quality figures, in that order of need.
        rounds: how often every scenario is started afresh; rounds are interleaved, so slow drift of the machine hits all alike.
        samples: timed calls a stage and round, at most; `stage_budget_s` ends a stage sooner, though never under 3 samples (1 for whole pictures).
        pictures: how many prompts the grid and the picture comparison take.
        quality_pictures: how many the CLIP figures take; 0 leaves them out.
        timesteps: of 1000, where the UNets are compared.
        probes: latents compared at each timestep.
        metric: folder of a CLIP that judges the pictures; None leaves the CLIP figures out.
        styles: style → phrase its captions start with; needed for `style_accuracy`.
        real: webdataset shard of real pictures with captions, the ceiling of the CLIP figures.
        threads: CPU threads of every child, None for the runtime's own choice.
    """

    models: tuple[ModelUnderTest, ...]
    backends: tuple[str, ...] = ("torch", "onnxruntime")
    precision: str = "fp32"
    device: str = "cpu"
    size_px: int = 512
    batch: tuple[int, ...] = (1,)
    steps: int = 25
    guidance_scale: float = 7.5
    prompts: tuple[Prompt, ...] = field(default=(Prompt("a photo of a lighthouse at dusk"),))
    seed: int = 0
    rounds: int = 3
    samples: int = 20
    end_to_end_samples: int = 3
    stage_budget_s: float = 10.0
    scenario_timeout_s: float = 3600.0
    pictures: int = 6
    quality_pictures: int = 0
    quality_batch: int = 8
    timesteps: tuple[int, ...] = (1, 101, 301, 501, 701, 901, 999)
    probes: int = 4
    metric: Path | None = None
    styles: tuple[tuple[str, str], ...] = ()
    real: Path | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        names = [slug(model.name) for model in self.models]
        if not names or len(set(names)) != len(names):
            raise UsageError(f"model names {[m.name for m in self.models]}", expected="at least one model, each with a name of its own")
        for backend in self.backends:
            if backend not in BACKENDS:
                raise UsageError(f"unknown backend {backend!r}", expected=", ".join(BACKENDS))
        if not self.prompts:
            raise UsageError("no prompts", expected="at least one caption")
        if min(self.rounds, self.samples, self.end_to_end_samples, self.steps, self.size_px, *self.batch) < 1:
            raise UsageError("a count under 1", expected="rounds, samples, steps, size and batch of at least 1")

    def scenarios(self) -> Iterator[Scenario]:
        """Models × backends × batch sizes, model by model."""
        for model in self.models:
            for backend in self.backends:
                for batch in self.batch:
                    yield Scenario(model, backend, self.precision, self.size_px, batch, self.steps, self.guidance_scale)


def slug(name: str) -> str:
    """A name safe in a file or an HTML id."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name).strip("_.") or "model"
