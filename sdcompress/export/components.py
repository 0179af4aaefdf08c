"""A pipeline's components as graphs: a frozen copy with a host's inputs and outputs, and inputs to trace it with."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sdcompress_engines.errors import ModelError
from sdcompress_engines.runners import TensorSpec
from sdcompress_engines.signature import COMPONENTS, CONTEXT_TOKENS, HOSTS, Signature, signature

from sdcompress.support.quiet import quiet

Precision = Literal["fp32", "fp16", "bf16"]

Runtime = Literal["any", "onnxruntime"]
"""Whose kernels a graph is written for: `any` keeps `GroupNormalization`, which TensorRT has a kernel for; see
`onnxruntime_ops`.
"""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

PARTS = {
    "unet": "unet",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
}
"""Component → what a pipeline calls the module it is a part of."""


def part_of(pipeline: Any, component: str) -> torch.nn.Module:
    """The module a component is exported from.

    Raises:
        ModelError: the pipeline has none.
    """
    part = getattr(pipeline, PARTS[component], None)
    if not isinstance(part, torch.nn.Module):
        raise ModelError(f"the pipeline has no {PARTS[component]}", hint="--component with those it has")
    return part


def default_components(pipeline: Any, host: str = "diffusers") -> tuple[str, ...]:
    """What text-to-image needs of a pipeline in a host: all it has but the VAE's encoder; a WebUI runs its own but the
    UNet.
    """
    return tuple(
        name
        for name in COMPONENTS
        if name != "vae_encoder"
        and name in HOSTS[host]
        and isinstance(getattr(pipeline, PARTS[name], None), torch.nn.Module)
    )


def config_of(part: Any) -> dict[str, Any]:
    """The diffusers or transformers config of a module, as a dict."""
    return part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)


def stable_precision(pipeline: Any, component: str, precision: Precision) -> Precision:
    """The precision a component is exported in where `precision` is asked for.

    SDXL's VAE overflows in half precision and makes black pictures; its config says so (`force_upcast`), and it stays
    fp32. A VAE that was mended for half precision says the contrary.
    """
    is_xl = getattr(pipeline, "text_encoder_2", None) is not None
    overflows = (
        is_xl
        and component.startswith("vae")
        and precision == "fp16"
        and config_of(part_of(pipeline, component)).get("force_upcast", True)
    )
    return "fp32" if overflows else precision


class ComponentGraph(torch.nn.Module):
    """A frozen copy of a component on the CPU, with the graph's inputs as arguments and its outputs as a tuple, both in
    the order of the signature.

    Weights that are in `dtype` already are shared with the component, not copied.

    Args:
        stable: in half precision, compute what loses most in fp32. Without it the graph is what torch computes in
            `dtype`.
    """

    fp32_parts: tuple[str, ...] = ()

    def __init__(self, part: torch.nn.Module, dtype: torch.dtype, *, stable: bool = True) -> None:
        super().__init__()
        self.stable = stable and dtype != torch.float32
        exact = {
            id(weight)
            for name in self.fp32_parts
            if self.stable and (held := getattr(part, name, None)) is not None
            for weight in held.parameters()
        }
        memo: dict[int, Any] = {}
        for weight in part.parameters():
            memo[id(weight)] = torch.nn.Parameter(
                weight.detach().to("cpu", torch.float32 if id(weight) in exact else dtype), requires_grad=False
            )
        for held in part.buffers():
            memo[id(held)] = held.detach().to("cpu", dtype if held.is_floating_point() else held.dtype)
        with quiet():
            copied: Any = copy.deepcopy(part, memo)
        if hasattr(copied, "set_attn_processor"):
            from diffusers.models.attention_processor import AttnProcessor2_0

            copied.set_attn_processor(
                AttnProcessor2_0()
            )  # torch's own attention, one node in the graph; slicing or xformers would be traced
        self.part: Any = copied
        self.eval()


class _Cast(torch.nn.Module):
    def __init__(self, before: torch.nn.Module | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.before: torch.nn.Module = before or torch.nn.Identity()
        self.dtype = dtype

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.before(value)
        return out.to(self.dtype)


class UNetGraph(ComponentGraph):
    """The UNet.

    The embeddings of timestep and sizes stay fp32: sines of large arguments, two small layers, added to every block.
    """

    fp32_parts = ("time_embedding", "add_embedding")

    def __init__(self, part: torch.nn.Module, dtype: torch.dtype, *, stable: bool = True) -> None:
        super().__init__(part, dtype, stable=stable)
        unet = self.part
        if self.stable:
            unet.get_time_embed = lambda sample, timestep: unet.time_proj(timestep)
            unet.time_embed_act = _Cast(unet.time_embed_act, dtype)
        if getattr(unet, "add_embedding", None) is not None:
            unet.get_aug_embed = self._added

    def _added(
        self, emb: torch.Tensor, encoder_hidden_states: torch.Tensor, added_cond_kwargs: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The embedding of SDXL's text and sizes, in `emb`'s dtype; `y` is their concatenation, ready made."""
        added = added_cond_kwargs.get("y")
        if added is None:
            ids = added_cond_kwargs["time_ids"]
            sizes = self.part.add_time_proj(ids.flatten()).reshape(ids.shape[0], -1)
            added = torch.cat([added_cond_kwargs["text_embeds"].to(sizes.dtype), sizes], dim=-1)
        return self.part.add_embedding(added.to(emb.dtype))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds_or_y: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        added = {"y": text_embeds_or_y} if time_ids is None else {"text_embeds": text_embeds_or_y, "time_ids": time_ids}
        return tuple(self.part(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False))


