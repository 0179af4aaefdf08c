"""Counts the work of a component's call without running it: multiply-adds, and bytes that have to be moved.

    macs               multiply-adds of convolutions, matrix products and attention; two operations each where a figure
                       is in FLOPs
    weight_bytes       weights the call reads, each once
    activation_bytes   what every convolution, matrix product and attention reads and writes

This describes an ideal execution: norms, activations, additions, up-sampling and casts are fused into the operator
before or after them, and the scores of attention are never written. No backend reaches it, and every backend can be
compared with it: `peaks.roofline` returns the share of the device's measured peaks. Convolutions count by their
definition. A backend that uses Winograd's method multiplies less, so its share comes out higher. Causal attention
counts as full attention, a grouped convolution only what its groups multiply.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sdcompress_engines.errors import ModelError, UsageError
from sdcompress_engines.signature import CONTEXT_TOKENS, context_width
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from sdcompress.families.schemas.check import is_tiny_vae
from sdcompress.support.pipeline import vae_config

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
"""Precision → bytes of a value, weight or activation."""


@dataclass(frozen=True)
class Work:
    """The work of one call; the module's docstring defines what counts.

    Attributes:
        macs: multiply-adds.
        weight_bytes, activation_bytes: as the module's docstring defines them.
        peak_bytes: the most that inputs, outputs and intermediate tensors take at once, in an eager run without
            gradients and with fused attention. Workspaces of operators and what an allocator keeps are not in it.
        table_bytes: lookup tables (token and position embeddings). They are held in memory, but a call moves only a few
            rows.
    """

    macs: int
    weight_bytes: int
    activation_bytes: int
    peak_bytes: int
    table_bytes: int = 0

    @property
    def moved_bytes(self) -> int:
        """Bytes that have to go through the device's memory: weights and activations."""
        return self.weight_bytes + self.activation_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that are held between calls: weights and tables."""
        return self.weight_bytes + self.table_bytes


def count_work(
    component: torch.nn.Module, example: Mapping[str, Any], bytes_per_value: int, method: str = "forward"
) -> Work:
    """Returns the `Work` of one call of a component.

    It is counted on the meta device: nothing is computed, and the component's weights are not touched.

    Args:
        component: a module on any device, in any dtype.
        example: the call's arguments by name, tensors on any device: a UNet's `sample`, `timestep`,
            `encoder_hidden_states` and SDXL's `added_cond_kwargs`, a text encoder's `input_ids`, the `z` of a VAE's
            `decode`, or the `x` of a small decoder's.
        bytes_per_value: of every floating-point value, whatever the component's dtype; other values have their own.
        method: the component's method that is called.

    Raises:
        UsageError: `bytes_per_value` is under 1.
        ModelError: the component does not take the example.
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
    """Returns a copy on the meta device, in evaluation mode; the component itself does not change."""
    memo: dict[int, Any] = {
        id(weight): torch.nn.Parameter(_meta(weight), requires_grad=False) for weight in component.parameters()
    }
    memo |= {id(held): _meta(held) for held in component.buffers()}
    return copy.deepcopy(component, memo).eval()


def _meta(value: Any) -> Any:
    """Returns a tensor on the meta device, and any other value as it is.

    Floats become float32, because a component and its example may have different dtypes.
    """
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to("meta", torch.float32 if value.is_floating_point() else value.dtype)


class _Counter(TorchDispatchMode):
    """Counts the operators that run. Tensors are identified by their storage, so a view is no new tensor.

    Multiply-adds come from torch's `flop_registry`. `FlopCounterMode`, which uses it, counts no bytes, and on the meta
    device it sees attention as its parts.
    """

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
        inputs = _tensors((args, kwargs))
        table = func is torch.ops.aten.embedding.default and args[0].untyped_storage()._cdata
        for key in {tensor.untyped_storage()._cdata for tensor in inputs} & self.weights.keys():
            (self.tables if key == table else self.read).add(key)
        if func._overloadpacket in flop_registry:
            macs = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out) // 2
            self.add(macs, [*inputs, *_tensors(out)])
        for tensor in _tensors(out):
            self._watch(tensor)
        return out

    def add(self, macs: int, moved: list[torch.Tensor]) -> None:
        """Add one operator: its multiply-adds, and the tensors it reads and writes.

        Weights among the tensors are counted elsewhere.
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
        """Returns the bytes of a tensor's storage, or of at most `at_most` values of it."""
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

        def forget(_: weakref.ref[Any]) -> None:
            del self._alive[key]
            self._alive_bytes -= size

        self._alive[key] = weakref.ref(storage, forget)
        self._alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)


