"""A fault of an installation is reported with the command that repairs it, and no text names a person or a machine."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest
import torch
from onnx import TensorProto, helper
from sdcompress_engines.builder import build_engine
from sdcompress_engines.command import command_line
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.errors import UsageError
from sdcompress_engines.flavour import TENSORRT_RTX, platform_name
from sdcompress_engines.profiles import Profile
from sdcompress_engines.store import EngineStore

from sdcompress.backends import installation
from sdcompress.backends.anonymous import anonymize
from sdcompress.backends.diagnosis import Diagnosis
from sdcompress.backends.doctor import examine
from sdcompress.backends.installation import (
    Check,
    Driver,
    check_cache,
    check_card,
    check_packages,
    check_store,
    find_driver,
)
from sdcompress.backends.proof import REFERENCE, Case, Proof, answer_file
from sdcompress.backends.proof_plan import full_name, plan_proofs, provable
from sdcompress.backends.prove import judge_proof
from sdcompress.backends.subjects import SMALL, WHOLE, load_subject

needs_rtx = pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")
needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")


@pytest.fixture
def zaphod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The home of a user zaphod on a machine heartofgold."""
    home = tmp_path / "zaphod"
    home.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "zaphod")
    monkeypatch.setattr(platform, "node", lambda: "heartofgold.example.org")
    monkeypatch.delenv("SDCOMPRESS_CACHE", raising=False)
    return home


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("{home}/.cache/sdcompress/unet.onnx: is damaged", "~/.cache/sdcompress/unet.onnx: is damaged"),
        ("cannot open /opt/zaphod/lib/libcudart.so.13", "cannot open .../libcudart.so.13"),
        ("File '/data/my models/zaphod.ckpt' (line 3)", "File '.../USER.ckpt' (line 3)"),
        ('File "/usr/lib/python3.11/site.py", line 1', 'File ".../site.py", line 1'),
        (r"DLL load failed: D:\work\zaphod\torch\c10.dll", "DLL load failed: .../c10.dll"),
        (r"read \\heartofgold\share\model.safetensors", "read .../model.safetensors"),
        ("user zaphod on heartofgold.example.org has no rights", "user USER on HOST has no rights"),
        ("/tmp/torchinductor_zaphod", ".../torchinductor_USER"),
        ("see https://example.org/a/b.html, 1/2 of 3 and/or 4", "see https://example.org/a/b.html, 1/2 of 3 and/or 4"),
        ("zaphodesque {home}x", "zaphodesque .../zaphodx"),
        ("pip install 'sdcompress[cpu]' && rm -r ~/x", "pip install 'sdcompress[cpu]' && rm -r ~/x"),
    ],
)
def test_text_to_paste_names_no_person_machine_or_path(zaphod: Path, text: str, clean: str) -> None:
    assert anonymize(text.format(home=zaphod)) == clean


def test_the_cache_folder_keeps_a_name_that_can_be_typed(
    zaphod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "store"))
    assert anonymize(f"rm -r {tmp_path}/store/models/ab", names=False) == "rm -r $SDCOMPRESS_CACHE/models/ab"


