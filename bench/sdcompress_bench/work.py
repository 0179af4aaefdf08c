"""How much work a call of a component is, counted without running it, and how fast this device could do that at best,
measured.

    macs               multiply-adds of convolutions, matrix products and attention; two operations each where a figure
    is in FLOPs weight_bytes       weights the call reads, each once activation_bytes   what every convolution, matrix
    product and attention reads and writes

That is an execution which fuses all else (norms, activations, additions, up-sampling, casts) into the operator before
or after it and never writes the scores of attention. No backend reaches it and all can be held against it: `roofline`
says what share of the device's measured peaks a measured time is. Convolutions count as they are defined: a backend
that takes Winograd's way multiplies less, and its share comes out higher for that. Causal attention counts whole, a
grouped convolution only what its groups multiply.
"""

from __future__ import annotations

import copy
import math
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from sdcompress_engines.errors import BackendMissing, ModelError, UsageError
from sdcompress_engines.signature import CONTEXT_TOKENS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from sdcompress.export.components import DTYPES

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
"""Precision → bytes of a value, weight or activation."""
_MATMUL_SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192, 16384)}
_COPY_BYTES = {
    "cpu": 2**28,
    "cuda": 2**30,
}  # a CPU's last cache has up to a few hundred MiB, and source and target do not share it
_BUDGET_S = {"cpu": 1.5, "cuda": 0.3}


@dataclass(frozen=True)
class Work:
    """What one call is; the module's docstring says what counts.

    Attributes:
        peak_bytes: the most that is alive at once of inputs, outputs and what lies between in an eager run without
            gradients, its attention fused; not what an operator takes for itself and frees (workspaces), nor what an
            allocator keeps.
        table_bytes: lookup tables (token and position embeddings), which are held but of which a call moves only a few
            rows.
    """

    macs: int
    weight_bytes: int
    activation_bytes: int
    peak_bytes: int
    table_bytes: int = 0

    @property
    def moved_bytes(self) -> int:
        """What has to go through the device's memory: weights and activations."""
        return self.weight_bytes + self.activation_bytes

    @property
    def held_bytes(self) -> int:
        """Weights and tables, which are held between calls too."""
        return self.weight_bytes + self.table_bytes


@dataclass(frozen=True)
class Peaks:
    """What a device reached: in a square matrix product of `precision` (two operations a multiply-add), and copying
    memory (read and written bytes both count).
    """

    matmul_flops_per_s: float
    bandwidth_bytes_per_s: float
    precision: str


class Roofline(TypedDict):
    """A measured time beside the device's limits.

    Shares are of 1; `least_ms` is the longer of what the matmul peak and the bandwidth allow, `bound` which that is.
    """

    share_of_matmul_peak: float
    share_of_bandwidth: float
    least_ms: float
    bound: str


def count_work(
    component: torch.nn.Module, example: Mapping[str, Any], bytes_per_value: int, method: str = "forward"
) -> Work:
    """The `Work` of one call of `component`, counted on the meta device: nothing is computed, and weights that are
    elsewhere are not touched.

    Args:
        example: the call's arguments by name, tensors on any device: a UNet's `sample`, `timestep`,
            `encoder_hidden_states` and SDXL's `added_cond_kwargs`, a text encoder's `input_ids`, the `z` of a VAE's
            `decode`.
        bytes_per_value: of every floating-point value, whatever dtype the component is in; others have their own.
        method: which of the component's methods is called.

    Raises:
        UsageError: `bytes_per_value` under 1. ModelError: the component does not take the example.
    """
    if bytes_per_value < 1:
        raise UsageError(f"{bytes_per_value} bytes a value", expected="at least 1")
    module = _to_meta(component)
    arguments = tree_map(_meta, dict(example))
    counter = _Counter(module, arguments, bytes_per_value)
    try:
        with torch.no_grad(), _FusedAttention(counter), counter:
            getattr(module, method)(**arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{type(component).__name__}.{method} does not take {', '.join(example)}: {str(error).splitlines()[0]}"
        ) from error
    return counter.work()


def _to_meta(component: torch.nn.Module) -> torch.nn.Module:
    """A copy on the meta device, in inference mode; the component itself stays as and where it is."""
    memo: dict[int, Any] = {
        id(weight): torch.nn.Parameter(_meta(weight), requires_grad=False) for weight in component.parameters()
    }
    memo |= {id(held): _meta(held) for held in component.buffers()}
    return copy.deepcopy(component, memo).eval()


def _meta(value: Any) -> Any:
    """A tensor on the meta device, one float dtype for all, as a component may be in another than its example; what is
    no tensor as it is.
    """
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to("meta", torch.float32 if value.is_floating_point() else value.dtype)


