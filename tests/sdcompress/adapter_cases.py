"""Adapters of every kind with random numbers, and their changes by the papers' formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

RANK, ALPHA, SPLIT = 4, 3.0, 2


@dataclass(frozen=True)
class Case:
    """An adapter's tensors as a file holds them, and what they mean.

    Attributes:
        tensors: end of the key in LyCORIS's naming → tensor, float32.
        change: of the weight, float64, without DoRA's normalization.
        kind: the name for people. rank: that `alpha` is divided by.
    """

    tensors: dict[str, torch.Tensor]
    change: torch.Tensor
    kind: str
    rank: int | None


class Draw:
    """Random numbers of one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=self.generator)


def lora(shape: tuple[int, ...], draw: Draw) -> Case:
    """LoRA (arXiv 2106.09685, section 4.1): ΔW = α/r · B A, of a convolution B a 1 x 1 one behind A."""
    up, down = draw(shape[0], RANK, *[1 for _ in shape[2:]]), draw(RANK, *shape[1:])
    change = torch.einsum("or,r...->o...", up.double().flatten(1), down.double()) * ALPHA / RANK
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(ALPHA)}
    return Case(tensors, change, "LoRA" if len(shape) == 2 else "LoCon", RANK)


def locon_core(shape: tuple[int, ...], draw: Draw) -> Case:
    """A convolution's kernel by Tucker-2: two 1 x 1 convolutions and between them a core of the kernel's size."""
    up, down, mid = draw(shape[0], RANK, 1, 1), draw(RANK, shape[1], 1, 1), draw(RANK, RANK, *shape[2:])
    factors = (mid.double(), up.double()[:, :, 0, 0], down.double()[:, :, 0, 0])
    change = torch.einsum("nmkl,on,mi->oikl", *factors) * ALPHA / RANK
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid, "alpha": torch.tensor(ALPHA)}
    return Case(tensors, change, "LoCon", RANK)


def loha(shape: tuple[int, ...], draw: Draw) -> Case:
    """FedPara (arXiv 2108.06098, proposition 1): ΔW = α/r · (X1 Y1ᵀ) ⊙ (X2 Y2ᵀ), a kernel as a matrix."""
    columns = math.prod(shape[1:])
    tensors = {f"hada_w{n}_a": draw(shape[0], RANK) for n in "12"}
    tensors |= {f"hada_w{n}_b": draw(RANK, columns) for n in "12"}
    first, second = (
        torch.einsum("or,rc->oc", tensors[f"hada_w{n}_a"].double(), tensors[f"hada_w{n}_b"].double()) for n in "12"
    )
    change = (first * second * ALPHA / RANK).reshape(shape)
    return Case(tensors | {"alpha": torch.tensor(ALPHA)}, change, "LoHa", RANK)


def loha_core(shape: tuple[int, ...], draw: Draw) -> Case:
    """FedPara (proposition 3): the element-wise product of two kernels by Tucker-2."""
    tensors = {f"hada_t{n}": draw(RANK, RANK, *shape[2:]) for n in "12"}
    tensors |= {f"hada_w{n}_a": draw(RANK, shape[0]) for n in "12"}
    tensors |= {f"hada_w{n}_b": draw(RANK, shape[1]) for n in "12"}
    first, second = (
        torch.einsum("pqkl,po,qi->oikl", *(tensors[f"hada_{end}"].double() for end in (f"t{n}", f"w{n}_a", f"w{n}_b")))
        for n in "12"
    )
    return Case(tensors | {"alpha": torch.tensor(ALPHA)}, first * second * ALPHA / RANK, "LoHa", RANK)


