"""The kinds of adapter in LoRA files: each is the change of one layer's weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

ALPHA, DORA_SCALE = "alpha", "dora_scale"


class Adapter(ABC):
    """The change of one layer's weight, a matrix or a convolution's kernel.

    Attributes:
        keys: attribute → the end of its key in a file of kohya's scripts or LyCORIS.
        alpha: scales the change by `alpha / rank`; None, or no rank, leaves it as it is.
    """

    keys: ClassVar[Mapping[str, str]] = {}
    alpha: float | None = None

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name of the kind, for people."""

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """The inner dimension that `alpha` is divided by; None where nothing is factorized."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The weight's shape: (out, in, kh, kw), or (out, in · kh · kw) where the tensors do not say more."""

    @abstractmethod
    def change(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the change without DoRA's normalization, (out, ...), in this dtype and on the adapter's device."""

    @property
    def scale(self) -> float:
        """The factor `alpha / rank`."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the change at strength 1, float32, in the weight's shape and on its device.

        Args:
            weight: before the change, (out, in) or (out, in, kh, kw), of any floating-point dtype. Only `DoRA` uses its
                values.
        """
        return self.change(torch.float32).to(weight.device).reshape(weight.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Returns whether this is the change of a weight of this shape; a 1 x 1 convolution is a matrix."""
        if len(self.shape) == 2:
            return self.shape == (shape[0], math.prod(shape[1:]))
        return _drop_ones(self.shape) == _drop_ones(tuple(shape))

    def describe_shape(self) -> str:
        """Returns the shape of the weight that this changes, for a message."""
        return name_shape(self.shape)

    def norm(self) -> float:
        """Returns the Frobenius norm of the change without DoRA's normalization, computed in float64."""
        return float(torch.linalg.vector_norm(self.change(torch.float64)))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the end of the key → tensor, as a file of kohya's scripts or LyCORIS holds them."""
        values = {end: getattr(self, name) for name, end in self.keys.items()}
        return {end: torch.as_tensor(value) for end, value in values.items() if value is not None}


@dataclass(frozen=True)
class LowRank(Adapter):
    """LoRA (arXiv 2106.09685): `up @ down`; of a convolution, LoCon, with or without a Tucker core.

    Attributes:
        down: (rank, in) or, of a convolution, (rank, in, kh, kw); beside a core, kh and kw are 1.
        up: (out, rank) or (out, rank, 1, 1).
        alpha: as in `Adapter`.
        mid: the core, (rank, rank, kh, kw), or None.
    """

    keys: ClassVar[Mapping[str, str]] = {
        "down": "lora_down.weight",
        "up": "lora_up.weight",
        "mid": "lora_mid.weight",
        ALPHA: ALPHA,
    }

    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None = None
    mid: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        """`LoCon` for a kernel of more than one pixel."""
        return "LoCon" if self.mid is not None or math.prod(self.down.shape[2:]) > 1 else "LoRA"

    @property
    def rank(self) -> int:
        """The inner dimension of the two matrices."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (len(self.up), self.down.shape[1], *kernel)

    def change(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns `up @ down · alpha / rank`, (out, ...)."""
        up, down = self.up.to(dtype).flatten(1), self.down.to(dtype).flatten(1)
        product = up @ down if self.mid is None else _expand_core(self.mid.to(dtype), up.T, down)
        return product.reshape(self.shape) * self.scale

    def norm(self) -> float:
        """Returns the Frobenius norm of the change, in float64, from products of the small matrices."""
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        if self.mid is not None:
            down = torch.einsum("nmkl,mi->nikl", self.mid.double(), down).flatten(1)
        square = ((up.T @ up) * (down @ down.T)).sum().clamp_min(0)
        return abs(self.scale) * math.sqrt(square)


@dataclass(frozen=True)
class Hadamard(Adapter):
    """LoHa (arXiv 2108.06098, proposition 2): the element-wise product of two low-rank matrices.

    Attributes:
        w1_a, w2_a: (out, rank); beside cores, (rank, out).
        w1_b, w2_b: (rank, in) or, of a convolution, (rank, in · kh · kw); beside cores, (rank, in).
        t1, t2: Tucker cores of a convolution, (rank, rank, kh, kw), or None.
        alpha: as in `Adapter`.
    """

    keys: ClassVar[Mapping[str, str]] = {
        name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    } | {ALPHA: ALPHA}

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    t1: torch.Tensor | None = None
    t2: torch.Tensor | None = None
    alpha: float | None = None

    @property
    def kind(self) -> str:
        """LoHa."""
        return "LoHa"

    @property
    def rank(self) -> int:
        """The inner dimension of the first matrix."""
        return len(self.w1_b)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape; without cores, (out, in · kh · kw)."""
        if self.t1 is None:
            return (len(self.w1_a), self.w1_b.shape[1])
        return (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])

    def change(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the product of the two matrices, (out, ...)."""
        first = _multiply_factors(self.w1_a, self.w1_b, self.t1, dtype)
        return first * _multiply_factors(self.w2_a, self.w2_b, self.t2, dtype) * self.scale


@dataclass(frozen=True)
class Kronecker(Adapter):
    """LoKr (arXiv 2309.14859, section 3.2): the Kronecker product of two matrices, each whole or as two factors.

    Attributes:
        w1: (a, c), or None beside its factors `w1_a` (a, rank) and `w1_b` (rank, c).
        w2: (b, d) or (b, d, kh, kw), or None beside its factors `w2_a` (b, rank) and `w2_b` (rank, d · kh · kw).
        t2: Tucker core of `w2`, (rank, rank, kh, kw), with `w2_a` (rank, b) and `w2_b` (rank, d); or None.
        alpha: as in `Adapter`; without factors there is no rank, and it has no effect.
    """

    keys: ClassVar[Mapping[str, str]] = {
        name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    } | {ALPHA: ALPHA}

    w1: torch.Tensor | None = None
    w1_a: torch.Tensor | None = None
    w1_b: torch.Tensor | None = None
    w2: torch.Tensor | None = None
    w2_a: torch.Tensor | None = None
    w2_b: torch.Tensor | None = None
    t2: torch.Tensor | None = None
    alpha: float | None = None

    @property
    def kind(self) -> str:
        """LoKr."""
        return "LoKr"

    @property
    def rank(self) -> int | None:
        """The inner dimension of the factors of `w2`, else of `w1`, else None."""
        return next((len(factor) for factor in (self.w2_b, self.w1_b) if factor is not None), None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape; of factors without a core, (out, in · kh · kw)."""
        rows, columns = self._left_shape()
        right = self._right_shape()
        return (rows * right[0], columns * right[1], *right[2:])

    def _left_shape(self) -> tuple[int, int]:
        if self.w1_a is not None and self.w1_b is not None:
            return len(self.w1_a), self.w1_b.shape[1]
        w1 = _require(self.w1)
        return w1.shape[0], w1.shape[1]

    def _right_shape(self) -> tuple[int, ...]:
        if self.w2_a is None or self.w2_b is None:
            return tuple(_require(self.w2).shape)
        if self.t2 is None:
            return (len(self.w2_a), self.w2_b.shape[1])
        return (self.w2_a.shape[1], self.w2_b.shape[1], *self.t2.shape[2:])

    def change(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the Kronecker product, (out, ...)."""
        left, right = self._sides(dtype)
        # The kernel's pixels are the last indices of the columns, so the product of matrices is that of kernels.
        return torch.kron(left, right.flatten(1)).reshape(self.shape) * self.scale

    def norm(self) -> float:
        """Returns the Frobenius norm of the change, in float64: the product of the norms of both sides."""
        left, right = (float(torch.linalg.vector_norm(side)) for side in self._sides(torch.float64))
        return abs(self.scale) * left * right

    def _sides(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = self.w1, self.w2
        if self.w1_a is not None and self.w1_b is not None:
            left = _multiply_factors(self.w1_a, self.w1_b, None, dtype)
        if self.w2_a is not None and self.w2_b is not None:
            right = _multiply_factors(self.w2_a, self.w2_b, self.t2, dtype)
        return _require(left).to(dtype), _require(right).to(dtype)


@dataclass(frozen=True)
class Full(Adapter):
    """LyCORIS's `diff`: the change itself. An alpha beside it has no effect, as in the WebUIs.

    Attributes:
        diff: in the weight's shape.
    """

    keys: ClassVar[Mapping[str, str]] = {"diff": "diff"}

    diff: torch.Tensor

    @property
    def kind(self) -> str:
        """Full difference."""
        return "full difference"

    @property
    def rank(self) -> None:
        """None: nothing is factorized."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple(self.diff.shape)

    def change(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the difference."""
        return self.diff.to(dtype)


@dataclass(frozen=True)
class DoRA(Adapter):
    """DoRA (arXiv 2402.09353, equation 5): the changed weight is brought to learned norms, one a channel.

    Attributes:
        inner: the change before that.
        magnitudes: the norms, (out, 1[, 1, 1]) or (out,) of the output channels, or (1, in[, 1, 1]) of the input
            channels, as older LyCORIS wrote them.
    """

    inner: Adapter
    magnitudes: torch.Tensor

    @property
    def per_output(self) -> bool:
        """Whether the norms are those of the output channels."""
        return len(self.magnitudes) == self.magnitudes.numel()

    @property
    def kind(self) -> str:
        """`DoRA`, with the kind of the inner change where that is no LoRA."""
        return "DoRA" if self.inner.kind == "LoRA" else f"DoRA of {self.inner.kind}"

    @property
    def rank(self) -> int | None:
        """That of the inner change."""
        return self.inner.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the inner change."""
        return self.inner.shape

    def change(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the inner change."""
        return self.inner.change(dtype)

    def norm(self) -> float:
        """Returns the norm of the inner change."""
        return self.inner.norm()

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns `magnitudes · (W + d) / ‖W + d‖ - W` with the inner change d; see `Adapter.delta`."""
        before = weight.float()
        changed = before + self.inner.delta(weight)
        axis = 0 if self.per_output else 1
        norms = torch.linalg.vector_norm(changed.movedim(axis, 0).flatten(1), dim=1)
        factors = self.magnitudes.to(norms).flatten() / norms.clamp_min(torch.finfo(torch.float32).eps)
        view = [1] * changed.ndim
        view[axis] = -1
        return changed * factors.view(view) - before

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Returns whether the inner change fits, with one magnitude a channel."""
        return self.inner.fits(shape) and self.magnitudes.numel() == shape[0 if self.per_output else 1]

    def describe_shape(self) -> str:
        """Returns the shape of the inner change and the number of magnitudes."""
        side = "output" if self.per_output else "input"
        return f"{self.inner.describe_shape()} with {self.magnitudes.numel()} {side} channels"

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of the inner change and the magnitudes."""
        return self.inner.tensors() | {DORA_SCALE: self.magnitudes}


Layers = dict[tuple[str, str], Adapter]
"""(component, module name) → adapter."""


def name_shape(shape: tuple[int, ...]) -> str:
    """Returns a tensor's shape in words, such as `320 x 4`."""
    return " x ".join(map(str, shape[:6])) or "one number"


def _drop_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _multiply_factors(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return a.to(dtype) @ b.to(dtype) if core is None else _expand_core(core.to(dtype), a.to(dtype), b.to(dtype))


def _expand_core(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns a convolution's kernel from its Tucker decomposition, (out, in, kh, kw).

    Args:
        core: (rank of a, rank of b, kh, kw).
        a: (rank, out).
        b: (rank, in).
    """
    return torch.einsum("nmkl,no,mi->oikl", core, a, b)


def _require(tensor: torch.Tensor | None) -> torch.Tensor:
    """Returns a tensor of an adapter that is there where its factors are not.

    Raises:
        ValueError: neither is there.
    """
    if tensor is None:
        raise ValueError("a LoKr has a side that is neither whole nor two factors")
    return tensor
