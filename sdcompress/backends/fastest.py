"""The fastest backend for a model on this machine, by measurement.

Each backend runs in a process of its own. Only those inside the accuracy gate count.
"""

from __future__ import annotations

import json
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
from sdcompress_engines.manifest import cache_folder
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.signature import check_unet_inputs

from sdcompress.backends.machine import machine_key
from sdcompress.backends.registry import backends
from sdcompress.backends.subjects import BATCH
from sdcompress.export.components import Precision
from sdcompress.families.sampling_defaults import read_defaults

SAMPLES = 3
"""The least number of timed calls. Short steps are timed more often, because three of a few milliseconds vary a lot."""

_LONGEST_S = 1800


@dataclass(frozen=True)
class Candidate:
    """A backend in a precision."""

    backend: str
    precision: Precision

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}"


REFERENCE = Candidate("torch", "fp32")
"""The candidate with which all others are compared."""


@dataclass(frozen=True)
class Measured:
    """The measurement of one candidate.

    Attributes:
        candidate: the backend and precision.
        unet_step_ms: median time of one UNet call, after one that is not counted; None where it failed.
        relative_l2: of its output, against torch in fp32.
        limit: the largest `relative_l2` that is accepted.
        failed: why there is no figure, or why it does not count.
    """

    candidate: Candidate
    unet_step_ms: float | None = None
    relative_l2: float | None = None
    limit: float | None = None
    failed: str | None = None

    def __str__(self) -> str:
        text = f"{self.candidate!s:<18} "
        if self.unet_step_ms is not None:
            text += f"{self.unet_step_ms:8.1f} ms a UNet step, relative L2 {self.relative_l2:.1e}"
        return text + (f"  left out: {self.failed}" if self.failed else "")


def candidates(device: str) -> list[Candidate]:
    """Returns the backends and precisions to measure on a device, torch in fp32 first."""
    kind = torch.device(device).type
    others = [
        Candidate(backend.name, precision)
        for backend in backends().values()
        for precision in backend.auto.get(kind, ())
        if (precision != "bf16" or kind != "cpu" or has_fast_bf16()) and backend.missing(kind) is None
    ]
    return [REFERENCE, *sorted(others, key=lambda candidate: candidate.precision != "fp32")]


def has_fast_bf16() -> bool:
    """Returns whether this CPU multiplies bfloat16 itself (AVX512-BF16 or AMX); others are slower than in float32."""
    return bool(torch.cpu._is_avx512_bf16_supported()) or bool(torch.cpu._is_amx_tile_supported())


def find_fastest(model: str | Path, *, device: str = "cpu", report: Reporter = SILENT) -> tuple[str, Precision]:
    """Returns the backend and precision of the fastest UNet step that is exact enough.

    It is measured once for a model, a machine and a set of versions, and then remembered.

    Args:
        model: a name, a path or a hub id.
        device: `cpu`, `cuda` or `cuda:N`.
        report: gets the figures.

    Raises:
        UsageError, ModelError: the model. BackendMissing: not even torch ran it.
    """
    from sdcompress.models.locate import hash_pipeline, locate_pipeline, read_model_index, read_unet_config

    unet_config, folder = read_unet_config(model), locate_pipeline(model)
    check_unet_inputs(unet_config)
    digest = hash_pipeline(folder)
    path = cache_folder() / "models" / digest[:16] / f"auto-{torch.device(device).type}.json"
    key = machine_key(device)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["key"] == key:
            return known["backend"], known["precision"]
    except (OSError, ValueError, KeyError):
        pass
    batch = 1 if read_defaults(read_model_index(folder), unet_config).is_guidance_free else BATCH
    measured = measure_backends(model, candidates(device), device=device, batch=batch, report=report)
    best = _choose_fastest(measured, str(model))
    for each in measured:
        report.show_line(f"  {each}")
    report.show_line(f"fastest here: {best}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"key": key, **asdict(best), "measured": [asdict(each) for each in measured]}
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    return best.backend, best.precision


def _choose_fastest(measured: Sequence[Measured], model: str) -> Candidate:
    sound = [each for each in measured if each.unet_step_ms is not None and each.failed is None]
    if not sound:
        failures = "; ".join(f"{each.candidate}: {each.failed}" for each in measured)
        raise BackendMissing(f"no backend ran this model: {failures}", where=model)
    return min(sound, key=lambda each: each.unet_step_ms or 0.0).candidate


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
    """Time a UNet step of each candidate at the model's own size, in processes of their own, one after the other.

    Args:
        model: a name, a path or a hub id.
        chosen: the first must be torch in fp32, with which the others are compared.
        device: `cpu`, `cuda` or `cuda:N`.
        batch: samples of a UNet call.
        samples: the least number of timed calls; short ones are timed more often.
        rounds: how often each candidate is started, in turn; the median is over all samples.
        report: gets the progress.
    """
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in chosen}
    outputs: dict[Candidate, torch.Tensor] = {}
    failed: dict[Candidate, str] = {}
    with (
        tempfile.TemporaryDirectory(prefix="sdcompress-auto-") as folder,
        report.task("measuring backends", rounds * len(chosen)) as advance,
    ):
        for candidate in [*chosen] * rounds:
            if candidate not in failed:
                answer = Path(folder) / f"{candidate.backend}-{candidate.precision}.pt"
                case = {"model": str(model), **asdict(candidate), "device": device}
                outcome = time_in_process(case | {"batch": batch, "samples": samples, "answer": str(answer)})
                if "failed" in outcome:
                    failed[candidate] = outcome["failed"]
                else:
                    times[candidate] += outcome["ms"]
                    outputs[candidate] = torch.load(answer, weights_only=True)
            advance(note=str(candidate))
    return [_judge(candidate, times[candidate], outputs, failed.get(candidate)) for candidate in chosen]


def _judge(
    candidate: Candidate, times: Sequence[float], outputs: dict[Candidate, torch.Tensor], failed: str | None
) -> Measured:
    """Returns the measurement of a candidate, with its error and the limit of the error.

    Args:
        candidate: the backend and precision.
        times: of its calls, in ms.
        outputs: of all candidates that ran.
        failed: why it did not run, or None.
    """
    reference = outputs.get(REFERENCE)
    if failed or reference is None:
        return Measured(candidate, failed=failed or "torch in fp32 did not answer")
    error = relative_l2(outputs[candidate], reference)
    floor = outputs.get(Candidate("torch", candidate.precision))
    limit = None if floor is None else HALF_FACTOR * relative_l2(floor, reference)
    if candidate.precision == "fp32":
        limit = FP32_LIMIT
    median = statistics.median(times)
    if limit is None:
        no_limit = f"torch in {candidate.precision} did not run, so there is no limit"
        return Measured(candidate, median, error, None, no_limit)
    over = None if error <= limit else f"relative L2 {error:.1e} is over {limit:.1e}"
    return Measured(candidate, median, error, limit, over)


def time_in_process(case: dict[str, Any]) -> dict[str, Any]:
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
