"""A backend is one entry: registered, it draws, is in help texts, is measured by `auto` and is proved by `doctor`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sdcompress_engines.errors import UsageError
from sdcompress_engines.flavour import FLAVOURS
from sdcompress_engines.runners import Runner, TorchRunner

from sdcompress.backends import registry
from sdcompress.backends.assemble import close_pipeline, open_pipeline
from sdcompress.backends.backend import Backend, UNetRequest
from sdcompress.backends.fastest import Candidate, candidates
from sdcompress.backends.proof import Case, Proof
from sdcompress.backends.proof_plan import plan_proofs, provable
from sdcompress.backends.prove import judge_proof
from sdcompress.backends.registry import backends, find_backend, help_text, register, unregister
from sdcompress.backends.subjects import SMALL
from sdcompress.backends.torch_unet import PositionalUNet
from sdcompress.backends.worker import prepare_case
from sdcompress.export.components import signature_of
from sdcompress.sampling import generate


class ToyRunner(TorchRunner):
    """The UNet in torch; it counts its calls."""

    calls = 0

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ToyRunner.calls += 1
        return super()._run(feeds)


def open_toy(request: UNetRequest) -> Runner:
    unet = request.loaded.pipeline.unet
    signature = signature_of("unet", unet, request.precision)
    return ToyRunner(PositionalUNet(unet), signature.inputs, signature.outputs)


TOY = Backend(
    "toy", "Toy Runtime", colors=("#000000", "#ffffff"), alias="toyland", open_unet=open_toy, auto={"cpu": ("fp32",)}
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    monkeypatch.setattr(ToyRunner, "calls", 0)
    yield register(TOY)
    unregister(TOY.name)


@pytest.mark.parametrize("name", ["toy", "toyland"])
@pytest.mark.usefixtures("toy")
def test_a_registered_backend_draws_with_its_own_runner(small_folder: Path, name: str) -> None:
    pictures = []
    for backend in ("torch", name):
        pipeline = open_pipeline(small_folder, backend, device="cpu")
        pictures.append(np.asarray(generate(pipeline, ["a cat"], seeds=[1], steps=2)[0]))
        close_pipeline(pipeline)
    assert np.array_equal(*pictures)
    assert ToyRunner.calls >= 2


def test_help_texts_list_a_backend_while_it_is_registered(toy: Backend) -> None:
    assert "toy (Toy Runtime)" in help_text()
    unregister(toy.name)
    assert "toy" not in help_text()


def test_auto_measures_a_backend_on_the_devices_of_its_entry(toy: Backend) -> None:
    assert Candidate(toy.name, "fp32") in candidates("cpu")
    unregister(toy.name)
    assert Candidate(toy.name, "fp32") not in candidates("cpu")


def test_doctor_proves_a_registered_backend(toy: Backend, tmp_path: Path) -> None:
    """In this process: another one does not know what was registered here."""
    plan = plan_proofs("nano", ["torch", toy.name], None, [], False, str(tmp_path))
    assert [case.backend for case in plan.cases] == ["torch", toy.name]
    outcomes = {}
    for name in ("torch", toy.name):
        case = Case("nano", name, "cpu", "fp32", (SMALL,), str(tmp_path))
        outcomes[name] = prepare_case(case)()
    result = judge_proof(Proof(case, 0), outcomes[toy.name], outcomes["torch"]["ms"], "sdcompress doctor")
    assert (result.status, result.relative_l2) == ("works", 0.0)
    assert ToyRunner.calls > 0


def test_a_name_is_registered_once_and_a_built_in_backend_stays(toy: Backend) -> None:
    for entry in (toy, Backend("ort", "Another", ("", "")), Backend("other", "Another", ("", ""), alias="auto")):
        with pytest.raises(UsageError, match="exists already"):
            register(entry)
    unregister("torch")
    assert "torch" in backends()
    with pytest.raises(UsageError, match=r"no backend 'nothing'; expected one of torch, .*toyland"):
        find_backend("nothing")


def test_tensorrts_libraries_are_those_of_the_engines_package() -> None:
    assert list(find_backend("trt").libraries) == list(FLAVOURS)
    assert {name for name, backend in provable().items() if backend.name == "tensorrt"} == set(FLAVOURS)


def test_the_registry_imports_neither_torch_nor_diffusers() -> None:
    code = f"import sys, {registry.__name__}; print(sorted({{'torch', 'diffusers', 'onnx'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