def kronecker(left: torch.Tensor, right: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns the product of (a, c) and (b, d[, kh, kw]), whose entry (a·B + b, c·D + d) is left[a, c] right[b, d]."""
    blocks = torch.einsum("ac,bd...->abcd...", left.double(), right.double())
    return blocks.reshape(shape)


def lokr_whole(shape: tuple[int, ...], draw: Draw) -> Case:
    """LoKr (arXiv 2309.14859) of two whole matrices: alpha has no effect."""
    w1, w2 = draw(SPLIT, SPLIT), draw(shape[0] // SPLIT, shape[1] // SPLIT, *shape[2:])
    tensors = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(ALPHA)}
    return Case(tensors, kronecker(w1, w2, shape), "LoKr", None)


def lokr_factors(shape: tuple[int, ...], draw: Draw) -> Case:
    """LoKr with a low-rank second matrix, a kernel as a matrix."""
    w1 = draw(SPLIT, SPLIT)
    a, b = draw(shape[0] // SPLIT, RANK), draw(RANK, shape[1] // SPLIT * math.prod(shape[2:]))
    right = (a.double() @ b.double()).reshape(shape[0] // SPLIT, shape[1] // SPLIT, *shape[2:])
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    return Case(tensors, kronecker(w1, right, shape) * ALPHA / RANK, "LoKr", RANK)


def lokr_left_factors(shape: tuple[int, ...], draw: Draw) -> Case:
    """LoKr with a low-rank first matrix."""
    a, b = draw(SPLIT, 1), draw(1, SPLIT)
    w2 = draw(shape[0] // SPLIT, shape[1] // SPLIT, *shape[2:])
    tensors = {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2": w2, "alpha": torch.tensor(ALPHA)}
    return Case(tensors, kronecker(a.double() @ b.double(), w2, shape) * ALPHA, "LoKr", 1)


def lokr_core(shape: tuple[int, ...], draw: Draw) -> Case:
    """LoKr with both matrices low-rank, the second a kernel by Tucker-2."""
    w1_a, w1_b, core = draw(SPLIT, RANK), draw(RANK, SPLIT), draw(RANK, RANK, *shape[2:])
    a, b = draw(RANK, shape[0] // SPLIT), draw(RANK, shape[1] // SPLIT)
    right = torch.einsum("pqkl,pb,qd->bdkl", core.double(), a.double(), b.double())
    factors = {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}
    change = kronecker(w1_a.double() @ w1_b.double(), right, shape) * ALPHA / RANK
    return Case(factors | {"alpha": torch.tensor(ALPHA)}, change, "LoKr", RANK)


def full(shape: tuple[int, ...], draw: Draw) -> Case:
    """The difference itself."""
    diff = draw(*shape)
    return Case({"diff": diff}, diff.double(), "full difference", None)


ANY_SHAPE: dict[str, Callable[[tuple[int, ...], Draw], Case]] = {
    case.__name__: case for case in (lora, loha, lokr_whole, lokr_factors, lokr_left_factors, full)
}
"""The cases that matrices and kernels have."""
KERNELS: dict[str, Callable[[tuple[int, ...], Draw], Case]] = {
    case.__name__: case for case in (locon_core, loha_core, lokr_core)
}
"""The cases that only kernels have."""


def dora(inner: Case, shape: tuple[int, ...], draw: Draw, axis: int = 0) -> Case:
    """DoRA over another adapter, with norms of the output (axis 0) or the input channels (axis 1)."""
    view = [1 for _ in shape]
    view[axis] = shape[axis]
    kind = "DoRA" if inner.kind == "LoRA" else f"DoRA of {inner.kind}"
    return Case(inner.tensors | {"dora_scale": draw(*view).abs() + 0.5}, inner.change, kind, inner.rank)


def decompose(weight: torch.Tensor, case: Case, axis: int) -> torch.Tensor:
    """Returns DoRA's weight (arXiv 2402.09353, equation 5), m (W + ΔW) / ‖W + ΔW‖, channel by channel."""
    changed = weight.double() + case.change
    magnitudes = case.tensors["dora_scale"].double().flatten()
    channels = [m * channel / channel.norm() for m, channel in zip(magnitudes, changed.unbind(axis), strict=True)]
    return torch.stack(channels, axis)
