"""How long each part of a pipeline takes and how much memory it needs, every scenario in a process of its own.

Why a process: a runtime's arenas, thread pools and compiled kernels outlive the pipeline that made them, and a crash or an
out-of-memory must cost one row and not the report. Scenarios take turns (A B C, A B C, ...) and only one is alive at a time, so a
machine that warms up or is shared slows all of them alike. Timed, after a warm-up that lasts until calls are steady:

    unet_step     one UNet call as sampling makes it: 2·batch latents under classifier-free guidance
    text_encoder  `batch` captions of 77 tokens (a guided picture does this twice: prompt and empty prompt)
    vae_decode    `batch` latents to pixels
    end_to_end    captions to PIL pictures at `steps` steps

On a GPU the first three are timed by CUDA events; everything else, and everything on a CPU, by the wall clock. The child's last
line on stdout is its result as JSON: `python -m sdcompress_bench.latency CASE.json`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import SdCompressError
from sdcompress_engines.progress import SILENT, Reporter

from .scenario import Scenario, Suite
from .stats import Summary, summarize

STAGES = ("unet_step", "text_encoder", "vae_decode", "end_to_end")
_STEADY = 1.10
_WARM_UP_CALLS = 20


@dataclass(frozen=True)
class Latency:
    """What was measured of one scenario, over all rounds.

    Attributes:
        precision: what was asked of PyTorch; on other backends what the graph is in.
        samples_ms: stage → for each round the raw samples, ms a call.
        load_ms: for each round, from a finished import to a pipeline ready to run.
        first_image_ms: for each round, the first `batch` pictures after loading.
        peak_rss_mib: highest resident memory of the process over the rounds.
        cuda_peak_mib: highest of PyTorch's reserved memory and of what the whole process took of the device; None on a CPU.
        artifact_mib: component → MiB on the backend's side: weights in PyTorch, files elsewhere.
        threads: CPU threads PyTorch ran with.
        unsteady: stages whose warm-up ended before calls were within 10% of each other.
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
    threads: int = 0
    unsteady: list[str] = field(default_factory=list)
    failed: str | None = None

    def summary(self, stage: str) -> Summary | None:
        """The stage's `Summary` over all rounds, ms a call; None where it was not measured."""
        samples = [sample for of_round in self.samples_ms.get(stage, []) for sample in of_round]
        return summarize(samples) if samples else None

    @property
    def images_per_s(self) -> float | None:
        """Pictures a second, end to end."""
        whole = self.summary("end_to_end")
        return 1000 * self.batch / whole.median if whole else None

    @property
    def peak_mib(self) -> float:
        """Peak memory where the model runs: the GPU's, else the process's."""
        return self.cuda_peak_mib or self.peak_rss_mib


def measure(suite: Suite, report: Reporter = SILENT) -> list[Latency]:
    """A `Latency` for each scenario of the suite, in its order. A scenario that dies is recorded as failed and the others go on."""
    scenarios = list(suite.scenarios())
    rounds: dict[str, list[dict[str, Any]]] = {scenario.key: [] for scenario in scenarios}
    failed: dict[str, str] = {}
    unprepared = {(s.model.name, s.backend): s for s in scenarios if s.backend != "torch" and s.model.artifacts(s.backend) is None}
    if unprepared:
        with report.task("preparing graphs", len(unprepared)) as advance:
            for scenario in unprepared.values():
                outcome = run_child(scenario, suite, prepare=True)
                if "failed" in outcome:
                    failed |= {s.key: outcome["failed"] for s in scenarios if (s.model.name, s.backend) == (scenario.model.name, scenario.backend)}
                advance(note=scenario.key)
    with report.task("measuring latency", suite.rounds * len(scenarios)) as advance:
        for _ in range(suite.rounds):
            for scenario in scenarios:
                if scenario.key not in failed:
                    outcome = run_child(scenario, suite)
                    if "failed" in outcome:
                        failed[scenario.key] = outcome["failed"]
                    else:
                        rounds[scenario.key].append(outcome)
                advance(note=scenario.key)
    return [_combine(scenario, rounds[scenario.key], failed.get(scenario.key)) for scenario in scenarios]


