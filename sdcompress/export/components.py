"""The components of a pipeline as graphs with the inputs and outputs of a host, and inputs to trace them with."""

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

from sdcompress.support.pipeline import TextToImagePipeline
from sdcompress.support.quiet import quiet

Precision = Literal["fp32", "fp16", "bf16"]

Runtime = Literal["any", "onnxruntime"]
"""The runtime that a graph is written for. `any` keeps `GroupNormalization`, for which TensorRT has a kernel;
`onnxruntime` replaces it, see `onnxruntime_ops`.
"""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_LEAST_LOGVAR = -30.0
"""Of diffusers' `DiagonalGaussianDistribution`."""

PARTS = {
    "unet": "unet",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
}
"""Component → the name that a pipeline has for the module it is a part of."""


def part_of(pipeline: TextToImagePipeline, component: str) -> torch.nn.Module:
    """Returns the module that a component is exported from.

    Raises:
        ModelError: the pipeline has no such module.
    """
    part = getattr(pipeline, PARTS[component], None)
    if not isinstance(part, torch.nn.Module):
        raise ModelError(f"the pipeline has no {PARTS[component]}", hint="--component with those it has")
    return part


def default_components(pipeline: TextToImagePipeline, host: str = "diffusers") -> tuple[str, ...]:
    """Returns the components that a host needs for text-to-image: all but the VAE's encoder.

    A WebUI needs the UNet only, as it runs its own text encoder and VAE.
    """
    return tuple(
        name
        for name in COMPONENTS
        if name != "vae_encoder"
        and name in HOSTS[host]
        and isinstance(getattr(pipeline, PARTS[name], None), torch.nn.Module)
    )


def config_of(part: Any) -> dict[str, Any]:
    """Returns the diffusers or transformers config of a module as a dict."""
    return part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)


def stable_precision(pipeline: TextToImagePipeline, component: str, precision: Precision) -> Precision:
    """Returns the precision that a component is exported in.

    SDXL's VAE overflows in fp16 and draws black pictures. Its config has `force_upcast` then, and it stays fp32. The
    config of a VAE that was repaired for fp16 has `force_upcast` turned off.

    Args:
        pipeline: in torch.
        component: a key of `PARTS`.
        precision: the requested one.
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
    """A frozen copy of a component on the CPU.

    It takes the inputs of the graph as arguments and returns its outputs as a tuple, both in the order of the
    signature. Weights that are in `dtype` already are shared with the component, not copied.

    Args:
        part: the module that the component is a part of.
        dtype: of the weights.
        stable: in half precision, compute in fp32 what loses most. Without it the graph computes what torch computes in
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

            # torch's own attention is one node in the graph. Slicing or xformers would be traced.
            copied.set_attn_processor(AttnProcessor2_0())
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

    The embeddings of timestep and sizes stay fp32: they are sines of large arguments through two small layers, and
    every block adds them.
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
        """Returns the embedding of SDXL's text and sizes, (B, C), in the dtype of `emb`.

        Args:
            emb: embedding of the timestep, (B, C).
            encoder_hidden_states: not used.
            added_cond_kwargs: `text_embeds` (B, P) and `time_ids` (B, 6), or `y`: both, embedded and concatenated.
        """
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
    """CLIP's text model.

    Its outputs are the last state after its norm, the embedding of the end token, and the state before the last layer
    (for SDXL and "clip skip 2").
    """

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = self.part(input_ids, output_hidden_states=True)
        return states.last_hidden_state, states.pooler_output, states.hidden_states[-2]


class ProjectingTextEncoderGraph(ComponentGraph):
    """SDXL's second text model, which projects the embedding of the end token."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = self.part(input_ids, output_hidden_states=True)
        return states.text_embeds, states.last_hidden_state, states.hidden_states[-2]


class VaeDecoderGraph(ComponentGraph):
    """The VAE's decoder: latents, already divided by the scaling factor, to pictures."""

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.part.decode(latent_sample, return_dict=False))


class VaeEncoderGraph(ComponentGraph):
    """The VAE's encoder: pictures to the mean and log-variance of their latents, not scaled yet.

    The encoder beside a small decoder has no variance; its graph gives the least log-variance that diffusers knows.
    """

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoded = self.part.encode(sample)
        if hasattr(encoded, "latents"):
            return (torch.cat([encoded.latents, torch.full_like(encoded.latents, _LEAST_LOGVAR)], dim=1),)
        return (encoded.latent_dist.parameters,)


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
    """Returns the component as a module that takes the inputs of any host's signature in order.

    Args:
        component: a key of `PARTS`.
        part: the module that the component is a part of.
        dtype, stable: see `ComponentGraph`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _GRAPHS[component](part, dtype, stable=stable)


@dataclass(frozen=True)
class Example:
    """What a component is traced with.

    Attributes:
        inputs: by name, in the order of the signature.
        dynamic_shapes: input → axis → its symbolic size, for the free axes.
    """

    inputs: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, dict[int, Any]]


def example_of(wanted: Signature, config: Any) -> Example:
    """Returns inputs to trace a component with.

    Each free axis is one `Dim`. The sizes of a picture are multiples, because the skip connections of a UNet fit no
    others.

    Args:
        wanted: the signature of the component.
        config: of the component, from diffusers or transformers.
    """
    grown = {
        name: size * max(1, wanted.multiple)
        for name, size in {"height": 2, "width": 3, "image_height": 2, "image_width": 3}.items()
    }
    sizes = {"batch": 2, "tokens": 2 * CONTEXT_TOKENS} | grown
    if wanted.component == "vae_decoder":
        sizes |= {"height": 16, "width": 24}
    # diffusers makes batches of 64 and more contiguous before it upsamples. That branch has no effect on the graph, but
    # torch would capture the model a second time without the promise of a smaller batch.
    dims = {name: torch.export.Dim(name, max=63 if name == "batch" else None) for name in sizes}

    def axis(size: str) -> Any:
        return wanted.multiple * dims[size] if wanted.multiple > 1 and size in grown else dims[size]

    free = {
        spec.name: {at: axis(size) for at, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in wanted.inputs
    }
    return Example(random_inputs(wanted, config, sizes, timestep=500), free)


def random_inputs(wanted: Signature, config: Any, sizes: Mapping[str, int], timestep: float) -> dict[str, torch.Tensor]:
    """Returns random inputs of a component by name, on the CPU. Equal timesteps and sizes give equal inputs.

    Args:
        wanted: the signature of the component; its names, shapes and dtypes are those of the inputs.
        config: of the component, from diffusers or transformers.
        sizes: free axis → size.
        timestep: of the first sample; each further sample is half a step earlier.
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
    """Hide what torch's exporter prints, warns and logs within the block. A failure still raises."""
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


def latent_side(unet_config: Any) -> int:
    """Returns the side of the latents that a UNet is for, in latent pixels: the longer one where they differ.

    Args:
        unet_config: the UNet's diffusers config, or one as a dict.
    """
    size = unet_config["sample_size"] if isinstance(unet_config, Mapping) else unet_config.sample_size
    return int(size if isinstance(size, int) else max(size))


def signature_of(component: str, part: torch.nn.Module, precision: Precision, host: str = "diffusers") -> Signature:
    """Returns the signature of a component.

    Args:
        component: a key of `PARTS`.
        part: the module that it is a part of.
        precision: of its weights, inputs and outputs.
        host: whose names they have, a key of `HOSTS`.
    """
    return signature(component, config_of(part), DTYPES[precision], host)
