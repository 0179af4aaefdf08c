"""How long each part of a pipeline takes and how much memory it needs. Every scenario runs in its own process.

A process of its own, because arenas, thread pools and compiled kernels outlive the pipeline that created them, and
because a crash or an out-of-memory must cost one row and not the report. Scenarios take turns (A B C, A B C, ...) and
only one is alive at a time, so a machine that warms up or is shared slows all of them alike.

Timed, after a warm-up that lasts until calls are steady:

    unet_step     one UNet call as sampling makes it: 2·batch latents under classifier-free guidance, else `batch`
    text_encoder  `batch` captions (a guided picture does this twice: prompt and empty prompt)
    vae_decode    `batch` latents to pixels
    end_to_end    captions to PIL pictures, in the steps and with the guidance of the model
    lora_swap     the LoRAs of a model that has some, into the open pipeline and out again

On a GPU the first three are timed by CUDA events; everything else, and everything on a CPU, by the wall clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from sdcompress_engines.progress import SILENT, Reporter

from .artifacts import Artifacts, find_artifacts
from .journal import Journal
from .results_schema import Count, Name
from .scenario import BackendSetup, Scenario, Suite
from .stats import Summary, summarize_rounds

STAGES = ("unet_step", "text_encoder", "vae_decode", "end_to_end")
LORA_SWAP = "lora_swap"
"""A model's LoRAs into the open pipeline and out again: `set` and `reset` of `Latency.lora_swap_ms` together."""

Rounds = list[list[Annotated[float, Field(gt=0)]]]
"""For each round its samples."""


