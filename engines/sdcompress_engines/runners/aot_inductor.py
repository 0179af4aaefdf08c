"""torch's own ahead-of-time compiler: a module becomes a `.pt2` package of native code, which runs without Python and
compiles nothing when it is loaded.

A package holds code: load none that you would not run. It belongs to the torch, the processor or card, and the platform
it was made with.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError, BackendMissing, EngineError, EngineMismatch, ExportError, UsageError, storage_errors
from ..flavour import platform_name
from ..manifest import read_manifest, sha256_file
from .base import Runner, TensorSpec
from .cuda_graphs import GraphedCall, check_graph_device, short
from .torch import COMPILER, no_compiler

CUDA_TOOLKIT = (
    f"install the CUDA toolkit{'' if torch.version.cuda is None else ' ' + torch.version.cuda} and set CUDA_HOME to it,"
    " or --backend compile"
)
_KEY = "sdcompress"
_AGAIN = "export it again on this machine"


def missing() -> str | None:
    """Why packages cannot run here, or None."""
    there = hasattr(
        getattr(torch._C, "_aoti", None), "AOTIModelPackageLoader"
    )  # as torch._inductor itself takes seconds to import
    return None if there else f"torch {torch.__version__} has no AOTInductor packages; they came with 2.6"


@dataclass(frozen=True)
class Range:
    """The sizes a free axis may have: from `least` to `most` (None is without end), in multiples of `step`."""

    least: int
    most: int | None
    step: int = 1

    def __contains__(self, size: int) -> bool:
        return self.least <= size and (self.most is None or size <= self.most) and size % self.step == 0

    def __str__(self) -> str:
        return f"{self.least} to {'any' if self.most is None else self.most}" + (
            f" in steps of {self.step}" if self.step > 1 else ""
        )


@dataclass(frozen=True)
class Facts:
    """What a package says of itself.

    Attributes:
        device: `cpu` or `cuda`; `card`: its compute capability.
        isa: the instruction sets that its code uses, as torch names them.
        axes: free axis → the sizes it was compiled for. The code itself checks none of this: other sizes would read
            past their memory.
    """

    torch: str
    platform: str
    device: str
    card: tuple[int, ...]
    isa: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, Range]


def compile_package(
    module: torch.nn.Module,
    example_inputs: Sequence[torch.Tensor],
    dynamic_shapes: Any,
    path: str | PathLike[str],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> Path:
    """Compile `module` for the device and dtype it is in, and write the package; returns its path.

    On the CPU its weights are part of the code, laid out for it ("freezing": 6 to 14 % faster where it was measured),
    and it uses as many threads as torch does.

    Args:
        example_inputs: in the order of `inputs`, on the module's device; sizes of free axes are examples, at least 2.
        dynamic_shapes: for each input, axis → `torch.export.Dim` or None, as `torch.export.export` takes it; None makes
            every size fixed.
        path: ends in `.pt2`; an existing file is replaced once the new one is whole.
        inputs, outputs: names, shapes and dtypes; an axis that comes out fixed is kept as its size.

    Raises:
        UsageError: another suffix. BackendMissing: no C++ compiler, or no CUDA toolkit for a GPU. ExportError: the
            module cannot be exported or compiled. StorageError: no space.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise UsageError("an AOTInductor package", where=path, expected="a name that ends in .pt2")
    if reason := missing():
        raise BackendMissing(reason, hint="a newer torch")
    module.eval()
    examples = tuple(tensor.detach().contiguous() for tensor in example_inputs)
    device = examples[0].device.type
    options: dict[str, Any] = {"freezing": True, "cpp.dynamic_threads": True} if device == "cpu" else {}
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as folder,
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch's about its own code
            try:
                from torch._inductor import aoti_compile_and_package

                program = torch.export.export(module, examples, dynamic_shapes=dynamic_shapes)
                held, axes, fixed = _sizes(program, inputs)
                facts = Facts(
                    torch.__version__, platform_name(), device, _card(device), (), held, _fix(outputs, fixed), axes
                )
                options["aot_inductor.metadata"] = {
                    _KEY: json.dumps(asdict(facts), default=lambda dtype: str(dtype).removeprefix("torch."))
                }
                made = aoti_compile_and_package(
                    program, package_path=str(Path(folder) / path.name), inductor_configs=options
                )
            except Exception as error:  # its exceptions share no base class
                if isinstance(error, OSError):
                    raise
                if no_compiler(error):
                    raise BackendMissing("AOTInductor finds no C++ compiler", hint=COMPILER) from error
                if device == "cuda" and no_cuda_headers(error):
                    raise BackendMissing(
                        "AOTInductor finds no headers of the CUDA toolkit", hint=CUDA_TOOLKIT
                    ) from error
                raise ExportError(
                    f"AOTInductor cannot compile this module ({type(error).__name__}: {short(error)})", where=path
                ) from error
            os.replace(made, path)
    return path