class _Counter(TorchDispatchMode):
    """Counts the operators it sees. A tensor is known by its storage, so a view is no tensor of its own."""

    def __init__(self, module: torch.nn.Module, arguments: Mapping[str, Any], bytes_per_value: int) -> None:
        super().__init__()
        self.bytes_per_value = bytes_per_value
        self.weights = {weight.untyped_storage()._cdata: weight for weight in (*module.parameters(), *module.buffers())}
        self.read: set[int] = set()
        self.tables: set[int] = set()
        self.macs = self.activation_bytes = self.peak_bytes = self._alive_bytes = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        for leaf in _tensors(arguments):
            self._watch(leaf)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = _tensors((args, kwargs))
        table = func is torch.ops.aten.embedding.default and args[0].untyped_storage()._cdata
        for key in {tensor.untyped_storage()._cdata for tensor in given} & self.weights.keys():
            (self.tables if key == table else self.read).add(key)
        if func._overloadpacket in flop_registry:
            self.add(
                flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out) // 2, [*given, *_tensors(out)]
            )
        for tensor in _tensors(out):
            self._watch(tensor)
        return out

    def add(self, macs: int, moved: list[torch.Tensor]) -> None:
        """One operator: its multiply-adds, and the tensors it reads and writes; those of them that are weights count
        elsewhere.
        """
        self.macs += macs
        self.activation_bytes += sum(
            self._size(tensor, tensor.numel())
            for tensor in moved
            if tensor.untyped_storage()._cdata not in self.weights
        )

    def work(self) -> Work:
        def held(keys: set[int]) -> int:
            return sum(self._size(self.weights[key]) for key in keys)

        return Work(self.macs, held(self.read - self.tables), self.activation_bytes, self.peak_bytes, held(self.tables))

    def _size(self, tensor: torch.Tensor, at_most: int | None = None) -> int:
        """Bytes of a tensor's storage, or of `at_most` values of it: of a broadcast tensor only what is there."""
        values = tensor.untyped_storage().nbytes() // tensor.element_size()
        return (values if at_most is None else min(values, at_most)) * (
            self.bytes_per_value if tensor.is_floating_point() else tensor.element_size()
        )

    def _watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self.weights:
            return
        size = self._size(tensor)

        def gone(_: weakref.ref[Any]) -> None:
            del self._alive[key]
            self._alive_bytes -= size

        self._alive[key] = weakref.ref(storage, gone)
        self._alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)


class _FusedAttention(TorchFunctionMode):
    """Torch's attention as the one operator it is on CPU and GPU; on the meta device it would fall into its parts,
    scores and all.
    """

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        *batch, length, width = query.shape
        # The kernels lay their result out as (batch, length, heads, width), which is what lets a model merge the heads
        # without a copy.
        shape = (
            (*batch[:-1], length, batch[-1], value.shape[-1]) if len(batch) > 1 else (*batch, length, value.shape[-1])
        )
        out = query.new_empty(shape)
        out = out.transpose(-3, -2) if len(batch) > 1 else out
        given = [query, key, value] + ([] if attn_mask is None else [attn_mask])
        self.counter.add(math.prod(batch) * length * key.shape[-2] * (width + value.shape[-1]), [*given, out])
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def count_pipeline(
    model: str | Path | Mapping[str, Mapping[str, Any]], size_px: int, batch: int, guided: bool, precision: str
) -> dict[str, Work]:
    """Component → `Work` of one call: `unet`, `text_encoder`, `vae_decoder`, and `text_encoder_2` where there is one.

    From configs alone; no weights are read or made.

    Args:
        model: what `load_pipeline` takes, or the configs by the pipeline's names (`unet`, `vae`, `text_encoder`,
            `text_encoder_2`).
        size_px: side of the pictures. batch: pictures in one call.
        guided: classifier-free guidance, which gives the UNet 2·batch latents; the text encoder is called once for
            `batch` captions and once more for the empty one.
        precision: a key of `BYTES`.

    Raises:
        UsageError: a size, batch or precision that cannot be. ModelError: not a Stable Diffusion pipeline.
    """
    if precision not in BYTES:
        raise UsageError(f"no precision {precision!r}", expected=" or ".join(BYTES))
    if batch < 1:
        raise UsageError(f"a batch of {batch}", expected="at least 1")
    parts = {name: _build(name, config) for name, config in _configs(model).items()}
    unet, vae = parts["unet"], parts["vae"]
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    levels = 2 ** (len(unet.config.block_out_channels) - 1)
    if size_px < 1 or size_px % factor:
        raise UsageError(f"pictures of {size_px} px", expected=f"a multiple of {factor * levels}")
    side, rows = size_px // factor, batch * (2 if guided else 1)
    with torch.device("meta"):
        latents = {"sample": torch.empty(rows, unet.config.in_channels, side, side), "timestep": torch.empty(rows)}
        examples: dict[str, tuple[str, dict[str, Any], str]] = {
            "unet": (
                "unet",
                latents
                | {"encoder_hidden_states": torch.empty(rows, CONTEXT_TOKENS, unet.config.cross_attention_dim)}
                | _sizes(unet.config, rows),
                "forward",
            ),
            "vae_decoder": ("vae", {"z": torch.empty(batch, vae.config.latent_channels, side, side)}, "decode"),
        }
        for name in parts.keys() & {"text_encoder", "text_encoder_2"}:
            examples[name] = (name, {"input_ids": torch.zeros(batch, CONTEXT_TOKENS, dtype=torch.long)}, "forward")
    return {
        name: count_work(parts[part], example, BYTES[precision], method)
        for name, (part, example, method) in sorted(examples.items())
    }


