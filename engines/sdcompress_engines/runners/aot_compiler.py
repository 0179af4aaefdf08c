"""torch's ahead-of-time compiler: a module becomes a package (`.pt2`) of native code.

The package runs without Python and compiles nothing when it is loaded.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..errors import BackendMissing, ExportError, SdCompressError, UsageError, shorten, storage_errors
from ..files import replace_file, sync
from ..flavour import platform_name
from ..trust import record_built
from .aot_package import AxisRange, Facts, missing
from .base import TensorSpec
from .torch import COMPILER, lacks_compiler

CUDA_TOOLKIT = (
    f"install the CUDA toolkit{'' if torch.version.cuda is None else ' ' + torch.version.cuda} and set CUDA_HOME to it,"
    " or --backend compile"
)


def compile_package(
    module: torch.nn.Module,
    example_inputs: Sequence[torch.Tensor],
    dynamic_shapes: Any,
    path: str | PathLike[str],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    exchangeable: bool = False,
) -> Path:
    """Compile `module` for the device and dtype it is in, and write the package. Returns its path.

    On the CPU the weights are part of the code, laid out for it ("freezing": 6 to 14 % faster where it was measured),
    unless they are to be exchanged, and the code uses as many threads as torch does.

    Args:
        module: takes and returns tensors by position.
        example_inputs: in the order of `inputs`, on the module's device; sizes of free axes are examples, at least 2.
        dynamic_shapes: for each input, axis → `torch.export.Dim` or None, as `torch.export.export` takes it; None makes
            every size fixed.
        path: ends in `.pt2`; an existing file is replaced once the new one is whole.
        inputs, outputs: names, shapes and dtypes. An axis that the export makes fixed is kept as its size.
        exchangeable: whether `Runner.set_weights` can exchange weights on the CPU too. On a GPU it always can.

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
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as folder:
            try:
                target = Path(folder) / path.name
                compiled = _compile(module, examples, dynamic_shapes, target, inputs, outputs, exchangeable)
            except OSError:
                raise
            except Exception as error:  # the compiler's exceptions share no base class
                raise _compiler_error(error, examples[0].device.type, path) from error
            sync(Path(compiled))
            replace_file(compiled, path)
    record_built(path)
    return path


def lacks_cuda_headers(error: BaseException) -> bool:
    """Returns whether a compilation failed because the CUDA toolkit is not installed.

    torch carries the toolkit's libraries, but not all of its headers.
    """
    text = str(error)
    return "CUDA_HOME" in text or re.search(r"cuda\w*\.h\b.*No such file", text) is not None


def _compile(
    module: torch.nn.Module,
    examples: tuple[torch.Tensor, ...],
    dynamic_shapes: Any,
    path: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    exchangeable: bool,
) -> str:
    """Write the package. Returns the path that the compiler gave it."""
    device = examples[0].device.type
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about its own code
        from torch._inductor import aoti_compile_and_package

        program = torch.export.export(module, examples, dynamic_shapes=dynamic_shapes)
        given, axes, fixed = _exported_sizes(program, inputs)
        card = tuple(torch.cuda.get_device_capability()) if device == "cuda" else ()
        results = _fix_sizes(outputs, fixed)
        layout = _has_channels_last(module)
        facts = Facts(torch.__version__, platform_name(), device, card, (), given, results, axes, layout)
        options: dict[str, Any] = {}
        if device == "cpu":
            options = {"freezing": not exchangeable, "cpp.dynamic_threads": True}
        options["aot_inductor.metadata"] = facts.metadata()
        return str(aoti_compile_and_package(program, package_path=str(path), inductor_configs=options))


def _has_channels_last(module: torch.nn.Module) -> bool:
    """Returns whether the weights of a module's convolutions have their channels last."""
    return any(
        weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        for weight in module.parameters()
    )


def _compiler_error(error: Exception, device: str, path: Path) -> SdCompressError:
    """Returns our error for one of the compiler's."""
    if lacks_compiler(error):
        return BackendMissing("AOTInductor finds no C++ compiler", hint=COMPILER)
    if device == "cuda" and lacks_cuda_headers(error):
        return BackendMissing("AOTInductor finds no headers of the CUDA toolkit", hint=CUDA_TOOLKIT)
    return ExportError(f"AOTInductor cannot compile this module ({type(error).__name__}: {shorten(error)})", where=path)


def _exported_sizes(
    program: Any, inputs: Sequence[TensorSpec]
) -> tuple[tuple[TensorSpec, ...], dict[str, AxisRange], dict[str, int]]:
    """Returns the inputs, the range of each free axis, and the size of each axis that the export made fixed.

    In the inputs a fixed axis is its size.
    """
    wanted = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    axes: dict[str, AxisRange] = {}
    fixed: dict[str, int] = {}
    for spec, value in zip(inputs, values, strict=True):
        for axis, size in zip(spec.shape, value.shape, strict=True):
            if isinstance(size, torch.SymInt):
                expression = size.node.expr
                bounds = program.range_constraints.get(expression)
                least, most = (1, None) if bounds is None else (_finite(bounds.lower) or 1, _finite(bounds.upper))
                axes[str(axis)] = AxisRange(least, most, int(expression.as_coeff_Mul()[0]))
            elif isinstance(axis, str):
                fixed[axis] = int(size)
    return _fix_sizes(inputs, fixed), axes, fixed


def _fix_sizes(specs: Sequence[TensorSpec], fixed: Mapping[str, int]) -> tuple[TensorSpec, ...]:
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
