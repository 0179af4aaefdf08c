"""Results that are not comparable with torch, and the command that gives an unfinished backend more time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.progress import SILENT

from sdcompress.backends import doctor, prove
from sdcompress.backends.diagnosis import BackendResult
from sdcompress.backends.installation import Check
from sdcompress.backends.proof import REFERENCE, Case, Proof, answer_file
from sdcompress.backends.prove import judge_proof, prove_backends
from sdcompress.backends.subjects import WHOLE
from sdcompress.cli.doctor import print_diagnosis


def save_outputs(case: Case, error: float, torch_error: float) -> None:
    """Write the outputs of torch in fp32, of torch in the case's precision, and of the case."""
    exact = torch.ones(1000, dtype=torch.float64)
    torch.save(exact, answer_file(case.folder, REFERENCE, WHOLE))
    torch.save(exact * (1 + torch_error), replace(case, backend="torch").answer(WHOLE))
    torch.save(exact * (1 + error), case.answer(WHOLE))


def test_a_backend_fails_if_torch_overflows_in_its_precision(tmp_path: Path) -> None:
    case = Case("nano", "onnxruntime", "cuda", "fp16", (WHOLE,), str(tmp_path))
    save_outputs(case, error=1e-3, torch_error=float("nan"))
    result = judge_proof(Proof(case, 0), {"ms": {WHOLE: 2.0}}, {WHOLE: 3.0}, "sdcompress doctor")
    assert result.status == "fails"
    assert result.reason == "its output has no limit, because the output of torch in fp16 is not finite"


class FinishedProof:
    """Stands for a proof whose process has ended: torch takes 10 ms a step, every other backend 40 ms."""

    seconds = 1.0

    def __init__(self, case: Case, deadline: float) -> None:
        self.case = case

    def prepare(self) -> None: ...

    def close(self) -> None: ...

    def finish(self) -> dict[str, Any]:
        return {"ms": {WHOLE: 10.0 if self.case.backend == "torch" else 40.0}, "parameters": 1}


def test_the_speed_on_a_cpu_is_not_compared_with_torch_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_case = Case("nano", "torch", "cuda", "fp16", (WHOLE,), str(tmp_path))
    on_gpu = replace(torch_case, backend="onnxruntime")
    on_cpu = replace(on_gpu, device="cpu", precision="fp32")
    for case in (on_gpu, on_cpu):
        save_outputs(case, error=0.0, torch_error=1e-3)
    monkeypatch.setattr(prove, "Proof", FinishedProof)
    results, _ = prove_backends([torch_case, on_gpu, on_cpu], 0, False, "sdcompress doctor", SILENT)
    assert [result.speedup for result in results] == [1.0, 0.25, None]
    machine = {"system": "", "python": "", "processor": "", "threads": 1, "memory_gib": 1.0, "cards": [], "driver": ""}
    print_diagnosis(doctor.Diagnosis("nano", 1, machine | {"load": 0.0, "cores": 1}, {}, [CACHE], results))
    assert capsys.readouterr().out.count("times as fast as torch") == 1


CACHE = Check("cache", True, "can be written to")


@pytest.mark.parametrize(
    ("model", "full", "command"),
    [
        ("nano", False, "sdcompress doctor --minutes 10"),
        ("nano", True, "sdcompress doctor --full --minutes 300"),
        ("nano-tiny", False, "sdcompress doctor --model nano-tiny --minutes 10"),
    ],
)
def test_the_command_for_more_time_tests_the_same_unet(
    model: str, full: bool, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    def record(
        cases: Sequence[Case], deadline: float, whole: bool, again: str, report: object
    ) -> tuple[list[BackendResult], None]:
        given.append(again)
        return [], None

    monkeypatch.setattr(doctor, "prove_backends", record)
    monkeypatch.setattr(doctor, "check_installation", lambda *_: [CACHE])
    doctor.examine(model, ["torch"], full=full)
    assert given == [command]
