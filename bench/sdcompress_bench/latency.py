"""How long each part of a pipeline takes and how much memory it needs, every scenario in a process of its own.

Why a process: a runtime's arenas, thread pools and compiled kernels outlive the pipeline that made them, and a crash or
an out-of-memory must cost one row and not the report. Scenarios take turns (A B C, A B C, ...) and only one is alive at
a time, so a machine that warms up or is shared slows all of them alike. Timed, after a warm-up that lasts until calls
are steady:

    unet_step     one UNet call as sampling makes it: 2·batch latents under classifier-free guidance
    text_encoder  `batch` captions (a guided picture does this twice: prompt and empty prompt)
    vae_decode    `batch` latents to pixels
    end_to_end    captions to PIL pictures at `steps` steps

On a GPU the first three are timed by CUDA events; everything else, and everything on a CPU, by the wall clock.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import EngineError
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.resources import peak_rss_mib
from sdcompress_engines.signature import CONTEXT_TOKENS

from .environment import gpu_memory_used_mib
from .journal import Journal
from .scenario import ModelUnderTest, Scenario, Suite, Way
from .stats import Summary, summarize_rounds

STAGES = ("unet_step", "text_encoder", "vae_decode", "end_to_end")
_STEADY = 1.10
_WARM_UP_CALLS = 20


@dataclass(frozen=True)
class Latency:
    """What was measured of one scenario, over all rounds.

    Attributes:
        samples_ms: stage → for each round the raw samples, ms a call.
        load_ms: for each round, from a finished import to a pipeline ready to run.
        first_image_ms: for each round, the first `batch` pictures after loading.
        peak_rss_mib: highest resident memory of the process over the rounds.
        cuda_peak_mib: CUDA context, and the higher of PyTorch's reserved memory and of what the process took of the
            device; None on a CPU.
        artifact_mib: component → MiB on the backend's side: weights in PyTorch, files elsewhere.
        build_s: what making the graphs, the package or the engine took, whenever that was; None where there is nothing
            to make.
        threads: CPU threads PyTorch ran with.
        unsteady: stages whose warm-up ended before calls were within 10% of each other.
        roofline: share of what this device reached at best, as `work.roofline` gives it for the UNet step; empty where
            not counted.
        failed: why there are no figures, None where there are.
    """

    key: str
    model: str
    backend: str
    precision: str
    size_px: int
    batch: int
    unet_batch: int
    steps: int
    guidance_scale: float
    samples_ms: dict[str, list[list[float]]] = field(default_factory=dict)
    load_ms: list[float] = field(default_factory=list)
    first_image_ms: list[float] = field(default_factory=list)
    peak_rss_mib: float = 0.0
    cuda_peak_mib: float | None = None
    artifact_mib: dict[str, float] = field(default_factory=dict)
    build_s: float | None = None
    threads: int = 0
    unsteady: list[str] = field(default_factory=list)
    roofline: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None

    @property
    def way(self) -> Way:
        return Way(self.backend, self.precision)

    def summary(self, stage: str) -> Summary | None:
        """The stage's `Summary` over all rounds, ms a call; None where it was not measured."""
        rounds = [of_round for of_round in self.samples_ms.get(stage, []) if of_round]
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


def measure(
    suite: Suite, made: Mapping[tuple[str, Way], Mapping[str, Any]], journal: Journal, report: Reporter = SILENT
) -> list[Latency]:
    """A `Latency` for each scenario of the suite, in its order.

    A scenario that dies is recorded as failed and the others go on.

    Args:
        made: what `prepare` gave for each model and way.
    """
    scenarios = list(suite.scenarios())
    rounds: dict[str, list[dict[str, Any]]] = {scenario.key: [] for scenario in scenarios}
    ready = {scenario.key: made_for(scenario, made) for scenario in scenarios}
    failed = {key: found["failed"] for key, found in ready.items() if "failed" in found}
    with report.task("measuring latency", suite.rounds * len(scenarios)) as advance:
        for number in range(suite.rounds):
            for scenario in scenarios:
                if scenario.key not in failed:
                    outcome = journal.call(
                        f"latency {scenario.key} {number}",
                        time_case,
                        case_of(scenario, suite, made),
                        suite.scenario_timeout_s,
                    )
                    if "failed" in outcome:
                        failed[scenario.key] = outcome["failed"]
                    else:
                        rounds[scenario.key].append(outcome)
                advance(note=scenario.key)
    return [_combine(s, rounds[s.key], failed.get(s.key), ready[s.key].get("build_s")) for s in scenarios]


