"""AOTInductor packages (`.pt2`): what one says about itself, and whether its code can run here.

A package holds code: load none that you would not run. It belongs to the torch, the processor or card, and the platform
that it was compiled with.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..errors import BackendMissing, EngineError, EngineMismatch, shorten
from ..flavour import platform_name
from ..json_files import MOST_MIB, parse_json
from ..paths import is_plain_path
from .base import TensorSpec

EXPORT_AGAIN = "export it again on this machine"
_KEY = "sdcompress"


def missing() -> str | None:
    """Returns why packages cannot run here, or None."""
    # `torch._inductor` itself takes seconds to import.
    if hasattr(getattr(torch._C, "_aoti", None), "AOTIModelPackageLoader"):
        return None
    return f"torch {torch.__version__} has no AOTInductor packages; they came with 2.6"


@dataclass(frozen=True)
class AxisRange:
    """The sizes that a free axis may have: from `least` to `most` (None is no limit), in multiples of `step`."""

    least: int
    most: int | None
    step: int = 1

    def __contains__(self, size: int) -> bool:
        return self.least <= size and (self.most is None or size <= self.most) and size % self.step == 0

    def __str__(self) -> str:
        steps = f" in steps of {self.step}" if self.step > 1 else ""
        return f"{self.least} to {'any' if self.most is None else self.most}{steps}"


@dataclass(frozen=True)
class Facts:
    """What a package says about itself.

    Attributes:
        torch: the version that compiled it.
        platform: see `flavour.platform_name`.
        device: `cpu` or `cuda`.
        card: the compute capability of the GPU, (major, minor); empty for the CPU.
        isa: the instruction sets that its code uses, as torch names them.
        inputs, outputs: in the order of the call.
        axes: free axis → the sizes it was compiled for. The code itself checks none of this: other sizes would read
            past their memory.
        channels_last: the layout of the weights of convolutions.
    """

    torch: str
    platform: str
    device: str
    card: tuple[int, ...]
    isa: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, AxisRange]
    channels_last: bool = False

    def metadata(self) -> dict[str, str]:
        """Returns the facts as the compiler takes them for the package's metadata."""
        return {_KEY: json.dumps(asdict(self), default=lambda dtype: str(dtype).removeprefix("torch."))}


def read_facts(path: str | PathLike[str]) -> Facts:
    """Returns what a package says about itself, without loading its code.

    Raises:
        EngineError: it is cut, damaged, or not from sdcompress.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not is_plain_path(name):  # torch unpacks the package
                    raise EngineError(
                        f"the package names the file {shorten(repr(name), 120)}", where=path, hint=EXPORT_AGAIN
                    )
            if damaged := archive.testzip():
                raise EngineError(f"the package is damaged: {damaged}", where=path, hint=EXPORT_AGAIN)
            for member in archive.infolist():
                if member.filename.endswith("_metadata.json") and member.file_size <= MOST_MIB * 2**20:
                    metadata = parse_json(archive.read(member), path, EngineError)
                    if _KEY in metadata:
                        facts = parse_json(metadata[_KEY], path, EngineError)
                        return _parse_facts(facts, metadata.get("AOTI_CPU_ISA", ""))
    except EngineError:
        raise
    except Exception as error:  # a damaged archive can raise almost any exception
        raise EngineError(
            f"not a whole package ({type(error).__name__}: {shorten(error)})", where=path, hint=EXPORT_AGAIN
        ) from error
    raise EngineError("not a package of sdcompress: it does not say what its inputs are", where=path, hint=EXPORT_AGAIN)


def check_fits(facts: Facts, device: torch.device, where: str | PathLike[str] | None) -> None:
    """Refuse a package whose code this machine, or this torch, cannot run.

    Args:
        facts: of the package.
        device: that it is to run on.
        where: the package, for the message.

    Raises:
        EngineMismatch: compiled with another torch, or for another device, card, processor or platform.
        BackendMissing: it needs a GPU and there is none.
    """
    for what, compiled, here in (
        ("torch", facts.torch, torch.__version__),
        ("platform", facts.platform, platform_name()),
        ("device", facts.device, device.type),
    ):
        if compiled != here:
            raise EngineMismatch(
                f"the package was compiled for {what} {compiled}, and this is {here}",
                where=where,
                expected=f"one for {here}",
                hint=EXPORT_AGAIN,
            )
    if facts.device == "cuda":
        if not torch.cuda.is_available():
            raise BackendMissing(
                "the package runs on an NVIDIA GPU and there is none", where=where, hint="export it for the CPU"
            )
        if facts.card != (card := torch.cuda.get_device_capability(device)):
            raise EngineMismatch(
                f"the package was compiled for compute capability {'.'.join(map(str, facts.card))}, and this card has"
                f" {'.'.join(map(str, card))}",
                where=where,
                hint=EXPORT_AGAIN,
            )
    elif absent := _absent_instructions(facts.isa):
        raise EngineMismatch(
            f"the package was compiled for a processor with {', '.join(absent)}, which this one does not have",
            where=where,
            hint=EXPORT_AGAIN,
        )


def _absent_instructions(isa: Sequence[str]) -> list[str]:
    """Returns those of torch's names of instruction sets that this processor is known not to have."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = {"AVX512": "avx512_f"}
    return [name for name in isa if known.get(names.get(name, name.lower()), True) is False]


def _parse_facts(raw: Mapping[str, Any], isa: str) -> Facts:
    def specs(entries: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                str(entry["name"]),
                tuple(size if isinstance(size, int) else str(size) for size in entry["shape"]),
                _parse_dtype(entry["dtype"]),
            )
            for entry in entries
        )

    return Facts(
        str(raw["torch"]),
        str(raw["platform"]),
        str(raw["device"]),
        tuple(raw["card"]),
        tuple(isa.split()),
        specs(raw["inputs"]),
        specs(raw["outputs"]),
        {str(name): AxisRange(**given) for name, given in raw["axes"].items()},
        raw.get("channels_last") is True,
    )


def _parse_dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return found