def read_facts(path: str | PathLike[str]) -> Facts:
    """What a package says of itself, without loading its code.

    Raises:
        EngineError: it is cut, damaged, or no package of ours.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise EngineError(f"the package is damaged: {damaged}", where=path, hint=_AGAIN)
            for name in archive.namelist():
                if name.endswith("_metadata.json"):
                    found = json.loads(archive.read(name))
                    if _KEY in found:
                        return _facts(json.loads(found[_KEY]), found.get("AOTI_CPU_ISA", ""))
    except EngineError:
        raise
    except Exception as error:  # a damaged archive fails in as many ways as it has bytes
        raise EngineError(
            f"not a whole package ({type(error).__name__}: {short(error)})", where=path, hint=_AGAIN
        ) from error
    raise EngineError("not a package of sdcompress's: it does not say what its inputs are", where=path, hint=_AGAIN)


class AotInductorRunner(Runner):
    """A `.pt2` package. `device` is the one it was compiled for, and cannot be another kind.

    The manifest beside it, where there is one, and the package's own checksums are read before its code is.

    Args:
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
        self._axes: Mapping[str, Range] = {}

    def _load(self) -> None:
        assert self.path is not None
        if reason := missing():
            raise BackendMissing(reason, where=self.path, hint="a newer torch")
        manifest = read_manifest(self.path.parent)
        entry = None if manifest is None else manifest.files.get(self.path.name)
        if entry is not None and sha256_file(self.path) != entry.sha256:
            raise ArtifactError(
                "the package is not the one of its manifest: it is cut or was altered", where=self.path, hint=_AGAIN
            )
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
                    options["run_single_threaded"] = (
                        True  # else it asks after each run whether that has finished, which a capture forbids
                    )
                self._model = aoti_load_package(str(self.path), **options)
        except Exception as error:  # its exceptions share no base class
            raise EngineError(f"the package does not load ({short(error)})", where=self.path, hint=_AGAIN) from error
        self.inputs, self.outputs, self._axes = facts.inputs, facts.outputs, facts.axes
        if self.device.type == "cuda":
            self.device = torch.device(
                "cuda", torch.cuda.current_device() if self.device.index is None else self.device.index
            )
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
        # Kernels for a GPU count on the alignment of a tensor's own memory, which a slice of one need not have.
        tensors = [tensor if tensor.data_ptr() % 16 == 0 else tensor.clone() for tensor in feeds.values()]
        try:
            results = self._model(*tensors)
        except RuntimeError as error:
            raise EngineError(f"the package failed ({short(error)})", where=self.path) from error
        return dict(
            zip(
                (spec.name for spec in self.outputs),
                results if isinstance(results, (tuple, list)) else (results,),
                strict=True,
            )
        )

    def _release(self) -> None:
        self._model = self._graphed = None


def no_cuda_headers(error: BaseException) -> bool:
    """Returns whether a compilation failed because the CUDA toolkit is not installed: torch carries its libraries, not
    all of its headers.
    """
    text = str(error)
    return "CUDA_HOME" in text or re.search(r"cuda\w*\.h\b.*No such file", text) is not None


def check_fits(facts: Facts, device: torch.device, where: str | PathLike[str] | None) -> None:
    """Refuse a package whose code this machine, or this torch, cannot run.

    Raises:
        EngineMismatch: made with another torch, or for another device, card, processor or platform. BackendMissing: it
            needs a GPU and there is none.
    """
    for what, made, here in (
        ("torch", facts.torch, torch.__version__),
        ("platform", facts.platform, platform_name()),
        ("device", facts.device, device.type),
    ):
        if made != here:
            raise EngineMismatch(
                f"the package was compiled for {what} {made}, and this is {here}",
                where=where,
                expected=f"one for {here}",
                hint=_AGAIN,
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
                hint=_AGAIN,
            )
    elif lacking := _lacking(facts.isa):
        raise EngineMismatch(
            f"the package was compiled for a processor with {', '.join(lacking)}, which this one has not",
            where=where,
            hint=_AGAIN,
        )


def _lacking(isa: Sequence[str]) -> list[str]:
    """Those of torch's names of instruction sets that this processor is known not to have."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = {"AVX512": "avx512_f"}
    return [name for name in isa if known.get(names.get(name, name.lower()), True) is False]


def _card(device: str) -> tuple[int, ...]:
    return tuple(torch.cuda.get_device_capability()) if device == "cuda" else ()


def _sizes(
    program: Any, inputs: Sequence[TensorSpec]
) -> tuple[tuple[TensorSpec, ...], dict[str, Range], dict[str, int]]:
    """The inputs with the axes that came out fixed as their sizes, the range of each free axis, and the size of each
    fixed one.
    """
    wanted = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    axes: dict[str, Range] = {}
    fixed: dict[str, int] = {}
    for spec, value in zip(inputs, values, strict=True):
        for axis, size in zip(spec.shape, value.shape, strict=True):
            if isinstance(size, torch.SymInt):
                expression = size.node.expr
                bounds = program.range_constraints.get(expression)
                least, most = (1, None) if bounds is None else (_finite(bounds.lower) or 1, _finite(bounds.upper))
                axes[str(axis)] = Range(least, most, int(expression.as_coeff_Mul()[0]))
            elif isinstance(axis, str):
                fixed[axis] = int(size)
    return _fix(inputs, fixed), axes, fixed


def _fix(specs: Sequence[TensorSpec], fixed: Mapping[str, int]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            spec.name,
            tuple(fixed.get(size, size) if isinstance(size, str) else size for size in spec.shape),
            spec.dtype,
        )
        for spec in specs
    )


def _finite(bound: Any) -> int | None:
    try:
        return int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):  # torch's own infinity
        return None


def _facts(raw: Mapping[str, Any], isa: str) -> Facts:
    def specs(entries: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                str(entry["name"]),
                tuple(size if isinstance(size, int) else str(size) for size in entry["shape"]),
                getattr(torch, entry["dtype"]),
            )
            for entry in entries
        )

    axes = {str(name): Range(**given) for name, given in raw["axes"].items()}
    return Facts(
        str(raw["torch"]),
        str(raw["platform"]),
        str(raw["device"]),
        tuple(raw["card"]),
        tuple(isa.split()),
        specs(raw["inputs"]),
        specs(raw["outputs"]),
        axes,
    )
