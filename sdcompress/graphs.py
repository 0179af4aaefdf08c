"""A pipeline's components as graphs: a frozen copy with a host's inputs and outputs, traced and written as ONNX or
compiled ahead of time.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from sdcompress_engines.errors import ExportError, ModelError
from sdcompress_engines.runners import TensorSpec
from sdcompress_engines.signature import COMPONENTS, CONTEXT_TOKENS, HOSTS, Signature, signature

from sdcompress.onnxruntime_ops import use_onnxruntime_ops
from sdcompress.teacher import quiet

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
OPSET = 23
"""Keeps `Attention` and `GroupNormalization` as one node each.

ONNX Runtime ≥ 1.23 (on CUDA ≥ 1.25) and TensorRT ≥ 10.14 read it.
"""
OLDER_OPSET = 20
"""For TensorRT before 10.14: attention in its parts."""
_ONE_FILE_BYTES = int(1.9e9)  # protobuf ends at 2 GiB


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


def write_onnx(
    graph: ComponentGraph, wanted: Signature, path: Path, opset: int = OPSET, runtime: Runtime = "any"
) -> None:
    """Trace `graph` and write it with the names, order and free axes of `wanted`; weights over 2 GB go to
    `<path>.data`.

    Args:
        runtime: whose kernels it is written for.

    Raises:
        ExportError: torch could not export it.
    """
    example = example_of(wanted, graph.part.config)
    try:
        with silence():
            program = torch.onnx.export(
                graph,
                tuple(example.inputs.values()),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=tuple(example.dynamic_shapes.values()),
                input_names=[spec.name for spec in wanted.inputs],
                output_names=[spec.name for spec in wanted.outputs],
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"torch could not export the {wanted.component} at opset {opset} ({type(error).__name__}:"
            f" {_first_lines(error)})",
            hint="--opset 23, or another torch version",
        ) from error
    if program is None:
        raise ExportError(f"torch exported nothing for the {wanted.component}")
    if runtime == "onnxruntime":
        use_onnxruntime_ops(program.model)
    _tidy(program.model, wanted)
    large = sum(p.numel() * p.element_size() for p in graph.parameters()) > _ONE_FILE_BYTES
    program.save(str(path), external_data=large)


def _tidy(model: Any, wanted: Signature) -> None:
    """The signature's axis names, and none of the traces that the exporter leaves: paths of this machine, and half of a
    small file.
    """
    for value, spec in zip((*model.graph.inputs, *model.graph.outputs), (*wanted.inputs, *wanted.outputs), strict=True):
        value.shape = type(value.shape)(spec.shape)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    kept = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in kept:  # written in the axis names of the trace; every runtime infers them again
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _first_lines(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error.__cause__ or error).split())
    return text if len(text) <= limit else text[:limit] + " ..."


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


def upcast_onnx(path: Path, target: Path) -> None:
    """A bfloat16 graph with every bfloat16 made float32, values kept: ONNX Runtime's CPU computes no bfloat16, so this
    is what can be compared there.
    """
    import onnx
    from sdcompress_engines.graph import tensors

    model = onnx.load(path)
    half, single = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    for tensor in tensors(model.graph):
        if tensor.data_type == half:
            bits = (
                torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.bfloat16)
                if tensor.raw_data
                else torch.tensor(list(tensor.int32_data), dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
            )
            tensor.ClearField("int32_data")
            tensor.raw_data = bits.float().numpy().tobytes()
            tensor.data_type = single
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype", "softmax_precision") and attribute.i == half:
                attribute.i = single
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data")


def weights_of(part: torch.nn.Module) -> int:
    """How many parameters a module has."""
    return sum(p.numel() for p in part.parameters())


def signature_of(component: str, part: torch.nn.Module, precision: Precision, host: str = "diffusers") -> Signature:
    """The signature of a module in a precision."""
    return signature(component, config_of(part), DTYPES[precision], host)
