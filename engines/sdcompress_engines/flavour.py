"""The two TensorRT libraries behind one name each: found by importing them, told apart by what they can do, never by a version string."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from .errors import BackendMissing, UsageError


@dataclass(frozen=True)
class Flavour:
    """One library: the name users type, the module, and how to install it."""

    name: str
    module: str
    install: str

    def load(self) -> Any:
        """The module.

        Raises:
            BackendMissing: it is not installed, or its libraries do not load.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError, RuntimeError) as error:
            raise BackendMissing(f"{self.name} is not usable ({error})", hint=self.install) from error

    def missing(self) -> str | None:
        """Why it cannot be imported here, or None."""
        try:
            self.load()
        except BackendMissing as error:
            return error.what
        return None

    def builds_ahead(self) -> bool:
        """Whether it builds for a card that is not in this machine."""
        trt = self.load()
        return hasattr(trt, "ComputeCapability") and hasattr(trt.IBuilderConfig, "set_compute_capability")

    @property
    def version(self) -> str:
        return str(self.load().__version__)


TENSORRT = Flavour("tensorrt", "tensorrt", "pip install 'sdcompress[gpu]'")
TENSORRT_RTX = Flavour("tensorrt-rtx", "tensorrt_rtx", "pip install 'sdcompress[rtx]'")
FLAVOURS = {flavour.name: flavour for flavour in (TENSORRT, TENSORRT_RTX)}


def choose_flavour(requested: str | None = None, gpu_present: bool = False) -> Flavour:
    """The flavour to build with: the requested one, else `tensorrt` for the GPU that is here and `tensorrt-rtx` where none is.

    With a GPU but no `tensorrt` installed, `tensorrt-rtx` serves too; the other way round nothing does, as `tensorrt` builds only for a card it sees.

    Raises:
        UsageError: no flavour of that name. BackendMissing: it is not installed, with the command that installs it.
    """
    if requested is not None and requested not in FLAVOURS:
        raise UsageError(f"no TensorRT flavour {requested!r}", expected=" or ".join(FLAVOURS))
    wanted = [FLAVOURS[requested]] if requested else [TENSORRT, TENSORRT_RTX] if gpu_present else [TENSORRT_RTX]
    reasons = {flavour: flavour.missing() or (None if gpu_present or flavour.builds_ahead() else f"{flavour.name} builds only for a GPU in this machine, and there is none") for flavour in wanted}
    for flavour, reason in reasons.items():
        if reason is None:
            return flavour
    raise BackendMissing("; ".join(map(str, reasons.values())), hint=(TENSORRT_RTX if not gpu_present else wanted[0]).install)
