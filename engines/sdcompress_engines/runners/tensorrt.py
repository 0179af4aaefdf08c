"""TensorRT and TensorRT-RTX engines on torch CUDA tensors.

Tensors are bound by address, calls run in the order of torch's stream, and nothing is copied over the host. The runner
allocates the activation memory, not the library: the contexts of one engine, and with `SharedMemory` the engines of a
whole pipeline, use one block.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Hashable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..engine_files import read_engine
from ..errors import BackendMissing, EngineError, EngineMismatch, UsageError, shorten
from ..flavour import FLAVOURS, REBUILD, Flavour, check_fits_here, present_card
from ..graph import sha256_graph
from ..manifest import cache_folder, read_manifest
from ..sealed_files import read_sealed, write_sealed
from ..trust import check_trusted
from .base import Runner, TensorSpec, cuda_device
from .execution import Execution
from .memory import SharedMemory
from .refit import Refit
from .shapes import Ranges, axis_names, choose_profile, make_shape_error
from .tensorrt_library import DTYPES, KERNELS, create_log, explain_invalid


def missing(flavour: Flavour) -> str | None:
    """Returns why engines of this flavour cannot run here, or None."""
    if reason := flavour.missing():
        return reason
    card = present_card()
    return "no CUDA device" if card is None else flavour.explain_unsupported(card)


class TensorRTRunner(Runner):
    """An `.engine` file on a GPU. Its flavour is the one its manifest names, else the one installed.

    Free sizes have the graph's axis names where a manifest gives them, else `input.axis`. Each call runs on the
    optimization profile that fits it best. Only one thread at a time may use it.

    Args:
        path: the engine.
        device: a CUDA device; by default the current one.
        flavour: the library, instead of the manifest's.
        cuda_graph: replay a captured graph for each shape, over buffers of the runner's own that inputs are copied into
            and results out of. TensorRT-RTX captures by itself, because it knows when a kernel compiled for the shape
            has replaced the first one.
        memory: activation memory to share with other runners; by default the runner has its own.
        kernels: when TensorRT-RTX compiles kernels for the exact shape of a call: `lazy` (during the first runs),
            `eager` (before them), `none`.
        weights: the ONNX graph that an engine built with `--strip-plan` takes its weights from; by default the one
            `export` put in `onnx/` beside `engine/`.
        runtime_cache: keep the kernels that TensorRT-RTX compiles, in the cache folder, from `close` to the next
            `open`.

    Raises:
        UsageError: an unknown value of `kernels`. ArtifactError: the manifest cannot be read.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        device: torch.device | str | None = None,
        flavour: Flavour | None = None,
        *,
        cuda_graph: bool = False,
        memory: SharedMemory | None = None,
        kernels: str = "lazy",
        runtime_cache: bool = True,
        weights: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__(path, device or "cuda")
        assert self.path is not None
        if kernels not in KERNELS:
            raise UsageError(f"kernels {kernels!r}", expected=" or ".join(KERNELS))
        manifest = read_manifest(self.path.parent)
        self._built: Mapping[str, Any] | None = None if manifest is None else manifest.config
        self.flavour = (
            flavour
            or FLAVOURS.get(str((self._built or {}).get("flavour")))
            or next((f for f in FLAVOURS.values() if f.missing() is None), FLAVOURS["tensorrt-rtx"])
        )
        self.backend = self.flavour.name
        self.cuda_graph, self.kernels = cuda_graph, kernels
        self._memory, self._keeps_cache = memory, runtime_cache
        self._weights = (
            self.path.parent.parent / "onnx" / f"{self.path.stem}.onnx" if weights is None else Path(weights)
        )
        self._forget()

    def _forget(self) -> None:
        """Drop everything that `_load` sets. Contexts go before their engine, and the log last."""
        self._execution: Any = None
        self._refit: Refit | None = None
        self._config: Any = None
        self._cache: Any = None
        self._cache_file: Path | None = None
        self._engine: Any = None
        self._runtime: Any = None
        self._log: Any = None
        self._profiles: list[Ranges] = []

    def _load(self) -> None:
        self._trt = trt = self.flavour.load()
        if self.device.type != "cuda" or not torch.cuda.is_available():
            raise BackendMissing(
                f"a {self.flavour.name} engine runs on an NVIDIA GPU and there is none",
                where=self.path,
                hint="run the ONNX graph instead: it needs no GPU",
            )
        self.device = cuda_device(self.device.index)
        self._forget()
        content, digest = self._read()
        check_trusted(self.path or "", digest)
        self._log = create_log(trt)
        with torch.cuda.device(self.device):
            self._runtime = trt.Runtime(self._log)
            reason = explain_invalid(trt, self._runtime, content)
            self._engine = None if reason else self._runtime.deserialize_cuda_engine(content)
            if self._engine is None:
                raise self._mismatch(reason)
            if ((self._built or {}).get("options") or {}).get("strip_plan"):
                self._take_weights()
            if int(self._engine.streamable_weights_size) > 0:
                self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
            self._configure(digest)
            self._describe()
            obstacle = self._graph_obstacle() if self.cuda_graph else None
            if obstacle:
                warnings.warn(f"{self.path}: runs without CUDA graphs, as {obstacle}", RuntimeWarning, stacklevel=4)
            self._execution = Execution(
                self._engine,
                trt.ExecutionContextAllocationStrategy.USER_MANAGED if self._config is None else self._config,
                self.outputs,
                self.device,
                self._memory or SharedMemory(self.device),
                self._log,
                self.path,
                graphs=self.cuda_graph and obstacle is None,
                library_captures=self._library_captures,
            )
            # With TensorRT-RTX this would compile kernels for shapes that may never come.
            if self._memory is not None and not self._compiles:
                for index, ranges in enumerate(self._profiles):
                    self._execution.reserve(index, {name: best for name, (_, best, _) in ranges.items()})

    def _read(self) -> tuple[bytes, str]:
        """Returns the engine's bytes and their sha256, checked against its manifest.

        An engine without a manifest is first checked by the runtime.
        """
        assert self.path is not None
        if self._built is None:
            content = self.path.read_bytes()
            return content, hashlib.sha256(content).hexdigest()
        content, manifest = read_engine(self.path)
        check_fits_here(manifest.config, self.path, self.device)
        return content, manifest.files[self.path.name].sha256

    def _take_weights(self) -> None:
        """Put the weights into an engine that was built without them, from the graph that it was built from."""
        assert self.path is not None
        graph_sha256 = ((self._built or {}).get("model") or {}).get(self.path.stem)
        if not self._weights.is_file():
            raise EngineError(
                "the engine has no weights, and its graph is not there",
                where=self.path,
                expected=str(self._weights),
                hint="keep the onnx folder beside the engine folder, or build without --strip-plan",
            )
        if sha256_graph(self._weights) != graph_sha256:
            raise EngineMismatch(
                "the engine has no weights, and the graph is another model's",
                where=self._weights,
                expected=f"the graph {str(graph_sha256)[:12]}",
                hint="export and build again",
            )
        refitter = self._trt.Refitter(self._engine, self._log)
        parser = self._trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_file(str(self._weights)) or not refitter.refit_cuda_engine():
            reasons = (
                "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
                or self._log.last_errors()
            )
            raise EngineError(
                f"the engine did not take the graph's weights ({shorten(reasons)})",
                where=self._weights,
                hint="build again without --strip-plan",
            )

    def _configure(self, digest: str) -> None:
        """Create the configuration of every execution context, where the library has one."""
        trt = self._trt
        if not hasattr(self._engine, "create_runtime_config"):
            return
        self._config = self._engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._compiles:
            self._config.dynamic_shapes_kernel_specialization_strategy = getattr(
                trt.DynamicShapesKernelSpecializationStrategy, self.kernels.upper()
            )
        if self.cuda_graph and self._library_captures:
            self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._keeps_cache and hasattr(self._config, "create_runtime_cache"):
            self._cache_file = (
                cache_folder()
                / "runtime"
                / f"{digest[:24]}-sm{''.join(map(str, torch.cuda.get_device_capability(self.device)))}"
            )
            self._cache = self._config.create_runtime_cache()
            if (kept := read_sealed(self._cache_file)) is not None:
                self._cache.deserialize(kept)  # False for another card's or version's, and it is filled again
            self._config.set_runtime_cache(self._cache)

    @property
    def _compiles(self) -> bool:
        """Whether kernels are compiled for the shape of a call, as in TensorRT-RTX."""
        return hasattr(self._config, "dynamic_shapes_kernel_specialization_strategy")

    @property
    def _library_captures(self) -> bool:
        return hasattr(self._config, "cuda_graph_strategy")

    def _graph_obstacle(self) -> str | None:
        """Returns why no CUDA graph can hold a run of this engine, or None."""
        if int(self._engine.streamable_weights_size) > 0:
            return "its weights are streamed from the host"
        if self._compiles and not self._library_captures and self.kernels == "lazy":
            return "its kernels change while it runs (kernels='eager' compiles them first)"
        return None

    def _describe(self) -> None:
        assert self.path is not None
        trt, names = self._trt, {}
        for side in ("inputs", "outputs"):
            for entry in ((self._built or {}).get(side) or {}).get(self.path.stem) or []:
                names[entry["name"]] = entry["shape"]
        specs: dict[Any, list[TensorSpec]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
        for name in (self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)):
            kind = self._engine.get_tensor_dtype(name).name
            if kind not in DTYPES:
                raise EngineError(f"{name} is a {kind}", where=self.path, expected=f"a tensor of {', '.join(DTYPES)}")
            shape = axis_names(name, tuple(self._engine.get_tensor_shape(name)), names.get(name))
            specs[self._engine.get_tensor_mode(name)].append(TensorSpec(name, shape, DTYPES[kind]))
        self.inputs, self.outputs = tuple(specs[trt.TensorIOMode.INPUT]), tuple(specs[trt.TensorIOMode.OUTPUT])
        for index in range(self._engine.num_optimization_profiles):
            ranges = {
                spec.name: [tuple(shape) for shape in self._engine.get_tensor_profile_shape(spec.name, index)]
                for spec in self.inputs
            }
            self._profiles.append({name: (least, best, most) for name, (least, best, most) in ranges.items()})

    def _fixed_weights(self) -> EngineError:
        """Returns the error for an engine whose weights cannot be exchanged."""
        built = self._built or {}
        if str(built.get("precision")) in ("int8", "fp8"):
            return super()._fixed_weights()
        return EngineError(
            "takes no LoRA: it was built with --no-lora, or on a machine without its card",
            where=self.path,
            hint=f"here, {REBUILD}, or with --lora FILE:WEIGHT",
        )

    def _exchange(self, changes: Mapping[str, torch.Tensor], key: Hashable) -> None:
        """Refit the engine. Captured graphs are dropped, because a library may move the weights."""

        def read(name: str) -> torch.Tensor:
            value = changes[name] if name in changes else self.read_weight(name)
            return value.t() if self.weights[name].transposed else value

        with torch.cuda.device(self.device):
            torch.cuda.synchronize(self.device)  # the engine may still run
            self._execution.drop_graphs()
            self._refit = self._refit or Refit(self._trt, self._engine, self._log, self.device, self.path)
            self._refit.exchange([*changes, *(self._changed - set(changes))], read)

    def _mismatch(self, reason: str | None) -> EngineMismatch:
        built = self._built
        origin = (
            f"it was built with {built.get('flavour')} {built.get('version')} for compute capability"
            f" {built.get('compute_capabilities')}"
            if built
            else "it has no manifest that says what built it"
        )
        here = (
            f"{self.flavour.name} {self.flavour.version} on {torch.cuda.get_device_name(self.device)}"
            f" {torch.cuda.get_device_capability(self.device)}"
        )
        return EngineMismatch(
            f"the engine does not load: {origin}, and here is {here} ({reason or self._log.last_errors()})",
            where=self.path,
            hint=f"here, {REBUILD}",
        )

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        profile = choose_profile(self._profiles, shapes)
        if profile is None:
            assert self.path is not None
            raise make_shape_error(
                self._profiles,
                shapes,
                self.inputs,
                self.path.stem,
                int((self._built or {}).get("vae_scale", 8)),
                self.path,
            )
        with torch.cuda.device(self.device):
            return self._execution.run(profile, shapes, feeds)

    def _release(self) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.synchronize(self.device)
            if self._cache is not None and self._cache_file is not None:
                write_sealed(self._cache_file, bytes(self._cache.serialize()))
            self._forget()