class _FusedAttention(TorchFunctionMode):
    """Counts torch's attention as one operator, as it is on CPU and GPU.

    On the meta device torch splits it into its parts, with the scores.
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
        # The kernels lay out their result as (batch, length, heads, width), so that a model merges the heads without a
        # copy.
        shape = (
            (*batch[:-1], length, batch[-1], value.shape[-1]) if len(batch) > 1 else (*batch, length, value.shape[-1])
        )
        out = query.new_empty(shape)
        out = out.transpose(-3, -2) if len(batch) > 1 else out
        inputs = [query, key, value] + ([] if attn_mask is None else [attn_mask])
        self.counter.add(math.prod(batch) * length * key.shape[-2] * (width + value.shape[-1]), [*inputs, out])
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def count_pipeline(
    model: str | Path | Mapping[str, Mapping[str, Any]], size_px: int, batch: int, guided: bool, precision: str
) -> dict[str, Work]:
    """Returns component → `Work` of one call: `unet`, `text_encoder`, `vae_decoder`, and `text_encoder_2` if it exists.

    Only configs are read; no weights are loaded or created.

    Args:
        model: what `load_pipeline` takes, or the configs by the pipeline's names (`unet`, `vae`, `text_encoder`,
            `text_encoder_2`).
        size_px: side of the pictures.
        batch: pictures in one call.
        guided: with classifier-free guidance the UNet gets 2·batch latents. The text encoder is called once for `batch`
            captions and once more for the empty one.
        precision: a key of `BYTES`.

    Raises:
        UsageError: an impossible size, batch or precision.
        ModelError: this is no Stable Diffusion pipeline.
    """
    if precision not in BYTES:
        raise UsageError(f"no precision {precision!r}", expected=" or ".join(BYTES))
    if batch < 1:
        raise UsageError(f"a batch of {batch}", expected="at least 1")
    parts = build_on_meta(_choose_configs(model))
    unet, vae = parts["unet"], parts["vae"]
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    levels = 2 ** (len(unet.config.block_out_channels) - 1)
    if size_px < 1 or size_px % factor:
        raise UsageError(f"pictures of {size_px} px", expected=f"a multiple of {factor * levels}")
    side, rows = size_px // factor, batch * (2 if guided else 1)
    with torch.device("meta"):
        latents = torch.empty(batch, vae.config.latent_channels, side, side)
        examples: dict[str, tuple[str, dict[str, Any], str]] = {
            "unet": ("unet", _unet_example(unet.config, rows, side), "forward"),
            "vae_decoder": ("vae", {"x" if is_tiny_vae(vae_config(vae)) else "z": latents}, "decode"),
        }
        for name in parts.keys() & {"text_encoder", "text_encoder_2"}:
            examples[name] = (name, {"input_ids": torch.zeros(batch, CONTEXT_TOKENS, dtype=torch.long)}, "forward")
    return {
        name: count_work(parts[part], example, BYTES[precision], method)
        for name, (part, example, method) in sorted(examples.items())
    }


def _unet_example(config: Any, rows: int, side: int) -> dict[str, Any]:
    """Returns the inputs of a UNet, SDXL's further ones included."""
    example: dict[str, Any] = {
        "sample": torch.empty(rows, config.in_channels, side, side),
        "timestep": torch.empty(rows),
        "encoder_hidden_states": torch.empty(rows, CONTEXT_TOKENS, context_width(config)),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(rows, width), "time_ids": torch.empty(rows, 6)}
        example["added_cond_kwargs"] = added
    return example


def _choose_configs(model: str | Path | Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    if not isinstance(model, Mapping):
        return read_pipeline_configs(model)
    lacking = {"unet", "vae", "text_encoder"} - model.keys()
    if lacking:
        raise ModelError(
            f"no config of the {', '.join(sorted(lacking))}", expected="those of unet, vae and text_encoder"
        )
    return {name: model[name] for name in ("unet", "vae", "text_encoder", "text_encoder_2") if name in model}


def read_pipeline_configs(path: str | Path) -> dict[str, Mapping[str, Any]]:
    """Returns the configs that `count_pipeline` needs, by the pipeline's names; no weights are read.

    Args:
        path: what `load_pipeline` takes.

    Raises:
        UsageError: the path does not exist.
        ModelError: this is no Stable Diffusion pipeline.
    """
    from sdcompress.models.locate import locate_pipeline, read_component_config, read_model_index

    second = ("text_encoder_2",) if "text_encoder_2" in read_model_index(locate_pipeline(path)) else ()
    return {name: read_component_config(path, name) for name in ("unet", "vae", "text_encoder", *second)}


def build_on_meta(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the components of these configs on the meta device, without weights.

    Args:
        configs: by the pipeline's names, with that of the `unet`.
    """
    from sdcompress.families.build import build_module
    from sdcompress.families.registry import family_of_pipeline

    class_name = "StableDiffusionXLPipeline" if "text_encoder_2" in configs else "StableDiffusionPipeline"
    family = family_of_pipeline(class_name, configs["unet"])
    with torch.device("meta"):
        return {
            name: build_module(name, config, f"the config of the {name}", family) for name, config in configs.items()
        }
