"""The schema of a results file: of its parts that `Results` holds as plain values, what is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from sdcompress_engines.errors import ArtifactError, shorten

from sdcompress.support.faults import faults_of

Name = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Count = Annotated[int, Field(ge=1, le=10**9)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Settings(BaseModel):
    steps: Count | None = None
    guidance_scale: Finite | None = None
    rounds: Count
    baseline: tuple[Name, Name] | None = None


class _Gpu(BaseModel):
    name: Name
    driver: Name


class _Environment(BaseModel):
    gpu: list[_Gpu]
    packages: dict[Name, Name] = Field(default_factory=dict)


class _Lora(BaseModel):
    name: Name
    sha256: Name


class _Model(BaseModel):
    name: Name
    sha256: Name
    parameters: dict[Name, int]
    steps: Count | None = None
    guidance_scale: Finite | None = None
    loras: list[_Lora] = Field(default_factory=list)


class _Estimate(BaseModel):
    """A figure with its interval, a `metrics.Estimate` or a `quality.Share` as plain values."""

    value: float | None = None
    share: float | None = None
    low: float
    high: float

    @model_validator(mode="after")
    def _one_number(self) -> _Estimate:
        if (self.value is None) == (self.share is None):
            raise ValueError("needs a value or a share")
        return self


class _Figures(BaseModel):
    """The figures of a model that gates and comparisons read; the others are of any kind."""

    fid: float | _Estimate | None = None
    kid: float | _Estimate | None = None
    fid_real: float | _Estimate | None = None
    kid_real: float | _Estimate | None = None
    lpips: float | _Estimate | None = None
    clip_score: float | _Estimate | None = None
    style: float | _Estimate | None = None
    top5: float | _Estimate | None = None
    relative_l2_mean: float | None = None


class _BackendGate(BaseModel):
    passed: bool
    error: float | None = None
    limit: float | None = None
    timestep: int | None = None


class _Backend(BaseModel):
    model: Name
    backend: Name
    precision: Name
    relative_l2: float | None = None
    failed: str | None = None
    gate: _BackendGate | None = None

    @model_validator(mode="after")
    def _reason(self) -> _Backend:
        gate = self.gate
        if gate and not gate.passed and self.failed is None and None in (gate.error, gate.limit, gate.timestep):
            raise ValueError("the gate failed without error, limit and timestep")
        return self


class _SuiteGate(BaseModel):
    figure: Name
    model: Name
    way: Name
    value: float | None
    limit: Name
    passed: bool


class _Pictures(BaseModel):
    model: Name
    backend: Name
    precision: Name
    files: list[str]


class _Parts(BaseModel):
    model_config = ConfigDict(extra="ignore")

    settings: _Settings
    environment: _Environment
    models: list[_Model] = Field(min_length=1)
    backends: list[_Backend] = Field(default_factory=list)
    students: dict[Name, _Figures] = Field(default_factory=dict)
    quality: dict[Name, _Figures] = Field(default_factory=dict)
    pictures: list[_Pictures] = Field(default_factory=list)
    gates: list[_SuiteGate] = Field(default_factory=list)

    @model_validator(mode="after")
    def _sampling(self) -> _Parts:
        """Older results have one number of steps and one guidance for all models, in the settings."""
        for part in self.models:
            for name in ("steps", "guidance_scale"):
                if getattr(part, name) is None and getattr(self.settings, name) is None:
                    raise ValueError(f"{name} of {part.name} is missing")
        return self


def check_results(raw: dict[str, Any], results: type[Any], path: Path) -> Any:
    """Returns the results in the content of a file.

    Args:
        raw: the content.
        results: the class `Results`.
        path: of the file, for the message.

    Raises:
        ArtifactError: the content does not meet the schema; one message names the faults.
    """
    faults = []
    try:
        _Parts.model_validate(raw)
    except ValidationError as error:
        faults.append(faults_of(error))
    try:
        found = TypeAdapter(results).validate_python(raw)
    except ValidationError as error:
        faults.append(faults_of(error))
    if faults:
        raise ArtifactError(
            f"is no results file ({shorten('; '.join(faults), 350)})",
            where=path,
            expected="a results.json of `sdcompress bench`",
        )
    return found
