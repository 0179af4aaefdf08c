"""What runs on this machine: the installation checked, each backend proved against torch, and what mends the rest."""

from __future__ import annotations

import itertools
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from sdcompress_engines.errors import UsageError
from sdcompress_engines.exactness import FP32_LIMIT, HALF_FACTOR, relative_l2
from sdcompress_engines.flavour import FLAVOURS
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.backends import registry
from sdcompress.backends.anonymous import anonymize
from sdcompress.backends.fastest import machine_key
from sdcompress.backends.installation import (
    IMPORTED_BY_DIFFUSERS,
    NEEDED_BYTES,
    Check,
    Driver,
    check_installation,
    find_driver,
    import_fault,
)
from sdcompress.backends.proof import REFERENCE, SMALL, WHOLE, Case, Proof, answer_file
from sdcompress.backends.registry import aliases, find_backend
from sdcompress.export.aot import package_folder
from sdcompress.export.components import Precision
from sdcompress.models.locate import BUILT_IN, display_name, hash_pipeline, locate_pipeline

Status = Literal["works", "builds", "fails", "unfinished", "not here"]
"""`builds`: an engine that no card here runs; `unfinished`: the time was over; `not here`: not for this machine."""
MINUTES, LONG_MINUTES = 2.0, 60.0
"""How long the checks may take: of nano, and of a whole model or with `full`."""
_CLOSING_S = 6.0  # kept of that for starting Python and for the end
_AT_ONCE = 4


@dataclass(frozen=True)
class BackendResult:
    """What one backend did.

    Attributes:
        subject: `whole`, the model's UNet, or `small`, one with the same operators and few of them.
        unet_step_ms: median time of one UNet call, one picture under guidance.
        speedup: over torch on the same UNet, in the same run.
        relative_l2: of its answer to torch's in IEEE fp32; `limit`: what that may be.
        built_s, built_mib, cards: of an engine that was built ahead, and the compute capabilities it can be built for.
        reason: why it does not work, or is not for this machine. command: what mends it.
        seconds: that the proof took.
    """

    backend: str
    device: str
    precision: str
    subject: str
    status: Status
    unet_step_ms: float | None = None
    speedup: float | None = None
    relative_l2: float | None = None
    limit: float | None = None
    built_s: float | None = None
    built_mib: float | None = None
    cards: str | None = None
    reason: str | None = None
    command: str | None = None
    seconds: float = 0.0

    @property
    def healthy(self) -> bool:
        """Whether nothing about it has to be mended."""
        return self.status in ("works", "builds", "not here")