def prepare(suite: Suite, journal: Journal, report: Reporter = SILENT) -> dict[tuple[str, Way], dict[str, Any]]:
    """Returns for each model and way what it runs from: `{"artifacts", "build_s"}`, or `{"failed": reason}`.

    None of it is timed later.

    TensorRT gets one engine for pictures and probes, and under `static` one for each timed shape alone, the fastest
    there is.
    """
    made: dict[tuple[str, Way], dict[str, Any]] = {}
    wanted = [(model, way) for model in suite.models for way in suite.ways]
    with report.task("preparing graphs", len(wanted)) as advance:
        for model, way in wanted:
            advance(0, note=f"{model.name}, {way}")
            made[model.name, way] = {} if way.backend in ("torch", "compile") else _prepare(suite, model, way, journal)
            advance()
    return made


def _prepare(suite: Suite, model: ModelUnderTest, way: Way, journal: Journal) -> dict[str, Any]:
    given = model.artifacts(way.backend)
    case: dict[str, Any] = {
        "path": str(model.path),
        "backend": way.backend,
        "precision": way.precision,
        "device": suite.device,
        "artifacts": None if given is None else str(given),
        "profiles": [],
    }
    if way.backend != "tensorrt" or given is not None:
        return journal.call(f"prepare {model.name} {way}", make_artifacts, case, suite.scenario_timeout_s)
    whole = case | {"profiles": [picture_profile(suite)]}
    found = journal.call(f"prepare {model.name} {way}", make_artifacts, whole, suite.scenario_timeout_s)
    if "failed" in found:
        return found
    static = {}
    for scenario in suite.scenarios():
        if (scenario.model, scenario.way) == (model, way):
            name, only = _shape_name(scenario), case | {"profiles": [static_profile(scenario)]}
            static[name] = journal.call(
                f"prepare {model.name} {way} {name}", make_artifacts, only, suite.scenario_timeout_s
            )
    return found | {"static": static}


def _shape_name(scenario: Scenario) -> str:
    return f"{scenario.size_px}px-{scenario.batch}"


def static_profile(scenario: Scenario) -> str:
    """Returns the engine profile that takes the timed shape of a scenario and no other."""
    return f"batch={scenario.unet_batch},pictures={scenario.batch},height={scenario.size_px},width={scenario.size_px},tokens={CONTEXT_TOKENS}"


def picture_profile(suite: Suite) -> str:
    """Returns the engine profile that takes the pictures of a suite, in batches of any size up to its own, and its
    probes.
    """
    pictures = max(1, min(suite.quality_batch, max(suite.pictures, suite.quality_pictures)))
    calls = pictures * (2 if suite.guidance_scale > 1 else 1)
    most, size = max(calls, suite.probes), suite.sizes_px[0]
    return f"batch=1:{calls}:{most},pictures=1:{pictures}:{pictures},height={size},width={size},tokens={CONTEXT_TOKENS}"


