"""Which backend is fastest for a model on this machine, by measurement, each in a process of its own; only those inside
the accuracy gate count.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.child_process import explain_exit, run_job
from sdcompress_engines.errors import BackendMissing, storage_errors
from sdcompress_engines.exactness import FP32_LIMIT, HALF_FACTOR, relative_l2
from sdcompress_engines.files import write_atomically
from sdcompress_engines.manifest import cache_folder, installed_versions
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.backends.registry import backends
from sdcompress.export.components import Precision

SAMPLES = 3
"""Timed calls at the least; more until `_LEAST_MS` of them, as three steps of milliseconds say little."""

BATCH = 2
"""One picture under guidance."""

_LONGEST_S = 1800


@dataclass(frozen=True)
class Candidate:
    """A backend in a precision."""

    backend: str
    precision: Precision

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}"


@dataclass(frozen=True)
class Measured:
    """What one candidate did.

    Attributes:
        unet_step_ms: median time of one UNet call, after one that is not counted; None where it failed.
        relative_l2: of its answer to torch's in fp32. limit: what that may be.
        failed: why there is no figure, or why it does not count.
    """

    candidate: Candidate
    unet_step_ms: float | None = None
    relative_l2: float | None = None
    limit: float | None = None
    failed: str | None = None


def candidates(device: str) -> list[Candidate]:
    """Returns the backends and precisions to measure on a device, torch in fp32 first.

    All others are compared with torch in fp32.
    """
    kind = torch.device(device).type
    reference = Candidate("torch", "fp32")
    others = [
        Candidate(backend.name, precision)
        for backend in backends().values()
        for precision in backend.auto.get(kind, ())
        if (precision != "bf16" or kind != "cpu" or has_fast_bf16()) and backend.missing(kind) is None
    ]
    return [reference, *sorted(others, key=lambda candidate: candidate.precision != "fp32")]


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX512-BF16 or AMX); without that it is slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported()) or bool(torch.cpu._is_amx_tile_supported())


def find_fastest(model: str | Path, *, device: str = "cpu", report: Reporter = SILENT) -> tuple[str, Precision]:
    """The backend and precision of the fastest UNet step that is exact enough; measured once for a model, machine and
    set of versions, then remembered.

    Raises:
        UsageError, ModelError: the model. BackendMissing: not even torch answered.
    """
    from sdcompress.models.locate import hash_pipeline, locate_pipeline

    digest = hash_pipeline(locate_pipeline(model))
    path = cache_folder() / "models" / digest[:16] / f"auto-{torch.device(device).type}.json"
    key = machine_key(device)
    try:
        known = json.loads(path.read_text())
        if known["key"] == key:
            return known["backend"], known["precision"]
    except (OSError, ValueError, KeyError):
        pass
    measured = measure_backends(model, candidates(device), device=device, report=report)
    sound = [m for m in measured if m.unet_step_ms is not None and m.failed is None]
    if not sound:
        raise BackendMissing(
            f"no backend ran this model: {'; '.join(f'{m.candidate}: {m.failed}' for m in measured)}", where=str(model)
        )
    best = min(sound, key=lambda m: m.unet_step_ms or 0.0)
    for m in measured:
        report.say(
            f"  {m.candidate!s:<18} "
            + (
                f"{m.unet_step_ms:8.1f} ms a UNet step, relative L2 {m.relative_l2:.1e}"
                if m.unet_step_ms is not None
                else ""
            )
            + (f"  left out: {m.failed}" if m.failed else "")
        )
    report.say(f"fastest here: {best.candidate}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "key": key,
            "backend": best.candidate.backend,
            "precision": best.candidate.precision,
            "measured": [asdict(m) for m in measured],
        }
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    return best.candidate.backend, best.candidate.precision


def machine_key(device: str) -> dict[str, Any]:
    """What a measurement holds for: the device, its threads and the installed versions."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "versions": installed_versions()}


def _cpu_name() -> str:
    try:
        return next(
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure_backends(
    model: str | Path,
    chosen: Sequence[Candidate],
    *,
    device: str = "cpu",
    batch: int = BATCH,
    samples: int = SAMPLES,
    rounds: int = 1,
    report: Reporter = SILENT,
) -> list[Measured]:
    """Time a UNet step of each candidate in processes of their own, one after the other, at the model's own size.

    The first candidate must be torch in fp32, to which the answers are compared.

    Args:
        batch: latents of the call. samples: timed calls at the least; more where they are short. rounds: how often each
            is started, in turn; the median is over all samples.
    """
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in chosen}
    answers: dict[Candidate, torch.Tensor] = {}
    failed: dict[Candidate, str] = {}
    with (
        tempfile.TemporaryDirectory(prefix="sdcompress-auto-") as folder,
        report.task("measuring backends", rounds * len(chosen)) as advance,
    ):
        for _ in range(rounds):
            for candidate in chosen:
                answer = Path(folder) / f"{candidate.backend}-{candidate.precision}.pt"
                if candidate not in failed:
                    outcome = _in_child(
                        {
                            "model": str(model),
                            **asdict(candidate),
                            "device": device,
                            "batch": batch,
                            "samples": samples,
                            "answer": str(answer),
                        }
                    )
                    if "failed" in outcome:
                        failed[candidate] = outcome["failed"]
                    else:
                        times[candidate] += outcome["ms"]
                        answers[candidate] = torch.load(answer, weights_only=True)
                advance(note=str(candidate))
    return [_judged(candidate, times[candidate], answers, failed.get(candidate)) for candidate in chosen]


def _judged(
    candidate: Candidate, times: Sequence[float], answers: dict[Candidate, torch.Tensor], failed: str | None
) -> Measured:
    reference = answers.get(Candidate("torch", "fp32"))
    if failed or reference is None:
        return Measured(candidate, failed=failed or "torch in fp32 did not answer")
    error = relative_l2(answers[candidate], reference)
    floor = answers.get(Candidate("torch", candidate.precision))
    limit = (
        FP32_LIMIT
        if candidate.precision == "fp32"
        else None
        if floor is None
        else HALF_FACTOR * relative_l2(floor, reference)
    )
    over = f"relative L2 {error:.1e} is over {limit:.1e}" if limit is not None and not error <= limit else None
    return Measured(candidate, statistics.median(times), error, limit, over)


def _in_child(case: dict[str, Any]) -> dict[str, Any]:
    """Time one candidate in a process of its own. Returns `ms`, the samples, or `failed`, the reason."""
    outcome: dict[str, Any] = {}
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    ending = run_job(
        "sdcompress.backends.fastest_worker", case, outcome.update, environment=threads, timeout_s=_LONGEST_S
    )
    if ending.timed_out:
        return {"failed": f"took over {_LONGEST_S / 60:.0f} minutes"}
    if ending.status == 0 and outcome:
        return outcome
    return {"failed": explain_exit(ending.status, ending.output)}