@dataclass(frozen=True)
class Diagnosis:
    """All that was found; nothing in it names a person, a machine or a path.

    Attributes:
        model: a built-in's name, or the file's or folder's.
        parameters: of the model's UNet; None where torch did not answer.
        machine: what the figures hold for, by name: system, python, processor, threads, cores, load
            (of the minute before), memory_gib, cards, driver.
        packages: name → installed version.
        seconds: that all took.
    """

    model: str
    parameters: int | None
    machine: dict[str, Any]
    packages: dict[str, str]
    checks: list[Check]
    backends: list[BackendResult]
    seconds: float = field(default=0.0)

    @property
    def healthy(self) -> bool:
        """Whether every check passes and every backend that this machine can have works."""
        return all(check.ok for check in self.checks) and all(result.healthy for result in self.backends)

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain values, all finite."""
        return {"healthy": self.healthy} | asdict(self)


def examine(
    model: str | Path = "nano",
    backends: Sequence[str] = (),
    *,
    full: bool = False,
    minutes: float | None = None,
    report: Reporter = SILENT,
) -> Diagnosis:
    """Returns what works on this machine, with the reason and the command for what does not.

    Args:
        model: what `load_pipeline` takes. Only of a built-in model are `compile` and `aot` proved on a small UNet.
        backends: names or aliases of those to prove; by default all. torch always runs, as all are compared with it.
        full: prove every backend on the whole UNet.
        minutes: for all together; what is not proved then is `unfinished`. By default 2 for a built-in model, else 60.

    Raises:
        UsageError, ModelError: no such model or backend.
    """
    started = time.monotonic()
    chosen = tuple(dict.fromkeys(("torch", *map(full_name, backends)))) if backends else provable()
    folder = locate_pipeline(model)
    whole = full or str(model) not in BUILT_IN
    minutes = (LONG_MINUTES if whole else MINUTES) if minutes is None else minutes
    deadline = started + 60 * minutes - _CLOSING_S
    load, driver = psutil.getloadavg()[0], find_driver()
    checks = check_installation(driver, max(NEEDED_BYTES, 3 * _size(folder)))
    report.say(f"proving {', '.join(chosen)}: at most {minutes:g} minutes")
    with (
        _writable_cache(checks),
        tempfile.TemporaryDirectory(prefix="sdcompress-doctor-", ignore_cleanup_errors=True) as work,
    ):
        cases, absent = plan_cases(str(model), chosen, driver, checks, whole, work)
        again = f"sdcompress doctor{'' if str(model) in BUILT_IN else ' --model MODEL'} --minutes {5 * minutes:g}"
        proved, parameters = _prove(cases, deadline, whole, again, report)
    order = {name: index for index, name in enumerate(provable())}
    results = sorted([*proved, *absent], key=lambda result: order[result.backend])
    machine = machine_key("cpu")
    facts = {
        "system": _system(),
        "python": platform.python_version(),
        "processor": machine["device"],
        "threads": machine["threads"],
        "cores": _cores(),
        "load": round(load, 1),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cards": _cards(),
        "driver": driver.version if driver else None,
    }
    return Diagnosis(
        str(model) if str(model) in BUILT_IN else anonymize(display_name(folder)),
        parameters,
        {name: anonymize(value) if isinstance(value, str) else value for name, value in facts.items()},
        machine["versions"],
        [replace(check, text=anonymize(check.text), command=_clean(check.command)) for check in checks],
        [
            replace(each, reason=each.reason and anonymize(each.reason), command=_clean(each.command))
            for each in results
        ],
        round(time.monotonic() - started, 1),
    )


def provable() -> tuple[str, ...]:
    """Returns the names of what can be proved: each backend, and TensorRT by its flavors."""
    names = (FLAVOURS if backend.artifact == "engine" else (backend.name,) for backend in registry.backends().values())
    return tuple(itertools.chain.from_iterable(names))


def full_name(backend: str) -> str:
    """Returns the full name of a backend given by name or alias.

    Raises:
        UsageError: there is no such backend.
    """
    name = aliases().get(backend, backend)
    if name not in provable():
        raise UsageError(f"no backend {backend!r}", expected=f"one of {', '.join([*provable(), *aliases()])}")
    return name


def plan_cases(
    model: str, chosen: Sequence[str], driver: Driver | None, checks: Sequence[Check], whole: bool, work: str
) -> tuple[list[Case], list[BackendResult]]:
    """Returns the cases to prove, torch's first, and the results of those that need no process.

    Args:
        whole: no small UNets. work: the folder for answers.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Precision = "fp16" if device == "cuda" else "fp32"
    cases: list[Case] = []
    absent: list[BackendResult] = []
    for backend in chosen[1:]:
        if backend == "tensorrt" and device == "cpu":
            absent.append(_without_card(backend, driver, checks))
            continue
        small = not whole and (
            backend == "compile" or (backend == "aot" and not _has_package(model, device, precision))
        )
        cases.append(Case(model, backend, device, precision, (SMALL if small else WHOLE,), work))
        if backend == "onnxruntime" and device == "cuda" and model in BUILT_IN:
            cases.append(Case(model, backend, "cpu", "fp32", (WHOLE if whole else SMALL,), work))
    subjects = tuple(dict.fromkeys((WHOLE, *(case.subjects[0] for case in cases))))
    cases.insert(0, Case(model, "torch", device, precision, subjects, work))
    if import_fault(IMPORTED_BY_DIFFUSERS):  # told as a fault of the packages; the backends answer for themselves
        cases = [
            each if each.backend == "onnxruntime" else replace(each, hidden=(IMPORTED_BY_DIFFUSERS,)) for each in cases
        ]
    return cases, absent


def _has_package(model: str, device: str, precision: Precision) -> bool:
    return (package_folder(hash_pipeline(locate_pipeline(model)), device, precision) / "unet.pt2").is_file()


def _without_card(backend: str, driver: Driver | None, checks: Sequence[Check]) -> BackendResult:
    """The result of a backend that needs a GPU, where torch sees none."""
    if driver is None:
        return BackendResult(
            backend, "cuda", "fp16", WHOLE, "not here", reason="runs on an NVIDIA GPU, and none is here"
        )
    card = next(check for check in checks if check.name == "card")
    return BackendResult(
        backend, "cuda", "fp16", WHOLE, "fails", reason="torch does not see the card", command=card.command
    )