def install(folder: Path, name: str, version: str) -> None:
    """A package's metadata, as pip leaves it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_this_installation_has_what_it_asks_for() -> None:
    assert check_packages(False) == Check("packages", True, "as sdcompress requires")


@pytest.mark.parametrize(("has_driver", "extra"), [(False, "cpu"), (True, "gpu")])
def test_two_onnx_runtimes_are_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_driver: bool, extra: str
) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        install(tmp_path, name, "1.31.1")
    monkeypatch.syspath_prepend(tmp_path)
    check = check_packages(has_driver)
    assert not check.ok
    assert check.command == f'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "sdcompress[{extra}]"'


def test_a_package_of_a_version_that_does_not_fit_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "diffusers", "0.30.0")
    install(tmp_path, "onnxruntime", "1.2.0")  # only an extra asks for it, but it is installed
    monkeypatch.syspath_prepend(tmp_path)
    check = check_packages(False)
    assert not check.ok
    assert "diffusers 0.30.0, <0.43,>=0.42 is needed" in check.text
    assert check.command == "pip install 'diffusers<0.43,>=0.42' 'onnxruntime>=1.23'"


def test_the_command_for_packages_is_quoted_as_windows_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "diffusers", "0.30.0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(installation, "command_line", partial(command_line, windows=True))
    assert check_packages(False).command == 'pip install "diffusers<0.43,>=0.42"'


@needs_posix
def test_a_driver_beside_a_torch_for_the_cpu_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nvidia-smi` is a stand-in that answers as the real one does."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '580.82.07, NVIDIA GeForce RTX 4090'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    driver = find_driver()
    assert driver == Driver("580.82.07", ("NVIDIA GeForce RTX 4090",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    check = check_card(driver)
    assert not check.ok
    assert "RTX 4090" in check.text
    assert check.command is not None
    assert "torch" in check.command
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_card(driver).command == "unset CUDA_VISIBLE_DEVICES"


def test_no_driver_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_driver() is None
    assert check_card(None).ok


def test_a_cache_without_room_or_rights_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "cache"))
    assert check_cache(1).ok
    assert "are needed" in check_cache(2**60).text
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "file" / "cache"))
    check = check_cache(1)
    assert "cannot be written to" in check.text
    assert "SDCOMPRESS_CACHE=DIR" in (check.command or "")


SHAPES = dict.fromkeys(("left", "right"), ((1, 8), (2, 8), (4, 8)))


def build_sum(store: EngineStore, folder: Path, model: str) -> str:
    """Builds an engine that adds two tensors, with TensorRT-RTX, into a store; returns its digest."""
    half = TensorProto.FLOAT16
    ports = [helper.make_tensor_value_info(name, half, ["batch", 8]) for name in ("left", "right", "total")]
    graph = helper.make_graph([helper.make_node("Add", ["left", "right"], ["total"])], "sum", ports[:2], ports[2:])
    path = folder / "sum.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    key = EngineKey(
        model, "unet", "fp16", "diffusers", "tensorrt-rtx", TENSORRT_RTX.version, (), platform_name(), (SHAPES,)
    )

    def build(target: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        build_engine(path, target / "unet.engine", Profile(SHAPES), TENSORRT_RTX)
        return {}, {}

    return store.get_or_build(key, build)[0].digest


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@needs_rtx
def test_a_damaged_engine_is_named_and_the_command_removes_it(tmp_path: Path) -> None:
    store = EngineStore(tmp_path / "engines")
    assert check_store(store).text == "none in the store"
    sound, damaged = (build_sum(store, tmp_path, letter * 64) for letter in "ab")
    assert check_store(store) == Check("engines", True, "2 in the store, intact")
    flip_a_byte(store.root / damaged / "unet.engine")
    check = check_store(store)
    assert not check.ok
    assert check.text.startswith(f"1 of 2 in the store are damaged ({damaged[:8]}: unet.engine is not what")
    assert check.command == f"sdcompress engines prune {damaged[:8]}"
    store.prune(keys=[damaged])
    assert check_store(store).ok
    assert [entry.digest for entry in store.entries()] == [sound]


@needs_rtx
def test_a_large_store_is_read_for_some_seconds_only(tmp_path: Path) -> None:
    store = EngineStore(tmp_path / "engines")
    digest = build_sum(store, tmp_path, "a" * 64)
    assert "sdcompress engines verify" in check_store(store, read_s=0).text
    (store.root / digest / "unet.engine").write_bytes(b"cut")  # a size is seen without reading
    assert not check_store(store, read_s=0).ok


def case(folder: Path, **changes: Any) -> Case:
    return replace(Case("nano", "torch", "cpu", "fp32", (SMALL,), str(folder)), **changes)


def test_the_small_unet_has_every_operator_of_the_whole() -> None:
    whole, small = (
        {type(each) for each in load_subject("nano", size).pipeline.unet.modules()} for size in (WHOLE, SMALL)
    )  # type: ignore[attr-defined]
    assert {kind.__name__ for kind in whole - small} == {"UNetMidBlock2DCrossAttn"}  # the same blocks, in another frame
    assert load_subject("nano", SMALL).sha256 != load_subject("nano", WHOLE).sha256


def test_a_proof_answers_and_its_process_is_gone(tmp_path: Path) -> None:
    before = psutil.Process().children()  # servers of other tests
    outcome = Proof(case(tmp_path), time.monotonic() + 100).finish()
    assert outcome["ms"][SMALL] > 0
    assert torch.load(answer_file(str(tmp_path), REFERENCE, SMALL), weights_only=True).shape == (2, 4, 16, 16)
    assert psutil.Process().children() == before


def test_a_proof_that_runs_out_of_time_is_unfinished_and_its_process_is_gone(tmp_path: Path) -> None:
    before = psutil.Process().children()
    started = time.monotonic()
    outcome = Proof(case(tmp_path), started + 0.5).finish()
    assert time.monotonic() - started < 5
    assert "no time was left" in outcome["unfinished"]
    assert psutil.Process().children() == before
    assert "to start it" in Proof(case(tmp_path), started).finish()["unfinished"]


def test_an_error_in_a_process_is_a_reason(tmp_path: Path) -> None:
    outcome = Proof(case(tmp_path, model=str(tmp_path / "nowhere")), time.monotonic() + 100).finish()
    assert outcome["failed"].startswith("does not exist")


@needs_posix
def test_a_process_that_crashes_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for body, said in (("kill -SEGV $$", "ended by SIGSEGV"), ("echo 'no such driver' >&2; exit 3", "no such driver")):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        assert said in Proof(case(tmp_path), time.monotonic() + 100).finish()["failed"]


@pytest.mark.parametrize(
    ("precision", "error", "status"),
    [
        ("fp32", 5e-5, "works"),
        ("fp32", 2e-4, "fails"),
        ("fp32", float("nan"), "fails"),
        ("fp16", 1.9e-3, "works"),
        ("fp16", 2.1e-3, "fails"),
    ],
)
def test_an_answer_that_is_off_fails(tmp_path: Path, precision: Any, error: float, status: str) -> None:
    """torch itself is off by 1e-3 in fp16; twice that is the limit."""
    proved = case(tmp_path, backend="onnxruntime", precision=precision)
    exact = torch.ones(1000, dtype=torch.float64)
    torch.save(exact, answer_file(str(tmp_path), REFERENCE, SMALL))
    torch.save(exact * (1 + 1e-3), replace(proved, backend="torch").answer(SMALL))
    torch.save(exact * (1 + error), proved.answer(SMALL))
    result = judge_proof(Proof(proved, 0), {"ms": {SMALL: 2.0}}, {SMALL: 3.0}, "sdcompress doctor")
    assert result.status == status
    assert result.speedup == 1.5
    assert (result.command is None) == (status == "works")
    json.dumps(Diagnosis("nano", 1, {}, {}, [], [result]).to_json(), allow_nan=False)


def test_a_gpu_is_proved_in_half_precision_on_every_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = plan_proofs("nano", list(provable()), Driver("580", ("a card",)), [], False, str(tmp_path))
    assert not plan.absent
    assert [(each.backend, each.device, each.precision, each.subjects) for each in plan.cases] == [
        ("torch", "cuda", "fp16", (WHOLE, SMALL)),
        ("compile", "cuda", "fp16", (SMALL,)),
        ("aot", "cuda", "fp16", (SMALL,)),
        ("onnxruntime", "cuda", "fp16", (WHOLE,)),
        ("onnxruntime", "cpu", "fp32", (SMALL,)),
        ("tensorrt", "cuda", "fp16", (WHOLE,)),
        ("tensorrt-rtx", "cuda", "fp16", (WHOLE,)),
    ]


def test_tensorrt_is_not_for_a_machine_without_a_gpu_but_a_fault_beside_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen, card = ("torch", "tensorrt"), Check("card", False, "torch is for the CPU", "pip install torch")
    (without,) = plan_proofs("nano", chosen, None, [card], False, str(tmp_path)).absent
    assert (without.status, without.healthy) == ("not here", True)
    (beside,) = plan_proofs("nano", chosen, Driver("580", ("a card",)), [card], False, str(tmp_path)).absent
    assert (beside.status, beside.command, beside.healthy) == ("fails", "pip install torch", False)


def test_backends_have_their_usual_short_names() -> None:
    assert [full_name(name) for name in ("ort", "trt", "aoti", "tensorrt-rtx")] == [
        "onnxruntime",
        "tensorrt",
        "aot",
        "tensorrt-rtx",
    ]
    with pytest.raises(UsageError, match="tensorrt-rtx"):
        full_name("auto")


@pytest.mark.gpu
@pytest.mark.slow
def test_every_backend_of_a_gpu_machine_is_proved() -> None:
    diagnosis = examine(minutes=9)
    assert diagnosis.machine["cards"]
    assert [result for result in diagnosis.backends if not result.healthy] == []
    assert {result.device for result in diagnosis.backends if result.backend == "onnxruntime"} == {"cpu", "cuda"}