def _sizes(config: Any, rows: int) -> dict[str, Any]:
    """SDXL's further inputs of a UNet."""
    if config.addition_embed_type != "text_time":
        return {}
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {"added_cond_kwargs": {"text_embeds": torch.empty(rows, width), "time_ids": torch.empty(rows, 6)}}


def _configs(model: str | Path | Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    from sdcompress.models.locate import component_config, model_index, resolve

    if isinstance(model, Mapping):
        lacking = {"unet", "vae", "text_encoder"} - model.keys()
        if lacking:
            raise ModelError(
                f"no config of the {', '.join(sorted(lacking))}", expected="those of unet, vae and text_encoder"
            )
        return {name: model[name] for name in ("unet", "vae", "text_encoder", "text_encoder_2") if name in model}
    second = ("text_encoder_2",) if "text_encoder_2" in model_index(resolve(model)) else ()
    return {name: component_config(model, name) for name in ("unet", "vae", "text_encoder", *second)}


def _build(name: str, config: Mapping[str, Any]) -> Any:
    """A component without weights, on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from sdcompress.support.quiet import quiet

    with torch.device("meta"), quiet():
        if name == "unet":
            return UNet2DConditionModel.from_config(dict(config))
        if name == "vae":
            return AutoencoderKL.from_config(dict(config))
        return (CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection)(
            CLIPTextConfig.from_dict(dict(config))
        )


def measure_peaks(
    device: str, precision: str, *, budget_s: float | None = None, copy_bytes: int | None = None
) -> Peaks:
    """The best this device does now in what UNets are made of: square matrix products of several sizes, laid out as a
    linear layer's, and a copy far larger than its caches.

    Takes 5 to 10 s on a small CPU, under 3 s on a GPU, and some memory (1 GiB; 2 GiB on a GPU). The best of many calls
    is given: a limit is wanted, not a mean.

    Args:
        budget_s: for the copy and for each size of a product; by default what the device needs for a steady figure.
        copy_bytes: how much is copied; by default far more than the device's caches hold.

    Raises:
        UsageError: a precision other than fp32, fp16, bf16. BackendMissing: there is no such device.
    """
    if precision not in DTYPES:
        raise UsageError(f"no peak is measured in {precision!r}", expected=" or ".join(DTYPES))
    kind = device.partition(":")[0]
    if kind not in _MATMUL_SIDES or (kind == "cuda" and not torch.cuda.is_available()):
        raise BackendMissing(
            f"no device {device!r}", expected="cpu" if not torch.cuda.is_available() else "cpu or cuda"
        )
    dtype: torch.dtype = DTYPES[precision]
    flops, seconds, budget_s = 0.0, 0.0, budget_s or _BUDGET_S[kind]
    for side in _MATMUL_SIDES[kind]:
        if (
            8 * seconds > budget_s
        ):  # the next size takes eight times as long: fp16 on a CPU that has no instructions for it
            break
        seconds = _best(_product(side, device, dtype), device, budget_s)
        flops = max(flops, 2 * side**3 / seconds)
    size = copy_bytes or _COPY_BYTES[kind]
    size = size if kind == "cpu" else min(size, torch.cuda.mem_get_info(device)[0] // 4)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return Peaks(flops, 2 * size / _best(lambda: target.copy_(source), device, budget_s), precision)


def _product(side: int, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    left, right, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(left, right.t(), out=out)


def _best(call: Callable[[], Any], device: str, budget_s: float) -> float:
    """Seconds of the quickest call of at least 4 within a budget, after one that warms up."""
    call()
    clock = _events if device.startswith("cuda") else _wall
    found, end = [clock(call)], time.perf_counter() + budget_s
    while len(found) < 4 or time.perf_counter() < end:
        found.append(clock(call))
    return min(found)


def _wall(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _events(call: Callable[[], Any], calls: int = 4) -> float:
    """Seconds a call on the device, several in a row, so that starting them does not count."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(calls):
        call()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended) / 1000 / calls


def roofline(work: Work, peaks: Peaks, step_s: float) -> Roofline:
    """How near a call that took `step_s` seconds is to the device's limits.

    Raises:
        UsageError: a time that is not over 0.
    """
    if not step_s > 0:
        raise UsageError(f"a step of {step_s} s", expected="more than 0")
    compute_s = 2 * work.macs / peaks.matmul_flops_per_s
    memory_s = work.moved_bytes / peaks.bandwidth_bytes_per_s
    return {
        "share_of_matmul_peak": compute_s / step_s,
        "share_of_bandwidth": memory_s / step_s,
        "least_ms": 1000 * max(compute_s, memory_s),
        "bound": "compute" if compute_s >= memory_s else "memory",
    }