class TextEncoderGraph(ComponentGraph):
    """CLIP's text model: the last state after its norm, the embedding of the end token, and the state before the last
    layer (SDXL, "clip skip 2").
    """

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.part(input_ids, output_hidden_states=True)
        return found.last_hidden_state, found.pooler_output, found.hidden_states[-2]


class ProjectingTextEncoderGraph(ComponentGraph):
    """SDXL's second text model, whose end token's embedding is projected."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.part(input_ids, output_hidden_states=True)
        return found.text_embeds, found.last_hidden_state, found.hidden_states[-2]


class VaeDecoderGraph(ComponentGraph):
    """Latents, divided by the scaling factor already, to pictures."""

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.part.decode(latent_sample, return_dict=False))


class VaeEncoderGraph(ComponentGraph):
    """Pictures to mean and log-variance of their latents, which are not scaled yet."""

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.part.encode(sample).latent_dist.parameters,)


_GRAPHS: dict[str, type[ComponentGraph]] = {
    "unet": UNetGraph,
    "text_encoder": TextEncoderGraph,
    "text_encoder_2": ProjectingTextEncoderGraph,
    "vae_decoder": VaeDecoderGraph,
    "vae_encoder": VaeEncoderGraph,
}


def component_graph(
    component: str, part: torch.nn.Module, dtype: torch.dtype, *, stable: bool = True
) -> ComponentGraph:
    """The component as a module that takes the inputs of any host's signature in order; see `ComponentGraph`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _GRAPHS[component](part, dtype, stable=stable)


@dataclass(frozen=True)
class Example:
    """What a component is traced with: its inputs, and by input the free axes."""

    inputs: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, dict[int, Any]]


def example_of(wanted: Signature, config: Any) -> Example:
    """Inputs to trace with.

    One `Dim` a free axis; a picture's sizes are multiples, or a UNet's skip connections would not fit.
    """
    grown = {
        name: size * max(1, wanted.multiple)
        for name, size in {"height": 2, "width": 3, "image_height": 2, "image_width": 3}.items()
    }
    sizes = {"batch": 2, "tokens": 2 * CONTEXT_TOKENS} | grown
    if wanted.component == "vae_decoder":
        sizes |= {"height": 16, "width": 24}
    # diffusers makes batches of 64 and more contiguous before it upsamples: a branch without effect on the graph, which
    # would have torch capture the model a second time were the example's side of it not promised.
    dims = {name: torch.export.Dim(name, max=63 if name == "batch" else None) for name in sizes}

    def axis(size: str) -> Any:
        return wanted.multiple * dims[size] if wanted.multiple > 1 and size in grown else dims[size]

    free = {
        spec.name: {at: axis(size) for at, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in wanted.inputs
    }
    return Example(random_inputs(wanted, config, sizes, timestep=500), free)


def random_inputs(wanted: Signature, config: Any, sizes: Mapping[str, int], timestep: float) -> dict[str, torch.Tensor]:
    """Random inputs of a component by the host's names, the same for the same timestep and sizes.

    Args:
        sizes: free axis → size. timestep: of the first sample; each further one is half a step earlier.
    """
    generator = torch.Generator().manual_seed(int(timestep))
    canonical = {given: name for name, given in wanted.names.items()}

    def make(spec: TensorSpec) -> torch.Tensor:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        name = canonical[spec.name]
        if name == "input_ids":
            ids = torch.randint(0, config.vocab_size, shape, generator=generator)
            ids[:, -1] = min(config.eos_token_id, config.vocab_size - 1)
            return ids
        if name == "timestep":
            return torch.full(shape, float(timestep)) - torch.arange(shape[0]) / 2
        if name == "time_ids":
            return torch.tensor([1024.0, 1024, 0, 0, 1024, 1024]).expand(shape).contiguous()
        return torch.randn(shape, generator=generator).to(spec.dtype)

    return {spec.name: make(spec) for spec in wanted.inputs}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Silence what exporting prints, warns and logs; a failure still raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def weights_of(part: torch.nn.Module) -> int:
    """How many parameters a module has."""
    return sum(p.numel() for p in part.parameters())


def signature_of(component: str, part: torch.nn.Module, precision: Precision, host: str = "diffusers") -> Signature:
    """The signature of a module in a precision."""
    return signature(component, config_of(part), DTYPES[precision], host)