def _prove(
    cases: Sequence[Case], deadline: float, whole: bool, again: str, report: Reporter
) -> tuple[list[BackendResult], int | None]:
    """Prove torch, then the others; returns their results, and the parameters of the UNet.

    They prepare side by side and are timed one after the other. A whole model, and plain TensorRT, which chooses its
    kernels by timing them, have the machine to themselves.

    Args:
        again: the command that gives what was not finished more time, without the backend's name.
    """
    proofs = [Proof(case, deadline) for case in cases]
    with (
        report.task("proving backends", total=len(cases)) as advance,
        ThreadPoolExecutor(max_workers=min(_AT_ONCE, _cores())) as pool,
        ExitStack() as stack,
    ):
        for proof in proofs:
            stack.callback(proof.close)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # first of all, when the block is interrupted
        outcome = proofs[0].finish()
        advance(note="torch")
        if "ms" not in outcome:
            reason = "torch did not answer, and every backend is compared with it"
            outcomes = [outcome, *({"unfinished": reason} for _ in proofs[1:])]
            return [_result(*each, {}, again) for each in zip(proofs, outcomes, strict=True)], None
        torch_ms: dict[str, float] = outcome["ms"]
        if whole and proofs[1:]:
            report.say(_estimate(outcome["parameters"], torch_ms[WHOLE], len(proofs) - 1))

        def prepare(proof: Proof) -> None:
            proof.prepare()
            advance(note=proof.case.backend)

        results = [_result(proofs[0], outcome, torch_ms, again)]
        together = [] if whole else [proof for proof in proofs[1:] if proof.case.backend != "tensorrt"]
        list(pool.map(prepare, together))
        for proof in proofs[1:]:
            results.append(_result(proof, proof.finish(), torch_ms, again))
            if proof not in together:
                advance(note=proof.case.backend)
        return results, outcome["parameters"]


def _estimate(parameters: int, torch_ms: float, count: int) -> str:
    step = f"{torch_ms / 1000:,.1f} s" if torch_ms >= 1000 else f"{torch_ms:,.0f} ms"
    size = f"a UNet of {parameters / 1e6:,.0f} M parameters, {step} a step in torch"
    return f"{size}; {count} more to prove, each of which first exports, compiles or builds it: minutes each"


def _result(proof: Proof, outcome: Mapping[str, Any], torch_ms: Mapping[str, float], again: str) -> BackendResult:
    case = proof.case
    subject = case.subjects[0]
    blank = BackendResult(case.backend, case.device, case.precision, subject, "fails", seconds=round(proof.seconds, 1))
    if "not_here" in outcome:
        return replace(blank, status="not here", reason=outcome["not_here"])
    if "unfinished" in outcome:
        command = f"{again} --backend {case.backend}"
        return replace(blank, status="unfinished", reason=outcome["unfinished"], command=command)
    if "failed" in outcome:
        return replace(blank, reason=outcome["failed"], command=outcome.get("command") or _reinstall(case))
    if "built_s" in outcome:
        mib = round(outcome["bytes"] / 2**20, 1)
        return replace(blank, status="builds", built_s=outcome["built_s"], built_mib=mib, cards=outcome["cards"])
    error, limit = _error(case, subject)
    ms = outcome["ms"][subject]
    fits = error is not None and limit is not None and error <= limit
    found = replace(
        blank,
        status="works" if fits else "fails",
        unet_step_ms=ms,
        speedup=torch_ms[subject] / ms,
        relative_l2=error,
        limit=limit,
    )
    if fits:
        return found
    off = "is not finite" if error is None else f"is off by a relative L2 of {error:.1e}, over {limit:.1e}"
    return replace(found, reason=f"its answer {off}", command=_reinstall(case))


def _error(case: Case, subject: str) -> tuple[float | None, float | None]:
    """The relative L2 of an answer to torch's in IEEE fp32, and the limit of it; None for what is not finite."""

    def distance(path: Path) -> float | None:
        found = relative_l2(torch.load(path, weights_only=True), reference)
        return found if math.isfinite(found) else None

    reference = torch.load(answer_file(case.folder, REFERENCE, subject), weights_only=True)
    if case.precision == "fp32":
        return distance(case.answer(subject)), FP32_LIMIT
    floor = distance(replace(case, backend="torch").answer(subject))
    return distance(case.answer(subject)), None if floor is None else HALF_FACTOR * floor


def _reinstall(case: Case) -> str:
    if case.backend in FLAVOURS:
        package = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}[case.backend]
    else:
        package = find_backend(case.backend).package
    if package == "onnxruntime" and case.device != "cpu":
        package = "onnxruntime-gpu"
    return f"pip install --force-reinstall {package}"


def _clean(command: str | None) -> str | None:
    return command and anonymize(command, names=False)


@contextmanager
def _writable_cache(checks: Sequence[Check]) -> Iterator[None]:
    """The user's cache for the block, or a temporary one where that cannot be used: then only the check reports it."""
    if next(check for check in checks if check.name == "cache").ok:
        yield
        return
    before = os.environ.get("SDCOMPRESS_CACHE")
    with tempfile.TemporaryDirectory(prefix="sdcompress-cache-", ignore_cleanup_errors=True) as folder:
        os.environ["SDCOMPRESS_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["SDCOMPRESS_CACHE"]
            else:
                os.environ["SDCOMPRESS_CACHE"] = before


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cards() -> list[str]:
    """Name, compute capability and memory of each GPU that torch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [
        f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:,.0f} GiB"
        for card in found
    ]


def _system() -> str:
    name = f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}"
    if sys.platform != "linux":
        return name
    try:
        return f"{platform.freedesktop_os_release().get('PRETTY_NAME', 'Linux')}, {name}"
    except OSError:
        return name