def run_child(scenario: Scenario, suite: Suite, prepare: bool = False) -> dict[str, Any]:
    """One process for one scenario: its outcome, or `{"failed": reason}` where it raised, was killed, or ran out of time.

    With `prepare` the process only loads the pipeline, so that an export into the cache happens outside of what is timed.
    """
    prompts = [suite.prompts[i % len(suite.prompts)].caption for i in range(scenario.batch)]
    case = {
        "path": str(scenario.model.path), "backend": scenario.backend, "artifacts": _text(scenario.model.artifacts(scenario.backend)), "precision": scenario.precision,
        "size_px": scenario.size_px, "batch": scenario.batch, "unet_batch": scenario.unet_batch, "steps": scenario.steps, "guidance_scale": scenario.guidance_scale,
        "prompts": prompts, "seed": suite.seed, "samples": suite.samples, "end_to_end_samples": suite.end_to_end_samples, "stage_budget_s": suite.stage_budget_s,
        "device": suite.device, "threads": suite.threads, "prepare": prepare,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sdcompress-bench-") as folder:
        file = Path(folder) / "case.json"
        file.write_text(json.dumps(case))
        environment = os.environ | ({"OMP_NUM_THREADS": str(suite.threads)} if suite.threads else {})
        command = [sys.executable, "-m", "sdcompress_bench.latency", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=suite.scenario_timeout_s, env=environment)
        except subprocess.TimeoutExpired:
            return {"failed": f"took over {suite.scenario_timeout_s:g} s"}
    if done.returncode < 0:
        cause = "; out of memory is the usual cause" if -done.returncode == signal.SIGKILL else ""
        return {"failed": f"its process was ended by {signal.Signals(-done.returncode).name}{cause}"}
    if done.returncode or not done.stdout.strip():
        tail = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        return {"failed": f"its process ended with status {done.returncode}: {tail}".replace(str(Path.home()), "~")}
    return json.loads(done.stdout.splitlines()[-1])


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _combine(scenario: Scenario, rounds: list[dict[str, Any]], failed: str | None) -> Latency:
    facts: dict[str, Any] = {
        "key": scenario.key, "model": scenario.model.name, "backend": scenario.backend, "precision": scenario.precision, "size_px": scenario.size_px,
        "batch": scenario.batch, "unet_batch": scenario.unet_batch, "steps": scenario.steps, "guidance_scale": scenario.guidance_scale,
    }  # fmt: skip
    if failed:
        return Latency(**facts, failed=failed)
    return Latency(
        **facts | {"precision": rounds[0]["precision"]},
        samples_ms={stage: [r["samples_ms"][stage] for r in rounds] for stage in STAGES},
        load_ms=[r["load_ms"] for r in rounds],
        first_image_ms=[r["first_image_ms"] for r in rounds],
        peak_rss_mib=max(r["peak_rss_mib"] for r in rounds),
        cuda_peak_mib=max((r["cuda_peak_mib"] for r in rounds if r["cuda_peak_mib"] is not None), default=None),
        artifact_mib=rounds[0]["artifact_mib"],
        threads=rounds[0]["threads"],
        unsteady=sorted({stage for r in rounds for stage in r["unsteady"]}),
    )


def _child(case: dict[str, Any]) -> dict[str, Any]:
    """Everything measured in this process; see `Latency` for the figures."""
    import torch

    from sdcompress.pipeline import generate

    from .fidelity import load, precision_of

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    cuda = case["device"].startswith("cuda")
    free_before = torch.cuda.mem_get_info()[0] if cuda else 0
    started = time.perf_counter()
    pipeline = load(case["path"], case["backend"], case["artifacts"], case["device"], case["precision"])
    load_ms = _since(started)
    if case["prepare"]:
        return {}
    size, batch, unet = case["size_px"], case["batch"], pipeline.unet
    seeds = [case["seed"] + i for i in range(batch)]

    def end_to_end() -> None:
        generate(pipeline, case["prompts"], seeds=seeds, steps=case["steps"], guidance_scale=case["guidance_scale"], size_px=size, batch_size=batch)

    started = time.perf_counter()
    end_to_end()
    first_image_ms = _since(started)

    side = size // pipeline.vae_scale_factor
    noise = torch.Generator().manual_seed(case["seed"])
    ids = pipeline.tokenizer(case["prompts"], padding="max_length", max_length=pipeline.tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids.to(unet.device)
    with torch.inference_mode():
        context = pipeline.text_encoder(ids)[0].to(unet.dtype)
        context = torch.cat([context] * (case["unet_batch"] // batch)).clone()
        latents = torch.randn(case["unet_batch"], unet.config.in_channels, side, side, generator=noise).to(unet.device, unet.dtype)
        moment = torch.tensor(501, device=unet.device)
        calls: dict[str, Callable[[], Any]] = {
            "unet_step": lambda: unet(latents, moment, encoder_hidden_states=context, return_dict=False),
            "text_encoder": lambda: pipeline.text_encoder(ids),
            "vae_decode": lambda: pipeline.vae.decode(latents[:batch], return_dict=False),
        }
        samples, unsteady = {}, []
        for stage, call in calls.items():
            steady = _warm_up(call, cuda, case["stage_budget_s"] / 2)
            samples[stage] = list(_samples(call, cuda, case["samples"], 3, case["stage_budget_s"]))
            if not steady:
                unsteady.append(stage)
    # The first picture was the warm-up of the whole way.
    samples["end_to_end"] = list(_samples(end_to_end, False, case["end_to_end_samples"], 1, case["stage_budget_s"]))
    cuda_peak = max(torch.cuda.max_memory_reserved(), free_before - torch.cuda.mem_get_info()[0]) / 2**20 if cuda else None
    return {
        "precision": precision_of(pipeline), "samples_ms": samples, "unsteady": unsteady, "load_ms": load_ms, "first_image_ms": first_image_ms, "peak_rss_mib": _peak_rss_mib(), "cuda_peak_mib": cuda_peak,
        "artifact_mib": {name: round(_size_mib(getattr(pipeline, name)), 3) for name in ("unet", "text_encoder", "vae")}, "threads": torch.get_num_threads(),
    }  # fmt: skip


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


def _peak_rss_mib() -> float:
    """Highest resident memory of this process. Linux's getrusage would carry the parent's peak across exec, so /proc comes first."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next((int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:")), 0.0)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _size_mib(component: Any) -> float:
    """Weights of a torch module; files of a graph and its external data."""
    import torch

    if isinstance(component, torch.nn.Module) and any(True for _ in component.parameters()):
        return sum(tensor.nbytes for tensor in component.state_dict().values()) / 2**20
    path = getattr(getattr(component, "runner", None), "path", None)
    return sum(file.stat().st_size for file in Path(path).parent.glob(f"{Path(path).name}*")) / 2**20 if path else 0.0


def main() -> None:
    """The child: reads the case named on its command line and prints its outcome as the last line."""
    case = json.loads(Path(sys.argv[1]).read_text())
    try:
        outcome = _child(case)
    except (SdCompressError, RuntimeError, ValueError, OSError, ImportError, MemoryError) as error:
        name = "" if isinstance(error, SdCompressError) else f"{type(error).__name__}: "
        outcome = {"failed": f"{name}{' '.join(str(error).split())[:400]}".replace(str(Path.home()), "~")}
    print(f"\n{json.dumps(outcome)}")


if __name__ == "__main__":
    main()