def made_for(scenario: Scenario, made: Mapping[tuple[str, Way], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns what a scenario runs from: where there is one, the engine for its shape alone."""
    found = made[scenario.model.name, scenario.way]
    static: Mapping[str, Any] = found.get("static", {}).get(_shape_name(scenario), found)
    return static


def make_artifacts(case: dict[str, Any]) -> dict[str, Any]:
    """The folder (of an AOTInductor package, too) that a way runs from, made now where it is not there, and the seconds
    that making it took then.
    """
    from sdcompress_engines.manifest import read_manifest

    from sdcompress.backends.cached import cached_artifacts
    from sdcompress.export.aot import cached_package
    from sdcompress.models.load import load_pipeline

    folder = Path(case["artifacts"]) if case["artifacts"] else None
    if folder is None and case["backend"] == "aot":
        folder = cached_package(load_pipeline(case["path"]), case["device"], case["precision"]).parent
    folder = folder or cached_artifacts(case["path"], case["backend"], case["precision"], profiles=case["profiles"])
    manifest = read_manifest(folder)
    figures = manifest.figures if manifest else {}
    parts = [figures, *(part for part in figures.values() if isinstance(part, dict))]
    seconds = [part["seconds"] for part in parts if isinstance(part.get("seconds"), int | float)]
    return {"artifacts": str(folder), "build_s": sum(seconds) if seconds else None}


def case_of(scenario: Scenario, suite: Suite, made: Mapping[tuple[str, Way], Mapping[str, Any]]) -> dict[str, Any]:
    """A scenario as plain values, for `time_case`."""
    prompts = [suite.prompts[i % len(suite.prompts)].caption for i in range(scenario.batch)]
    return {
        "path": str(scenario.model.path),
        "backend": scenario.way.backend,
        "artifacts": made_for(scenario, made).get("artifacts"),
        "precision": scenario.way.precision,
        "size_px": scenario.size_px,
        "batch": scenario.batch,
        "unet_batch": scenario.unet_batch,
        "steps": scenario.steps,
        "guidance_scale": scenario.guidance_scale,
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
        "backend": scenario.way.backend,
        "precision": scenario.way.precision,
        "size_px": scenario.size_px,
        "batch": scenario.batch,
        "unet_batch": scenario.unet_batch,
        "steps": scenario.steps,
        "guidance_scale": scenario.guidance_scale,
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
    )


def time_case(case: dict[str, Any]) -> dict[str, Any]:
    """Everything measured in this process; see `Latency` for the figures.

    Raises:
        EngineError: an output that is not finite.
    """
    import torch

    from sdcompress.sampling import generate

    from .fidelity import UNetInputs, load

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    cuda = case["device"].startswith("cuda")
    used_before = gpu_memory_used_mib() if cuda else None  # before there is a context, which counts too
    free_before = torch.cuda.mem_get_info()[0] if cuda else 0
    started = time.perf_counter()
    pipeline = load(case["path"], case["backend"], case["artifacts"], case["device"], case["precision"])
    load_ms = _since(started)
    size, batch, unet = case["size_px"], case["batch"], pipeline.unet
    seeds = [case["seed"] + i for i in range(batch)]

    def end_to_end() -> None:
        generate(
            pipeline,
            case["prompts"],
            seeds=seeds,
            steps=case["steps"],
            guidance_scale=case["guidance_scale"],
            size_px=size,
            batch_size=batch,
        )

    gc.collect()
    started = time.perf_counter()
    end_to_end()
    first_image_ms = _since(started)

    with torch.no_grad():  # as in `generate`: a compiled UNet would be compiled again for another mode
        inputs = UNetInputs.of(pipeline, case["prompts"], size).repeated(case["unet_batch"] // batch)
        side = size // pipeline.vae_scale_factor
        latents = torch.randn(
            case["unet_batch"],
            unet.config.in_channels,
            side,
            side,
            generator=torch.Generator().manual_seed(case["seed"]),
        ).to(unet.device, unet.dtype)
        moment = torch.tensor(501, device=unet.device)
        encode = _text_encoder(pipeline, case["prompts"])
        calls: dict[str, Callable[[], Any]] = {
            "unet_step": lambda: inputs.call(unet, latents, moment),
            "text_encoder": encode,
            "vae_decode": lambda: pipeline.vae.decode(latents[:batch].to(pipeline.vae.dtype), return_dict=False)[0],
        }
        samples, unsteady = {}, []
        for stage, call in calls.items():
            last: list[torch.Tensor] = []

            def kept(call: Callable[[], Any] = call, last: list[torch.Tensor] = last) -> None:
                last[:] = [call()]

            steady = _warm_up(kept, cuda, case["stage_budget_s"] / 2)
            samples[stage] = list(
                _samples(kept, cuda, case["samples"], 3 if stage == "unet_step" else 1, case["stage_budget_s"])
            )
            if not steady:
                unsteady.append(stage)
            if not torch.isfinite(last[0]).all():
                raise EngineError(
                    f"the {stage.replace('_', ' ')} gives values that are not finite in {case['precision']}",
                    hint="fp32, or bf16 where the device has it",
                )
    # The first picture was the warm-up of the whole way.
    samples["end_to_end"] = list(_samples(end_to_end, False, case["end_to_end_samples"], 1, case["stage_budget_s"]))
    cuda_peak = _cuda_peak_mib(used_before, free_before) if cuda else None
    return {
        "samples_ms": samples,
        "unsteady": unsteady,
        "load_ms": load_ms,
        "first_image_ms": first_image_ms,
        "peak_rss_mib": peak_rss_mib(),
        "cuda_peak_mib": cuda_peak,
        "artifact_mib": {
            name: round(_size_mib(getattr(pipeline, name)), 3) for name in ("unet", "text_encoder", "vae")
        },
        "threads": torch.get_num_threads(),
    }


def _cuda_peak_mib(used_before_mib: float | None, free_before: int) -> float:
    """Returns the most of the GPU's memory that this process held, MiB.

    Args:
        used_before_mib: in use before the process had a context; None leaves the context out.
        free_before: free bytes after that.
    """
    import torch

    taken = (free_before - torch.cuda.mem_get_info()[0]) / 2**20
    used = gpu_memory_used_mib()
    context = 0.0 if used is None or used_before_mib is None else max(0.0, used - used_before_mib - taken)
    return context + max(torch.cuda.max_memory_reserved() / 2**20, taken)


def _text_encoder(pipeline: Any, captions: list[str]) -> Callable[[], Any]:
    """A call of the text encoder on captions already made tokens; of SDXL, of both, one after the other."""
    from .fidelity import tokens

    second = getattr(pipeline, "text_encoder_2", None)
    ids = tokens(pipeline.tokenizer, captions, pipeline.unet.device)
    if second is None:
        return lambda: pipeline.text_encoder(ids)[0]
    ids_2 = tokens(pipeline.tokenizer_2, captions, pipeline.unet.device)
    return lambda: (pipeline.text_encoder(ids), second(ids_2)[0])[1]


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


def _time(call: Callable[[], Any], cuda: bool) -> float:
    """Milliseconds of one call."""
    if not cuda:
        started = time.perf_counter()
        call()
        return _since(started)
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _warm_up(call: Callable[[], Any], cuda: bool, budget_s: float) -> bool:
    """Call until three in a row are within 10% of each other (True), or the budget ends first (False)."""
    recent: list[float] = []
    started = time.perf_counter()
    for _ in range(_WARM_UP_CALLS):
        recent = [*recent[-2:], _time(call, cuda)]
        if len(recent) == 3 and max(recent) <= _STEADY * min(recent):
            return True
        if time.perf_counter() - started > budget_s:
            break
    return False


def _samples(call: Callable[[], Any], cuda: bool, count: int, least: int, budget_s: float) -> Iterator[float]:
    started = time.perf_counter()
    for index in range(count):
        if index >= least and time.perf_counter() - started > budget_s:
            return
        yield _time(call, cuda)


def _size_mib(component: Any) -> float:
    """Weights of a torch module; files of a graph and its external data."""
    import torch

    component = getattr(getattr(component, "runner", None), "module", component)  # of a compiled UNet, the module
    if isinstance(component, torch.nn.Module) and any(True for _ in component.parameters()):
        return sum(tensor.nbytes for tensor in component.state_dict().values()) / 2**20
    path = getattr(getattr(component, "runner", None), "path", None)
    return sum(file.stat().st_size for file in Path(path).parent.glob(f"{Path(path).name}*")) / 2**20 if path else 0.0
