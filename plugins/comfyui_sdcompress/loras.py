"""The LoRAs of an engine: checks what a loader adds, and computes the changed weights. Nothing here imports ComfyUI.

ComfyUI gives each patch as `(strength, value, strength of the model, offset, function)`, before mid-2024 without the
last two. What a value means, a LoRA, LoHa, LoKr or another kind, is left to ComfyUI's own `calculate_weight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .library import errors

Patch = Sequence[Any]
Patches = Mapping[str, Sequence[Patch]]
Calculate = Callable[[list[Patch], torch.Tensor, str], torch.Tensor]
"""ComfyUI's `calculate_weight`: (patches, float32 weight, which it may change, key) → changed weight."""

PREFIX = "diffusion_model."
_MOST_DIFFERENCE = 0.05
"""Relative difference of two norms from which a change depends on the weight that it is added to."""


class Identity:
    """An object compared by identity. It stays alive as long as this does, so that no other one gets its id."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def select_patches(patches: Patches) -> dict[str, list[Patch]]:
    """Returns LDM name without prefix → the patches that change the UNet; one of strength 0 changes nothing."""
    selected = {
        key.removeprefix(PREFIX): [patch for patch in found if patch[0] != 0 or patch[2] != 1]
        for key, found in patches.items()
        if key.startswith(PREFIX)
    }
    return {name: found for name, found in selected.items() if found}


def content_key(patches: Patches) -> Hashable:
    """Returns a key that is equal for equal patches: of the same tensors, with equal strengths.

    A node that runs again makes new objects around the same tensors.
    """
    return tuple((name, _content(found)) for name, found in sorted(patches.items()))


def _content(value: Any) -> Hashable:
    if isinstance(value, (tuple, list)):
        return tuple(map(_content, value))
    if value is None or isinstance(value, (str, int, float)):
        return value
    weights = getattr(value, "weights", None)
    return Identity(value) if weights is None else (type(value).__name__, _content(weights))


def change_weight(
    weight: torch.Tensor, patches: Sequence[Patch], name: str, calculate: Calculate, where: Path | None = None
) -> torch.Tensor:
    """Returns a weight after patches, one after another.

    ComfyUI logs a patch that does not fit, and goes on without it. Here it is an error.

    Args:
        weight: float32, of the layer's shape; it may be changed.
        patches: of the layer.
        name: of the layer.
        calculate: ComfyUI's `calculate_weight`.
        where: the engine's folder, for messages.

    Raises:
        EngineMismatch: a patch does not fit the weight.
    """
    shape = weight.shape
    for patch in patches:
        before = weight.clone()
        try:
            weight = calculate([patch], weight, f"{PREFIX}{name}")
            fits = weight.shape == shape and (
                not torch.equal(weight, before)
                or _is_zero(patch[1])
                or bool(calculate([patch], torch.zeros_like(before), f"{PREFIX}{name}").any())  # too small a change
            )
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: a LoRA comes from anyone
            raise _misfit(name, shape, errors.shorten(error, 200), where) from error
        if not fits:
            found = (
                f"it makes {tuple(weight.shape)} of it"
                if weight.shape != shape
                else "ComfyUI could not apply it, and logged why"
            )
            raise _misfit(name, shape, found, where)
    return weight


def _misfit(name: str, shape: torch.Size, reason: str, where: Path | None) -> errors.EngineMismatch:
    return errors.EngineMismatch(
        f"the LoRA does not fit the layer {errors.shorten(name, 120)} ({reason})",
        where=where,
        expected=f"a LoRA for the weight's shape {tuple(shape)}",
        hint="a LoRA for the family of this model",
    )


def _is_zero(value: Any) -> bool:
    """Returns whether a tensor or a factor of a patch is zero, as in layers that were not trained."""
    if isinstance(value, torch.Tensor):
        return not bool(value.float().any())
    if isinstance(value, (tuple, list)):
        return any(map(_is_zero, value))
    weights = getattr(value, "weights", None)
    return value == 0.0 if isinstance(value, float) else weights is not None and _is_zero(weights)


def measure_change(
    patches: Sequence[Patch], shape: tuple[int, ...], name: str, calculate: Calculate, device: torch.device
) -> float | None:
    """Returns the Frobenius norm of what patches add to a weight, or None if that depends on the weight, as of DoRA.

    Args:
        patches, name, calculate: as in `change_weight`.
        shape: of the weight, whose values are not known.
        device: to compute on.
    """
    try:
        zeros, ones = torch.zeros(shape, device=device), torch.ones(shape, device=device)
        from_zeros = change_weight(zeros, patches, name, calculate)
        from_ones = change_weight(ones, patches, name, calculate) - 1
    except errors.EngineMismatch:
        return None
    norm = float(from_zeros.norm())
    rounding = math.sqrt(from_ones.numel()) * torch.finfo(torch.float32).eps
    return norm if float((from_ones - from_zeros).norm()) <= _MOST_DIFFERENCE * norm + rounding else None


class PatchedWeights(Mapping[str, torch.Tensor]):
    """The changed weights of an engine, each computed when it is asked for.

    Args:
        read: returns the original value of an engine's weight.
        patches: LDM name → patches.
        places: LDM name → name in the engine, of all of `patches`.
        calculate: ComfyUI's `calculate_weight`.
        device: to compute on.
        where: the engine's folder, for messages.

    Attributes:
        norms: LDM name → Frobenius norm of the change, of the weights that were computed.
    """

    def __init__(
        self,
        read: Callable[[str], torch.Tensor],
        patches: Patches,
        places: Mapping[str, str],
        calculate: Calculate,
        device: torch.device,
        where: Path,
    ) -> None:
        self._read, self._patches, self._calculate = read, patches, calculate
        self._origins = {places[name]: name for name in patches}
        self._device, self._where = device, where
        self.norms: dict[str, float] = {}

    def __getitem__(self, place: str) -> torch.Tensor:
        """Returns the changed weight, float32.

        Raises:
            EngineMismatch: a patch does not fit it.
        """
        name = self._origins[place]
        before = self._read(place).to(self._device, torch.float32)
        after = change_weight(before.clone(), self._patches[name], name, self._calculate, self._where)
        self.norms[name] = float((after - before).norm())
        return after

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)
