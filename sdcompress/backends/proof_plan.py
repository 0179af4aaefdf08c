"""Which backends `sdcompress doctor` proves here, on which device and on which UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from sdcompress_engines.errors import UsageError
from sdcompress_engines.flavour import TENSORRT

from sdcompress.backends import registry
from sdcompress.backends.backend import Backend
from sdcompress.backends.diagnosis import BackendResult
from sdcompress.backends.installation import IMPORTED_BY_DIFFUSERS, Check, Driver, import_fault
from sdcompress.backends.proof import Case
from sdcompress.backends.subjects import SMALL, WHOLE
from sdcompress.export.components import Precision
from sdcompress.models.locate import hash_pipeline, locate_pipeline
from sdcompress.models.nano import BUILT_IN


def provable() -> dict[str, Backend]:
    """Returns what can be proved: each backend by name, and in its place its libraries where it has several."""
    return {
        name: backend for backend in registry.backends().values() for name in (backend.libraries or (backend.name,))
    }


def full_name(backend: str) -> str:
    """Returns the full name of a backend, or of a library of one, given by name or alias.

    Raises:
        UsageError: there is no such backend.
    """
    aliases = registry.aliases()
    name = aliases.get(backend, backend)
    if name not in provable():
        raise UsageError(f"no backend {backend!r}", expected=f"one of {', '.join([*provable(), *aliases])}")
    return name


@dataclass(frozen=True)
class ProofPlan:
    """What to prove.

    Attributes:
        cases: torch's first, as all others are compared with it.
        absent: the results of backends that need no process, because they cannot run here.
    """

    cases: list[Case]
    absent: list[BackendResult]


def plan_proofs(
    model: str, chosen: Sequence[str], driver: Driver | None, checks: Sequence[Check], whole: bool, folder: str
) -> ProofPlan:
    """Returns what to prove on this machine.

    Args:
        model: what `load_pipeline` takes.
        chosen: names of `provable`, torch first.
        driver: of the NVIDIA cards; None where there is none.
        checks: of the installation.
        whole: prove every backend on the whole UNet.
        folder: for the outputs of the backends.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Precision = "fp16" if device == "cuda" else "fp32"
    cases: list[Case] = []
    absent: list[BackendResult] = []
    for name in chosen[1:]:
        if name == TENSORRT.name and device == "cpu":  # it builds only for a card in the machine
            absent.append(_result_without_card(name, driver, checks))
            continue
        backend = provable()[name]
        small = not whole and backend.compiles and not _is_compiled(backend, model, device, precision)
        cases.append(Case(model, name, device, precision, (SMALL if small else WHOLE,), folder))
        if backend.artifact == "onnx" and device == "cuda" and model in BUILT_IN:  # graphs run on the CPU as well
            cases.append(Case(model, name, "cpu", "fp32", (WHOLE if whole else SMALL,), folder))
    subjects = tuple(dict.fromkeys((WHOLE, *(case.subjects[0] for case in cases))))
    cases.insert(0, Case(model, "torch", device, precision, subjects, folder))
    return ProofPlan(_hide_broken_package(cases), absent)


def _is_compiled(backend: Backend, model: str, device: str, precision: Precision) -> bool:
    """Returns whether the cache folder has the model's UNet compiled."""
    if backend.cached_unet is None:
        return False
    return backend.cached_unet(hash_pipeline(locate_pipeline(model)), device, precision).is_file()


def _hide_broken_package(cases: list[Case]) -> list[Case]:
    """Hide a package that breaks diffusers from the backends that do not need it.

    The fault is reported once, as one of the packages, and the other backends are proved all the same.
    """
    if not import_fault(IMPORTED_BY_DIFFUSERS):
        return cases
    return [
        case
        if provable()[case.backend].package == IMPORTED_BY_DIFFUSERS
        else replace(case, hidden=(IMPORTED_BY_DIFFUSERS,))
        for case in cases
    ]


def _result_without_card(name: str, driver: Driver | None, checks: Sequence[Check]) -> BackendResult:
    """Returns the result of a backend that needs a GPU, where torch sees none."""
    result = BackendResult(name, "cuda", "fp16", WHOLE, "not here")
    if driver is None:
        return replace(result, reason="runs on an NVIDIA GPU, and none is here")
    card = next(check for check in checks if check.name == "card")
    return replace(result, status="fails", reason="torch does not see the card", command=card.command)
