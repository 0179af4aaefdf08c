"""What is measured: models, the backends that run them, and one `Scenario` for each thing timed."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import UsageError, shorten

from sdcompress.backends.registry import backends
from sdcompress.families.sampling_defaults import USUAL_STEPS

PRECISIONS = ("fp32", "fp16", "bf16")
FIGURES = {
    "speedup": "pictures a second, over those of the first model in the first PyTorch setup",
    "unet_step_ms": "median UNet step",
    "peak_mib": "peak memory",
    "lora_swap_ms": "median time to put a model's LoRAs into an open pipeline and take them out again",
    "relative_l2": "of a backend to PyTorch fp32 with the same weights, worst timestep",
    "teacher_relative_l2": "of a student's noise prediction to the teacher's, mean over timesteps",
    "lpips": "mean LPIPS of a student's pictures to the teacher's of equal seeds",
    "fid": "of a model's pictures to the teacher's, or to real ones for the teacher",
    "kid": "of the same pictures as `fid`",
    "clip_score": "mean, × 100",
    "style": "share of pictures whose style the metric recognizes",
    "top5": "share of pictures whose caption is among the metric's first five",
}
"""The figures that a gate can limit."""


@dataclass(frozen=True)
class Prompt:
    """A caption, with its style where the metric knows styles (see `ClipMetric.style_accuracy`)."""

    caption: str
    style: str = ""


@dataclass(frozen=True)
class Random:
    """A model of a published shape with random weights, created on demand; see `sdcompress.models.random`.

    Attributes:
        family: of the pipeline.
        plan: of its student; None is the whole UNet.
        decoder: draw with a random small decoder in the place of the VAE.
    """

    family: str
    plan: str | None = None
    decoder: bool = False


@dataclass(frozen=True)
class Sampling:
    """How a model draws its pictures.

    Attributes:
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; at 1 or less there is none.
    """

    steps: int = USUAL_STEPS
    guidance_scale: float = 7.5

    @property
    def is_guided(self) -> bool:
        """Whether there is classifier-free guidance."""
        return self.guidance_scale > 1

    def unet_batch(self, pictures: int) -> int:
        """Returns the latents in one UNet call: with guidance, each picture with and without its prompt."""
        return pictures * (2 if self.is_guided else 1)

    def __str__(self) -> str:
        guidance = f"guidance {self.guidance_scale:g}" if self.is_guided else "no guidance"
        return f"{self.steps} step{'s' if self.steps > 1 else ''}, {guidance}"


@dataclass(frozen=True)
class ChosenLora:
    """A LoRA that a model draws with: its file, the factor of its change, and the hash of the file."""

    file: Path
    weight: float = 1.0
    sha256: str = ""

    def __str__(self) -> str:
        name = shorten(self.file.name, 100)
        return name if self.weight == 1 else f"{name}:{self.weight:g}"


@dataclass(frozen=True)
class ModelUnderTest:
    """A pipeline that is measured.

    Attributes:
        name: its name in the report, unique in a suite.
        path: what `sdcompress.backends.assemble.open_pipeline` takes: a folder, a file, or a known name.
        onnx: the folder of its ONNX graphs; None exports them to the cache before anything is timed.
        engine: the folder of its TensorRT engines; None builds them in the same way.
        sha256: hash of its weights.
        metrics: the `metrics.jsonl` of its training, for the loss curves.
        random: the family and plan from which `path` is created with random weights. Such a model is good for latency
            and memory, not for pictures.
        decoder: folder of the small decoder that it draws with, in the place of its VAE.
        decoder_sha256: hash of that folder.
        sampling: its steps and its guidance.
        loras: that it draws with, in their order.
    """

    name: str
    path: str | Path
    onnx: Path | None = None
    engine: Path | None = None
    sha256: str = ""
    metrics: Path | None = None
    random: Random | None = None
    decoder: Path | None = None
    decoder_sha256: str = ""
    sampling: Sampling = Sampling()
    loras: tuple[ChosenLora, ...] = ()

    @property
    def weighted_loras(self) -> list[tuple[str, float]]:
        """Its LoRAs as plain values: what `set_loras` of an open pipeline takes."""
        return [(str(lora.file), lora.weight) for lora in self.loras]

    def artifacts(self, backend: str) -> Path | None:
        """Returns the folder that the backend runs from, or None where it is created on demand."""
        return {"onnxruntime": self.onnx, "tensorrt": self.engine}.get(backend)


@dataclass(frozen=True)
class BackendSetup:
    """A backend with its precision."""

    backend: str
    precision: str = "fp32"

    def __str__(self) -> str:
        known = backends().get(self.backend)
        return f"{known.title if known else self.backend} {self.precision}"


@dataclass(frozen=True)
class Gate:
    """A limit on a figure of `FIGURES`.

    Attributes:
        model: limits this model only. None limits every model; for figures against the teacher, every student.
        setup: limits this backend setup only. None limits every setup.
    """

    figure: str
    model: str | None = None
    setup: BackendSetup | None = None
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        """Returns whether a figure is within the limit. A figure that is not a number never is."""
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
    """What is timed as one: a model with its own steps and guidance, in a backend setup, at a size and a batch."""

    model: ModelUnderTest
    setup: BackendSetup
    size_px: int
    batch: int

    @property
    def key(self) -> str:
        """A name that is safe in a file name: `teacher-torch-fp32-512px-b1`."""
        return f"{slug(self.model.name)}-{self.setup.backend}-{self.setup.precision}-{self.size_px}px-b{self.batch}"

    @property
    def unet_batch(self) -> int:
        """Latents in one UNet call; see `Sampling.unet_batch`."""
        return self.model.sampling.unet_batch(self.batch)


@dataclass(frozen=True)
class Suite:
    """What a run of the bench measures.

    The first model is the teacher. Students are compared with it, and its speed in the first PyTorch setup is
    speed-up 1.0.

    Attributes:
        name: the title of the report, for people; may be empty.
        sizes_px: sides of the pictures. Distances and pictures are taken at the first size.
        batch: pictures in one call; each value is a row of the report.
        prompts: captions of the timed pictures and the quality figures; each of them takes the first ones.
        shown: captions of the grid and the comparison of pictures; empty takes the first of `prompts`.
        rounds: how often each scenario is started in a new process. Rounds are interleaved, so that slow drift of the
            machine affects all scenarios alike.
        samples: at most this many timed calls of a stage in a round. `stage_budget_s` ends a stage earlier, but not
            below 3 samples of a UNet step and 1 of the other stages.
        pictures: how many prompts the grid and the comparison of pictures take.
        quality_pictures: how many prompts the figures of picture sets take (CLIP, FID, KID); 0 leaves them out.
        timesteps: of 1000, at which the UNets are compared.
        probes: latents that are compared at each timestep.
        sensitivity: at how many places a fault is planted, to find the smallest one that the gate of a lower precision
            detects; 0 leaves this out.
        metric: folder of a CLIP that judges the pictures; None leaves the CLIP figures out.
        styles: style → the phrase with which its captions start; `style_accuracy` needs it.
        real: webdataset shard of real pictures with captions, or a folder of pictures (`--reference`): the ceiling of
            the CLIP figures and a reference for FID and KID.
        threads: CPU threads of each child process; None leaves the choice to the runtime.
        prompts_file: that `prompts` were read from; None where they are built in.
    """

    models: tuple[ModelUnderTest, ...]
    setups: tuple[BackendSetup, ...] = (BackendSetup("torch"), BackendSetup("onnxruntime"))
    name: str = ""
    device: str = "cpu"
    sizes_px: tuple[int, ...] = (512,)
    batch: tuple[int, ...] = (1,)
    prompts: tuple[Prompt, ...] = field(default=(Prompt("a photo of a lighthouse at dusk"),))
    shown: tuple[Prompt, ...] = ()
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
    prompts_file: Path | None = None

    def __post_init__(self) -> None:
        names = [slug(model.name) for model in self.models]
        if not names or len(set(names)) != len(names):
            raise UsageError(
                f"model names {[m.name for m in self.models]}",
                expected="at least one model, each with a name of its own",
            )
        for setup in self.setups:
            if setup.backend not in backends():
                raise UsageError(f"unknown backend {setup.backend!r}", expected=", ".join(backends()))
            if setup.precision not in PRECISIONS:
                raise UsageError(f"unknown precision {setup.precision!r}", expected=", ".join(PRECISIONS))
        if not self.prompts:
            raise UsageError("no prompts", expected="at least one caption")
        counts = (self.rounds, self.samples, self.end_to_end_samples, *self.sizes_px, *self.batch)
        if min(*counts, *(model.sampling.steps for model in self.models)) < 1:
            raise UsageError("a count under 1", expected="rounds, samples, steps, size and batch of at least 1")

    @property
    def baseline(self) -> BackendSetup | None:
        """The first PyTorch setup, or None where PyTorch is not measured.

        The teacher's speed in it is 1.0, and it draws the pictures for the quality figures.
        """
        return next((setup for setup in self.setups if setup.backend == "torch"), None)

    def pictures_at_once(self, model: ModelUnderTest) -> int:
        """Returns how many pictures that are not timed a model draws in one call.

        Without guidance it is one, as in use: an engine for such a model may accept no more.
        """
        return self.quality_batch if model.sampling.is_guided else 1

    def probes_at_once(self, model: ModelUnderTest) -> int:
        """Returns how many probes a model gets in one UNet call; without guidance one, as in use."""
        return self.probes if model.sampling.is_guided else 1

    def scenarios(self) -> Iterator[Scenario]:
        """Yields models × setups × sizes × batch sizes, model by model."""
        for model in self.models:
            for setup in self.setups:
                for size_px in self.sizes_px:
                    for batch in self.batch:
                        yield Scenario(model, setup, size_px, batch)

    def settings(self) -> dict[str, Any]:
        """Returns the part of the suite that a results file keeps: plain values, without models and paths."""
        return {
            "name": self.name,
            "device": self.device,
            "ways": [[setup.backend, setup.precision] for setup in self.setups],
            "sizes_px": list(self.sizes_px),
            "batch": list(self.batch),
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
            "shown": len(self.shown),
            "random": {m.name: m.random.family for m in self.models if m.random},
        }


def slug(name: str) -> str:
    """Returns a form of the name that is safe in a file name and an HTML id."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name).strip("_.") or "model"
