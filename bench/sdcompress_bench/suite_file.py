"""Suite files (YAML): their settings, and how they are read and checked."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from sdcompress_engines.errors import UsageError
from sdcompress_engines.paths import expand_user

from sdcompress.support.bounds import (
    LEAST_PX,
    MOST_BATCH,
    MOST_GUIDANCE,
    MOST_PICTURES,
    MOST_PX,
    MOST_SEED,
    MOST_STEPS,
    MOST_THREADS,
    STEP_PX,
)
from sdcompress.support.faults import faults_of
from sdcompress.support.settings import Settings
from sdcompress.support.yaml_files import read_mapping

from .scenario import FIGURES, PRECISIONS, BackendSetup


def _check_lora(text: str) -> str:
    from sdcompress.lora.fuse import parse_lora

    try:
        parse_lora(text)
    except UsageError as error:
        raise ValueError(str(error).removeprefix("--lora ")) from error
    return text


Loras = tuple[Annotated[str, AfterValidator(_check_lora)], ...]
"""LoRAs as typed: FILE or FILE:WEIGHT."""


class ModelEntry(Settings):
    """A model of a suite: a path, a known name or a hub id, or a published shape with random weights."""

    name: str | None = Field(None, description="Its name in the report. None is the model's own name.")
    path: str | None = Field(None, description="A diffusers folder, a single file, a hub id, or a built-in's name.")
    random: Literal["sd1", "sd2", "sdxl"] | None = Field(
        None, description="In place of a path: the shape of this family, with random weights."
    )
    plan: str | None = Field(None, description="With `random`: a student with this plan.")
    decoder: str | None = Field(
        None,
        description=(
            "Folder of a small decoder to draw with, in the place of its VAE; `nano` is the built-in one. For a model"
            " with random weights, `random` is one of TAESD's shape with such weights."
        ),
    )
    steps: int | None = Field(None, ge=1, le=MOST_STEPS, description="Its sampling steps. None is the suite's `steps`.")
    guidance_scale: float | None = Field(
        None, ge=0, le=MOST_GUIDANCE, description="Its guidance scale. None is the suite's `guidance_scale`."
    )
    loras: Loras | None = Field(
        None, description="LoRAs that it draws with, each FILE or FILE:WEIGHT. None are the suite's `loras`."
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelEntry:
        if (self.path is None) == (self.random is None):
            raise ValueError("needs a path, or random with a family, and not both")
        if self.plan and not self.random:
            raise ValueError("plan can be used only with random; for a trained student, give its own path")
        return self


class GateEntry(Settings):
    """A limit on a figure; if it is exceeded, `bench` ends with exit status 3."""

    figure: str = Field(description=f"One of {', '.join(FIGURES)}.")
    model: str | None = Field(None, description="Limits this model only.")
    backend: str | None = Field(
        None, description="Limits this backend only, with its precision if that is not the usual one: ort, aot:bf16."
    )
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _some_limit(self) -> GateEntry:
        if self.at_least is None and self.at_most is None:
            raise ValueError("needs at_least or at_most")
        if self.figure not in FIGURES:
            raise ValueError(f"no figure {self.figure!r}, known: {', '.join(FIGURES)}")
        return self


class SuiteFile(Settings):
    """The settings of a suite. Unknown keys are errors; all errors are reported at once."""

    title: str = Field("", description="The title of the report.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` is cuda where there is one.")
    models: tuple[ModelEntry, ...] = Field(min_length=1, description="The first is the teacher.")
    decoder: str | None = Field(
        None, description="Folder of a small decoder: the last model is measured once more, with it."
    )
    backends: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description=(
            "Any of torch, compile, aot, ort, trt, each with `:precision` if it is not the usual one. None is what this"
            " machine has."
        ),
    )
    gpu_backends: tuple[str, ...] | None = Field(None, description="Replaces `backends` on a GPU.")
    precision: Literal["fp32", "fp16", "bf16"] | None = Field(
        None, description="Of backends without one. None is fp16 on a GPU, fp32 on a CPU."
    )
    size_px: tuple[Annotated[int, Field(ge=LEAST_PX, le=MOST_PX, multiple_of=STEP_PX)], ...] | None = Field(
        None, min_length=1, description="Sides of the pictures. None is the size that the teacher was trained on."
    )
    batch: tuple[Annotated[int, Field(ge=1, le=MOST_BATCH)], ...] = Field(
        (1,), min_length=1, description="Pictures in one call; each value is a row."
    )
    steps: int | None = Field(
        None,
        ge=1,
        le=MOST_STEPS,
        description="Sampling steps of every model. None is each model's own number: 25, or what it was trained for.",
    )
    guidance_scale: float | None = Field(
        None,
        ge=0,
        le=MOST_GUIDANCE,
        description=(
            "Of every model; at 1 or less the UNet runs once a step, not twice. None is each model's own: 7.5, 2.5 for"
            " nano, and none for a model that was trained to draw without guidance."
        ),
    )
    loras: Loras = Field((), description="LoRAs that every model draws with, each FILE or FILE:WEIGHT.")
    prompts: str | None = Field(None, description="A file of captions: txt, csv, tsv, jsonl, or COCO's json.")
    reference: str | None = Field(None, description="A folder of real pictures, for FID and KID.")
    clip: str | None = Field(None, description="A CLIP (transformers folder) that judges the pictures.")
    seed: int = Field(
        0, ge=0, le=MOST_SEED, description="Seed of the first picture; the next picture has the next seed."
    )
    rounds: int = Field(5, ge=1, le=1000, description="How often each case is started in a new process.")
    samples: int = Field(20, ge=1, le=10**6, description="The most timed calls of a stage in a round.")
    end_to_end_samples: int = Field(3, ge=1, le=10**6, description="The most timed pictures in a round.")
    stage_budget_s: float = Field(10.0, gt=0, le=1e6, description="Ends a stage earlier.")
    scenario_timeout_s: float = Field(3600.0, gt=0, le=1e7, description="Ends a case that hangs.")
    pictures: int = Field(6, ge=0, le=10**4, description="Pictures in the grid.")
    quality_pictures: int | None = Field(
        None,
        ge=0,
        le=MOST_PICTURES,
        description="Pictures for CLIP, FID and KID. None is all prompts of a file, or those of nano.",
    )
    timesteps: tuple[Annotated[int, Field(ge=0, lt=MOST_STEPS)], ...] = Field(
        (1, 101, 301, 501, 701, 901, 999), min_length=1, description="Timesteps at which the UNets are compared."
    )
    probes: int = Field(4, ge=1, le=10**4, description="Latents at each timestep.")
    sensitivity: int = Field(
        0, ge=0, le=10**4, description="Planted faults that show what a gate detects; 0 plants none."
    )
    threads: int | None = Field(None, ge=1, le=MOST_THREADS, description="CPU threads.")
    gates: tuple[GateEntry, ...] = ()

    @field_validator("models", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Accept `MODEL` and `NAME=MODEL` for a whole entry."""
        if not isinstance(value, list | tuple):
            return value
        return [
            dict(zip(("name", "path"), _split(entry), strict=True)) if isinstance(entry, str) else entry
            for entry in value
        ]

    @field_validator("size_px", "batch", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value


def _split(text: str) -> tuple[str | None, str]:
    """Returns the name and the model of `NAME=MODEL`; no name if the text before `=` is part of a path.

    A path such as `lr=1e-5/pipeline` that exists is taken whole.
    """
    name, equals, path = text.partition("=")
    is_whole = not equals or re.search(r"[\\/:]", name) or os.path.exists(expand_user(text))
    return (None, text) if is_whole else (name or None, path)


def read_setup(text: str, precision: str) -> BackendSetup:
    """Returns the setup of `BACKEND` or `BACKEND:PRECISION`; the backend may be an alias.

    Args:
        text: as typed.
        precision: of a backend without one.

    Raises:
        UsageError: there is no such backend or precision.
    """
    from sdcompress.backends.registry import backend_name

    name, colon, wanted = text.strip().partition(":")
    if colon and wanted not in PRECISIONS:
        raise UsageError(f"no precision {wanted!r} in --backend {text}", expected=" or ".join(PRECISIONS))
    full = backend_name(name)
    if full == "auto":
        raise UsageError("auto is no backend to measure", expected="the backends themselves, such as torch,ort")
    return BackendSetup(full, wanted or precision)


def suite_names() -> list[str]:
    """Returns the names of the built-in suites."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    """Returns `bench/scenarios` of a checkout, or its place in an installed wheel."""
    packed = Path(str(files("sdcompress_bench"))) / "scenarios"
    return packed if packed.is_dir() else Path(str(files("sdcompress_bench"))).parent / "scenarios"


def suite_path(name: str) -> Path | None:
    """Returns the file of a suite given by name or path, or None if the name is no suite.

    Raises:
        UsageError: it is the path of a YAML file that does not exist.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UsageError("no such suite", where=name, expected=f"a YAML file, or one of {', '.join(suite_names())}")
        return path
    known = _folder() / f"{name}.yaml"
    return known if name in suite_names() else None


def read_suite(path: Path) -> SuiteFile:
    """Returns the settings in a suite file.

    Raises:
        UsageError: it is no YAML mapping, or has wrong settings.
    """
    return check_suite(read_mapping(path, "settings"), path)


def check_suite(values: dict[str, Any], where: Path | str) -> SuiteFile:
    """Returns settings as a checked suite.

    Args:
        values: setting → value.
        where: the file, or what else the message names.

    Raises:
        UsageError: there are unknown settings or wrong values; all in one message.
    """
    try:
        return SuiteFile.model_validate(values)
    except ValidationError as error:
        raise UsageError(faults_of(error, SuiteFile), where=where) from error
