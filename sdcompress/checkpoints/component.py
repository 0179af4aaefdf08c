"""Weights → the parameters of a UNet, VAE or text encoder: all of them, in their shapes, and finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sdcompress_engines.errors import ModelError, shorten

from sdcompress.checkpoints.tensor_files import COPY_AGAIN
from sdcompress.checkpoints.weights import Weights
from sdcompress.families.build import library_errors

HALF = (torch.float16, torch.bfloat16)

_SCALES = ("scale_weight", "weight_scale", "scale_input", "weight_quant_state")
"""Ends of keys beside a weight that is stored in fp8 or in blocks, and means nothing without them."""


@dataclass(frozen=True)
class Source:
    """The tensor of a file that a parameter comes from.

    Attributes:
        key: in the file.
        convert: the file's tensor → the parameter.
    """

    key: str
    convert: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


def keep_half(stored: torch.dtype) -> torch.dtype:
    """Returns the dtype itself for half precision, else float32."""
    return stored if stored in HALF else torch.float32


def load_parameters(
    component: Any,
    name: str,
    weights: Weights,
    sources: Mapping[str, Source],
    choose_dtype: Callable[[torch.dtype], torch.dtype],
    unknown: Iterable[str] = (),
    *,
    share: bool = False,
) -> Any:
    """Fill a component whose parameters are on the meta device, and return it in eval mode.

    The header is checked first, so that a file which does not fit is refused before it is read.

    Args:
        component: from `build_module`; buffers that are not on the meta device stay.
        name: of the component, for messages.
        weights: the open file.
        sources: parameter → the tensor that it comes from.
        choose_dtype: the dtype of a stored tensor → that of the parameter.
        unknown: keys of the component in the file that no parameter comes from.
        share: leave tensors that keep their dtype in the file's memory map, which takes neither time nor memory.

    Raises:
        ModelError: a tensor is missing, has another shape, is no floating-point number or is not finite, or the file
            has tensors that the component does not take.
    """
    empty = {key: value for key, value in component.state_dict().items() if value.is_meta}
    _check_header(name, weights, {sources[key]: value.shape for key, value in empty.items()}, list(unknown))
    state = {key: value for key, value in component.state_dict().items() if not value.is_meta}
    with library_errors(name, weights.path):
        for key, value in empty.items():
            source = sources[key]
            tensor = source.convert(weights.read(source.key))
            tensor = tensor.to(choose_dtype(tensor.dtype), copy=not share).view(value.shape).contiguous()
            if not is_finite(tensor):
                raise ModelError(
                    f"the {name}'s {source.key} holds NaN or infinity", where=weights.path, hint=COPY_AGAIN
                )
            state[key] = tensor
    component.load_state_dict(state, assign=True)
    return component.eval()


def is_finite(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor holds neither NaN nor infinity.

    A finite sum proves it, in a hundredth of the time of `isfinite`. A sum that overflows does not refute it.
    """
    if not tensor.numel() or torch.isfinite(tensor.sum()):
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_header(name: str, weights: Weights, wanted: Mapping[Source, torch.Size], unknown: list[str]) -> None:
    """Refuse a file whose tensors are not those of a component.

    Args:
        name: of the component.
        weights: the file.
        wanted: source → shape of the parameter.
        unknown: keys that no parameter comes from.
    """
    missing = [source for source in wanted if source.key not in weights.shapes]
    if missing:
        raise ModelError(
            f"the {name} lacks {_list([source.key for source in missing], len(wanted))}",
            where=weights.path,
            expected=f"shape {tuple(wanted[missing[0]])}",
            hint=f"{COPY_AGAIN}, or convert it to a diffusers folder" if weights.path.is_file() else COPY_AGAIN,
        )
    for source, shape in wanted.items():
        if any(f"{source.key.removesuffix('weight')}{scale}" in weights.shapes for scale in _SCALES):
            raise ModelError(
                f"the {name}'s {source.key} is stored in a scaled format",
                where=weights.path,
                expected="float16, bfloat16 or float32",
            )
        if "float" not in weights.dtypes[source.key]:
            raise ModelError(
                f"the {name}'s {source.key} is stored as {weights.dtypes[source.key]}",
                where=weights.path,
                expected="float16, bfloat16 or float32",
            )
        stored = weights.shapes[source.key]
        found = tuple(source.convert(torch.empty(stored, device="meta")).shape) if len(stored) else stored
        if not _same_shape(found, tuple(shape)):
            raise ModelError(
                f"the {name}'s {source.key} has shape {found}",
                where=weights.path,
                expected=f"{tuple(shape)}",
                hint="convert it to a diffusers folder with its own config",
            )
    if unknown:
        raise ModelError(
            f"the {name} has {_list(unknown, len(weights.shapes))} that its config does not ask for",
            where=weights.path,
            hint="use the config that belongs to these weights",
        )


def _same_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Returns whether two shapes differ at most in sides of 1: some attentions are stored as 1×1 convolutions."""
    return found == wanted or [side for side in found if side != 1] == [side for side in wanted if side != 1]


def _list(keys: list[str], of: int) -> str:
    more = f" and {len(keys) - 3:,} more" if len(keys) > 3 else ""
    return f"{len(keys):,} of {of:,} tensors, {', '.join(shorten(key, 80) for key in keys[:3])}{more}"
