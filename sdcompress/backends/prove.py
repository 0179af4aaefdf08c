"""Proving backends: each runs a UNet in a process of its own, and its output is compared with torch's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.exactness import FP32_LIMIT, HALF_FACTOR, relative_l2
from sdcompress_engines.flavour import TENSORRT
from sdcompress_engines.progress import Advance, Reporter

from sdcompress.backends.diagnosis import BackendResult
from sdcompress.backends.machine import core_count
from sdcompress.backends.proof import REFERENCE, Case, Proof, answer_file
from sdcompress.backends.proof_plan import provable
from sdcompress.backends.subjects import WHOLE

_MOST_AT_ONCE = 4


def prove_backends(
    cases: Sequence[Case], deadline: float, whole: bool, again: str, report: Reporter
) -> tuple[list[BackendResult], int | None]:
    """Prove torch, then the others. Returns their results, and the number of parameters of the UNet.

    Backends are prepared side by side and timed one after the other. A whole model has the machine to itself, and so
    has TensorRT, which chooses its kernels by timing them.

    Args:
        cases: torch's first.
        deadline: on the clock of `time.monotonic`.
        whole: whether every backend runs the whole UNet.
        again: the command that gives an unfinished backend more time, without its name.
        report: gets the progress.
    """
    proofs = [Proof(case, deadline) for case in cases]
    with (
        report.task("testing backends", total=len(cases)) as advance,
        ThreadPoolExecutor(max_workers=min(_MOST_AT_ONCE, core_count())) as pool,
        ExitStack() as stack,
    ):
        for proof in proofs:
            stack.callback(proof.close)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # first of all, when the block is interrupted
        reference = proofs[0].finish()
        advance(note="torch")
        if "ms" not in reference:
            reason = "torch did not answer, and every backend is compared with it"
            outcomes = [reference, *({"unfinished": reason} for _ in proofs[1:])]
            return [judge_proof(*each, {}, again) for each in zip(proofs, outcomes, strict=True)], None
        torch_ms: dict[str, float] = reference["ms"]
        if whole and proofs[1:]:
            report.show_line(_estimate(reference["parameters"], torch_ms[WHOLE], len(proofs) - 1))
        outcomes = _finish_proofs(proofs[1:], pool, whole, advance)
    results = [
        judge_proof(proof, outcome, torch_ms if proof.case.device == cases[0].device else {}, again)
        for proof, outcome in zip(proofs, [reference, *outcomes], strict=True)
    ]
    return results, reference["parameters"]


def _finish_proofs(
    proofs: Sequence[Proof], pool: ThreadPoolExecutor, whole: bool, advance: Advance
) -> list[dict[str, Any]]:
    """Prepare and time these proofs. Returns their outcomes.

    Args:
        proofs: of all backends but torch.
        pool: runs those that are prepared side by side.
        whole: whether every backend has the machine to itself.
        advance: called when one is prepared.
    """

    def prepare(proof: Proof) -> None:
        proof.prepare()
        advance(note=proof.case.backend)

    together = [] if whole else [proof for proof in proofs if proof.case.backend != TENSORRT.name]
    list(pool.map(prepare, together))
    outcomes = []
    for proof in proofs:
        outcomes.append(proof.finish())
        if proof not in together:
            advance(note=proof.case.backend)
    return outcomes


def _estimate(parameters: int, torch_ms: float, count: int) -> str:
    step = f"{torch_ms / 1000:,.1f} s" if torch_ms >= 1000 else f"{torch_ms:,.0f} ms"
    size = f"a UNet of {parameters / 1e6:,.0f} M parameters, {step} a step in torch"
    return f"{size}; {count} more to test, each of which is first exported, compiled or built: minutes each"


def judge_proof(proof: Proof, outcome: Mapping[str, Any], torch_ms: Mapping[str, float], again: str) -> BackendResult:
    """Returns the result of a proof.

    Args:
        proof: finished.
        outcome: see `Proof.finish`.
        torch_ms: subject → time of a step in torch on the same device; empty where torch did not run there.
        again: the command that gives an unfinished backend more time, without its name.
    """
    case = proof.case
    subject = case.subjects[0]
    blank = BackendResult(case.backend, case.device, case.precision, subject, "fails", seconds=round(proof.seconds, 1))
    if "not_here" in outcome:
        return replace(blank, status="not here", reason=outcome["not_here"])
    if "unfinished" in outcome:
        command = f"{again} --backend {case.backend}"
        return replace(blank, status="unfinished", reason=outcome["unfinished"], command=command)
    if "failed" in outcome:
        return replace(blank, reason=outcome["failed"], command=outcome.get("command") or _reinstall_command(case))
    if "built_s" in outcome:
        mib = round(outcome["bytes"] / 2**20, 1)
        return replace(blank, status="builds", built_s=outcome["built_s"], built_mib=mib, cards=outcome["cards"])
    ms = outcome["ms"][subject]
    speedup = torch_ms[subject] / ms if subject in torch_ms else None
    return _judge_output(case, replace(blank, unet_step_ms=ms, speedup=speedup))


def _judge_output(case: Case, result: BackendResult) -> BackendResult:
    """Returns the result with the error of the case's output, its limit and the status that follows from them."""
    error, limit = _measure_error(case, result.subject)
    measured = replace(result, relative_l2=error, limit=limit)
    if error is not None and limit is not None and error <= limit:
        return replace(measured, status="works")
    if error is None:
        off = "is not finite"
    elif limit is None:
        off = f"has no limit, because the output of torch in {case.precision} is not finite"
    else:
        off = f"is off by a relative L2 of {error:.1e}, over {limit:.1e}"
    return replace(measured, reason=f"its output {off}", command=_reinstall_command(case))


def _measure_error(case: Case, subject: str) -> tuple[float | None, float | None]:
    """Returns the relative L2 of an output against torch in IEEE fp32, and its limit; None for what is not finite."""
    reference = torch.load(answer_file(case.folder, REFERENCE, subject), weights_only=True)

    def measure(path: Path) -> float | None:
        error = relative_l2(torch.load(path, weights_only=True), reference)
        return error if math.isfinite(error) else None

    if case.precision == "fp32":
        return measure(case.answer(subject)), FP32_LIMIT
    floor = measure(replace(case, backend="torch").answer(subject))
    return measure(case.answer(subject)), None if floor is None else HALF_FACTOR * floor


def _reinstall_command(case: Case) -> str:
    package = provable()[case.backend].package_for(case.backend, case.device)
    return f"pip install --force-reinstall {package}"