@dataclass(frozen=True)
class Latency:
    """The measurements of one scenario, over all rounds.

    Attributes:
        samples_ms: stage → for each round the raw samples, ms a call.
        load_ms: for each round, from a finished import to a pipeline that is ready to run.
        first_image_ms: for each round, the first `batch` pictures after loading.
        peak_rss_mib: highest resident memory of the process over the rounds.
        cuda_peak_mib: CUDA context, plus the higher of PyTorch's reserved memory and of what the process took of the
            device; None on a CPU.
        artifact_mib: component → MiB on the backend's side: weights in PyTorch, files elsewhere.
        build_s: seconds of building the graphs, the package or the engine, whenever that happened; None where there is
            nothing to build.
        threads: CPU threads of PyTorch.
        unsteady: stages whose warm-up ended before calls were within 10% of each other.
        lora_swap_ms: `set`, `reset` and `again`, see `loras.time_swaps` → for each round the raw samples, ms a swap;
            empty where the model has no LoRAs.
        roofline: the UNet step as a share of the device's measured peaks, from `peaks.roofline`; empty where the work
            is not counted.
        failed: why there are no figures, or None where there are.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    key: Name
    model: Name
    backend: Name
    precision: Name
    size_px: Count
    batch: Count
    unet_batch: Count
    steps: Count
    guidance_scale: float
    samples_ms: dict[str, Rounds] = field(default_factory=dict)
    load_ms: list[float] = field(default_factory=list)
    first_image_ms: list[float] = field(default_factory=list)
    peak_rss_mib: float = 0.0
    cuda_peak_mib: float | None = None
    artifact_mib: dict[str, float] = field(default_factory=dict)
    build_s: float | None = None
    threads: int = 0
    unsteady: list[str] = field(default_factory=list)
    roofline: dict[str, Any] = field(default_factory=dict)
    lora_swap_ms: dict[Literal["set", "reset", "again"], Rounds] = field(default_factory=dict)
    failed: str | None = None

    @property
    def setup(self) -> BackendSetup:
        return BackendSetup(self.backend, self.precision)

    def rounds(self, stage: str) -> Rounds:
        """Returns the samples of a stage, or of `LORA_SWAP`, of each round that has some."""
        if stage != LORA_SWAP:
            return [samples for samples in self.samples_ms.get(stage, []) if samples]
        both = zip(self.lora_swap_ms.get("set", []), self.lora_swap_ms.get("reset", []), strict=False)
        return [[i + o for i, o in zip(*pair, strict=False)] for pair in both if all(pair)]

    def summary(self, stage: str) -> Summary | None:
        """Returns the `Summary` of a stage, or of `LORA_SWAP`, over all rounds, ms a call; None if not measured."""
        rounds = self.rounds(stage)
        return summarize_rounds(rounds) if rounds else None

    def swap_summary(self, direction: Literal["set", "reset", "again"]) -> Summary | None:
        """Returns the `Summary` of the swaps in one direction, ms a swap, or None where it was not measured."""
        rounds = [samples for samples in self.lora_swap_ms.get(direction, []) if samples]
        return summarize_rounds(rounds) if rounds else None

    @property
    def images_per_s(self) -> float | None:
        """Pictures a second, end to end."""
        whole = self.summary("end_to_end")
        return 1000 * self.batch / whole.median if whole else None

    @property
    def peak_mib(self) -> float:
        """Peak memory where the model runs: the GPU's, else the process's."""
        return self.cuda_peak_mib or self.peak_rss_mib


def measure(suite: Suite, artifacts: Artifacts, journal: Journal, report: Reporter = SILENT) -> list[Latency]:
    """Returns a `Latency` for each scenario of the suite, in its order.

    A scenario that dies is recorded as failed, and the others go on.

    Args:
        suite: what is measured.
        artifacts: what `prepare_artifacts` returned.
        journal: runs each case in its own process and keeps the outcomes.
        report: shows progress.
    """
    from .scenario_timer import time_case  # it imports torch, which readers of results do not need

    scenarios = list(suite.scenarios())
    rounds: dict[str, list[dict[str, Any]]] = {scenario.key: [] for scenario in scenarios}
    ready = {scenario.key: find_artifacts(scenario, artifacts) for scenario in scenarios}
    failed = {key: found["failed"] for key, found in ready.items() if "failed" in found}
    with report.task("measuring latency", suite.rounds * len(scenarios)) as advance:
        for number in range(suite.rounds):
            for scenario in scenarios:
                if scenario.key not in failed:
                    case, name = case_of(scenario, suite, artifacts), f"latency {scenario.key} {number}"
                    outcome = journal.call(name, time_case, case, suite.scenario_timeout_s)
                    if "failed" in outcome:
                        failed[scenario.key] = outcome["failed"]
                    else:
                        rounds[scenario.key].append(outcome)
                advance(note=scenario.key)
    return [_combine(s, rounds[s.key], failed.get(s.key), ready[s.key].get("build_s")) for s in scenarios]


def case_of(scenario: Scenario, suite: Suite, artifacts: Artifacts) -> dict[str, Any]:
    """Returns a scenario as plain values, for `time_case`.

    Args:
        scenario: what is timed.
        suite: gives the prompts, the seed and the budgets.
        artifacts: what `prepare_artifacts` returned.
    """
    prompts = [suite.prompts[i % len(suite.prompts)].caption for i in range(scenario.batch)]
    return {
        "path": str(scenario.model.path),
        "decoder": scenario.model.decoder and str(scenario.model.decoder),
        "loras": scenario.model.weighted_loras,
        "backend": scenario.setup.backend,
        "artifacts": find_artifacts(scenario, artifacts).get("artifacts"),
        "precision": scenario.setup.precision,
        "size_px": scenario.size_px,
        "batch": scenario.batch,
        "unet_batch": scenario.unet_batch,
        "steps": scenario.model.sampling.steps,
        "guidance_scale": scenario.model.sampling.guidance_scale,
        "prompts": prompts,
        "seed": suite.seed,
        "samples": suite.samples,
        "end_to_end_samples": suite.end_to_end_samples,
        "stage_budget_s": suite.stage_budget_s,
        "device": suite.device,
        "threads": suite.threads,
    }


def _combine(scenario: Scenario, rounds: list[dict[str, Any]], failed: str | None, build_s: float | None) -> Latency:
    facts: dict[str, Any] = {
        "key": scenario.key,
        "model": scenario.model.name,
        "backend": scenario.setup.backend,
        "precision": scenario.setup.precision,
        "size_px": scenario.size_px,
        "batch": scenario.batch,
        "unet_batch": scenario.unet_batch,
        "steps": scenario.model.sampling.steps,
        "guidance_scale": scenario.model.sampling.guidance_scale,
    }
    if failed:
        return Latency(**facts, failed=failed)
    return Latency(
        **facts,
        samples_ms={stage: [r["samples_ms"][stage] for r in rounds] for stage in STAGES},
        load_ms=[r["load_ms"] for r in rounds],
        first_image_ms=[r["first_image_ms"] for r in rounds],
        peak_rss_mib=max(r["peak_rss_mib"] for r in rounds),
        cuda_peak_mib=max((r["cuda_peak_mib"] for r in rounds if r["cuda_peak_mib"] is not None), default=None),
        artifact_mib=rounds[0]["artifact_mib"],
        build_s=build_s,
        threads=rounds[0]["threads"],
        unsteady=sorted({stage for r in rounds for stage in r["unsteady"]}),
        lora_swap_ms=_by_direction([r["lora_swap_ms"] for r in rounds if "lora_swap_ms" in r]),
    )


def _by_direction(rounds: list[dict[Any, list[float]]]) -> dict[Any, Rounds]:
    return {direction: [of_round[direction] for of_round in rounds] for direction in (rounds[0] if rounds else ())}
