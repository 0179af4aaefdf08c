"""`auto` is the fastest of the backends that agree with torch. It is measured once and remembered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_bench.build_suite import choose_backends
from sdcompress_engines.errors import BackendMissing

from sdcompress.backends import fastest as fastest_module
from sdcompress.backends.fastest import Candidate, Measured, candidates, find_fastest, has_fast_bf16, measure_backends
from sdcompress.backends.fastest_worker import time_candidate

TORCH, ORT, HALF = Candidate("torch", "fp32"), Candidate("onnxruntime", "fp32"), Candidate("torch", "bf16")


def test_candidates_begin_with_the_one_all_are_compared_with() -> None:
    measured = candidates("cpu")
    assert measured[0] == TORCH
    assert ORT in measured
    assert (HALF in measured) == has_fast_bf16()


@pytest.mark.parametrize("providers", [["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]])
def test_onnxruntime_is_a_candidate_on_a_gpu_only_where_it_has_cuda(
    providers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    has_cuda = len(providers) == 2
    assert ("onnxruntime" in [candidate.backend for candidate in candidates("cuda")]) == has_cuda
    setups, skipped = choose_backends(("torch", "ort"), "cuda", "fp16")
    assert [setup.backend for setup in setups] == (["torch", "onnxruntime"] if has_cuda else ["torch"])
    reason = skipped.get("ONNX Runtime", "")
    assert ("runs on the CPU only" in reason and "sdcompress[gpu]" in reason) != has_cuda


@pytest.mark.slow
def test_backends_are_measured_in_processes_of_their_own(random_folder: Path) -> None:
    measured = {m.candidate: m for m in measure_backends(random_folder, [TORCH, ORT, HALF])}
    assert measured[TORCH].relative_l2 == 0
    assert all((m.unet_step_ms or 0) > 0 and m.failed is None for m in measured.values())
    assert 0 < (measured[ORT].relative_l2 or 0) < 1e-4
    assert 1e-3 < (measured[HALF].relative_l2 or 0) < 0.1


def answer(case: dict[str, Any], ms: float, error: float) -> dict[str, Any]:
    torch.save(torch.ones(8) * (1 + error), case["answer"])
    return {"ms": [ms, ms, ms]}


def test_the_fastest_that_is_exact_enough_wins_and_is_remembered(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ONNX Runtime is the fastest and wrong; bfloat16 is faster than fp32 and right. The answers of the processes are
    stand-ins.
    """
    figures = {
        "torch fp32": (100.0, 0.0),
        "onnxruntime fp32": (10.0, 1e-3),
        "torch bf16": (50.0, 3e-3),
        "aot bf16": (40.0, 7e-3),
    }
    asked = []

    def child(case: dict[str, Any]) -> dict[str, Any]:
        asked.append(case["backend"])
        return answer(case, *figures[f"{case['backend']} {case['precision']}"])

    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(fastest_module, "time_in_process", child)
    monkeypatch.setattr(fastest_module, "candidates", lambda device: [TORCH, ORT, HALF, Candidate("aot", "bf16")])
    assert find_fastest(random_folder) == ("torch", "bf16")  # aot is off by more than twice what torch is in bfloat16
    assert len(asked) == 4
    assert find_fastest(random_folder) == ("torch", "bf16")
    assert len(asked) == 4
    (kept,) = tmp_path.rglob("auto-cpu.json")
    known = json.loads(kept.read_text())
    assert [m["failed"] is None for m in known["measured"]] == [True, False, True, False]
    kept.write_text(json.dumps(known | {"key": {"device": "another"}}))
    find_fastest(random_folder)
    assert len(asked) == 8


def test_a_backend_without_a_limit_does_not_count(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch does not run in bfloat16, and AOTInductor's output there is not a number."""
    figures = {"torch fp32": (100.0, 0.0), "aot bf16": (40.0, float("nan"))}

    def child(case: dict[str, Any]) -> dict[str, Any]:
        name = f"{case['backend']} {case['precision']}"
        return answer(case, *figures[name]) if name in figures else {"failed": "out of memory"}

    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(fastest_module, "time_in_process", child)
    monkeypatch.setattr(fastest_module, "candidates", lambda device: [TORCH, HALF, Candidate("aot", "bf16")])
    assert find_fastest(random_folder) == ("torch", "fp32")
    (kept,) = tmp_path.rglob("auto-cpu.json")
    assert "torch in bf16 did not run" in json.loads(kept.read_text())["measured"][2]["failed"]


def test_a_backend_that_dies_is_left_out_and_none_at_all_is_an_error(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(fastest_module, "candidates", lambda device: [TORCH, ORT])
    monkeypatch.setattr(
        fastest_module,
        "time_in_process",
        lambda case: (
            answer(case, 5.0, 0.0) if case["backend"] == "torch" else {"failed": "its process ended with status -9"}
        ),
    )
    assert find_fastest(random_folder) == ("torch", "fp32")
    monkeypatch.setattr(fastest_module, "machine_key", lambda device: {"device": "new"})
    monkeypatch.setattr(fastest_module, "time_in_process", lambda case: {"failed": "its process ended with status -9"})
    with pytest.raises(BackendMissing, match="no backend ran this model"):
        find_fastest(random_folder)


def test_short_steps_are_timed_often_enough(random_folder: Path, tmp_path: Path) -> None:
    case = {
        "model": str(random_folder),
        "backend": "torch",
        "precision": "fp32",
        "device": "cpu",
        "batch": 1,
        "samples": 3,
        "answer": str(tmp_path / "answer.pt"),
    }
    times = time_candidate(case)["ms"]
    assert sum(times) > 500 or len(times) == 200  # 3 samples of a slow machine may be half a second


def test_a_child_that_cannot_start_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    (m,) = measure_backends(tmp_path / "nowhere", [TORCH])
    assert isinstance(m, Measured)
    assert "nowhere" in str(m.failed)


def test_a_model_without_guidance_is_measured_with_one_sample(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It draws with one a step, and an engine of it takes no more."""
    few = tmp_path / "few"
    shutil.copytree(random_folder, few)
    index = json.loads((few / "model_index.json").read_text())
    (few / "model_index.json").write_text(json.dumps(index | {"_num_inference_steps": 4, "_guidance_scale": 1.0}))
    batches = []

    def measure(model: Any, chosen: Any, **settings: Any) -> list[Measured]:
        batches.append(settings["batch"])
        return [Measured(TORCH, 1.0, 0.0, 1e-4)]

    monkeypatch.setattr(fastest_module, "measure_backends", measure)
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "cache"))
    for folder in (random_folder, few):
        assert find_fastest(folder) == ("torch", "fp32")
    assert batches == [2, 1]
