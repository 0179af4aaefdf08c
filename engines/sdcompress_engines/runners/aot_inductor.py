"""AOTInductor packages on torch tensors: native code that was compiled ahead of time, on the CPU or a GPU."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Hashable, Mapping
from os import PathLike
from typing import Any

import torch

from ..errors import ArtifactError, BackendMissing, EngineError, EngineMismatch, shorten
from ..manifest import read_manifest, sha256_file
from ..trust import check_trusted
from .aot_package import EXPORT_AGAIN, AxisRange, check_fits, missing, read_facts
from .base import Runner, cuda_device, name_outputs
from .cuda_graphs import GraphedCall, check_graph_device


class AotInductorRunner(Runner):
    """A `.pt2` package. `device` is the one it was compiled for, and cannot be another kind.

    The manifest beside it, where there is one, the consent to run it, and the package's own checksums are checked
    before its code is loaded.

    Args:
        path: the package.
        device: by default the one it was compiled for.
        cuda_graph: replay a captured graph for each shape; on a GPU only.
    """

    backend = "aot-inductor"

    def __init__(
        self, path: str | PathLike[str], device: torch.device | str | None = None, *, cuda_graph: bool = False
    ) -> None:
        super().__init__(path, device or ("cuda" if cuda_graph else "cpu"))
        check_graph_device(cuda_graph, self.device)
        self.cuda_graph = cuda_graph
        self._graphed: GraphedCall | None = None
        self._chosen = device is not None
        self._model: Any = None
        self._axes: Mapping[str, AxisRange] = {}
        self._channels_last = False
        self._constants: Mapping[str, str] = {}

    def _load(self) -> None:
        assert self.path is not None
        if reason := missing():
            raise BackendMissing(reason, where=self.path, hint="a newer torch")
        manifest = read_manifest(self.path.parent)
        entry = None if manifest is None else manifest.files.get(self.path.name)
        digest = sha256_file(self.path)
        if entry is not None and digest != entry.sha256:
            raise ArtifactError(
                "the package is not the one of its manifest: it is cut or was altered",
                where=self.path,
                hint=EXPORT_AGAIN,
            )
        check_trusted(self.path, digest)
        facts = read_facts(self.path)
        if not self._chosen:
            self.device = torch.device(facts.device)
        check_fits(facts, self.device, self.path)
        check_graph_device(self.cuda_graph, self.device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's about its own code
                from torch._inductor import aoti_load_package

                options: dict[str, Any] = {"device_index": -1 if self.device.index is None else self.device.index}
                if self.cuda_graph and "run_single_threaded" in inspect.signature(aoti_load_package).parameters:
                    # Otherwise it asks after each run whether that has finished, which a capture forbids.
                    options["run_single_threaded"] = True
                self._model = aoti_load_package(str(self.path), **options)
        except Exception as error:  # its exceptions share no base class
            raise EngineError(
                f"the package does not load ({shorten(error)})", where=self.path, hint=EXPORT_AGAIN
            ) from error
        self.inputs, self.outputs, self._axes = facts.inputs, facts.outputs, facts.axes
        self._channels_last = facts.channels_last
        self._constants = self._name_constants()
        if self.device.type == "cuda":
            self.device = cuda_device(self.device.index)
        self._graphed = GraphedCall(self._compute, self.device, self.path) if self.cuda_graph else None

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for spec in self.inputs:
            for size, axis in zip(feeds[spec.name].shape, spec.shape, strict=True):
                if isinstance(axis, str) and axis in self._axes and size not in self._axes[axis]:
                    raise EngineMismatch(
                        f"{axis} {size} is outside what the package was compiled for",
                        where=self.path,
                        expected=f"{axis} {self._axes[axis]}",
                        hint="export it again for these shapes",
                    )
        return self._compute(feeds) if self._graphed is None else self._graphed(feeds)

    def _compute(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Kernels for a GPU rely on the alignment of a tensor's own memory, which a slice of a tensor need not have.
        tensors = [tensor if tensor.data_ptr() % 16 == 0 else tensor.clone() for tensor in feeds.values()]
        try:
            results = self._model(*tensors)
        except RuntimeError as error:
            raise EngineError(f"the package failed ({shorten(error)})", where=self.path) from error
        return name_outputs(self.outputs, results)

    def _exchange(self, changes: Mapping[str, torch.Tensor], key: Hashable) -> None:
        """Copy values over the package's constants. Their addresses stay, so CUDA graphs stay valid."""
        restored = {name: self.read_weight(name) for name in self._changed - set(changes)}
        for values in (restored, changes):
            for name in values:
                self._model.load_constants(
                    {self._constants[name]: self._lay_out(values[name])}, check_full_update=False, user_managed=False
                )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies are not in the order of torch's stream

    def _lay_out(self, value: torch.Tensor) -> torch.Tensor:
        """Returns a value as the package's code expects it: its bytes are copied as they are."""
        value = value.to(self.device)
        if self._channels_last and value.ndim == 4:
            return value.contiguous(memory_format=torch.channels_last)
        return value.contiguous()

    def _name_constants(self) -> dict[str, str]:
        """Returns weight → the package's name of it, which has the path of the compiled module before it.

        Raises:
            EngineError: the package no longer has a weight, because its value is part of the code.
        """
        stored = self._model.get_constant_fqns()
        names = {}
        for name in self.weights:
            found = next((each for each in stored if each == name or each.endswith(f".{name}")), None)
            if found is None:
                raise EngineError(
                    f"takes no LoRA: the weight {name} is part of the compiled code", where=self.path, hint=EXPORT_AGAIN
                )
            names[name] = found
        return names

    def _release(self) -> None:
        self._model = self._graphed = None
