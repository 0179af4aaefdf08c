"""Tensors of one layer by their roles → an adapter, or why they are none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from sdcompress.lora.adapters import ALPHA, DORA_SCALE, Adapter, DoRA, Hadamard, Kronecker, LowRank, name_shape
from sdcompress.lora.names import KINDS, MAGNITUDE

Shapes = Mapping[str, tuple[int, ...]]


def build_adapter(tensors: Mapping[str, torch.Tensor], find_alpha: Callable[[int], float] = float) -> Adapter:
    """Returns the adapter of a layer.

    Args:
        tensors: role, of `TENSOR_ROLES`, → tensor, in which `find_shape_fault` finds nothing; they may be on the meta
            device if there is no alpha.
        find_alpha: rank → the alpha of a layer without a tensor for it.

    Raises:
        ValueError: `find_alpha` does.
    """
    kind = _find_kinds(tensors)[0]
    fields = {name: tensors[end] for name, end in kind.keys.items() if end in tensors and end != ALPHA}
    make: Callable[..., Adapter] = kind
    adapter = make(**fields)
    if ALPHA in kind.keys and ALPHA in tensors:
        adapter = make(**fields, alpha=float(tensors[ALPHA]))
    elif adapter.rank is not None:
        adapter = make(**fields, alpha=find_alpha(adapter.rank))
    if MAGNITUDE in tensors:
        # PEFT writes (out,), and of a convolution (1, out, 1, 1).
        view = (-1, *[1] * (len(adapter.shape) - 1))
        return DoRA(adapter, tensors[MAGNITUDE].reshape(view))
    return DoRA(adapter, tensors[DORA_SCALE]) if DORA_SCALE in tensors else adapter


def find_shape_fault(shapes: Shapes) -> str:
    """Returns why the shapes of a layer's tensors, by role, do not fit each other; "" where they do."""
    kinds = _find_kinds(shapes)
    if len(kinds) != 1:
        return "is of more than one kind" if kinds else f"has only {' and '.join(sorted(shapes))}"
    own = {name: shapes[end] for name, end in kinds[0].keys.items() if end in shapes and end != ALPHA}
    if any(len(shape) not in (2, 4) or 0 in shape for shape in own.values()):
        return f"has matrices of {_name_shapes(*own.values())}"
    if (count := math.prod(shapes.get(ALPHA, ()))) != 1:
        return f"has an alpha of {count} numbers"
    find = {LowRank: _find_low_rank_fault, Hadamard: _find_hadamard_fault, Kronecker: _find_kronecker_fault}
    fault = find[kinds[0]](own) if kinds[0] in find else ""
    return fault or _find_magnitudes_fault(shapes)


def _find_kinds(roles: Mapping[str, object]) -> list[type[Adapter]]:
    return [kind for kind in KINDS if roles.keys() & {end for end in kind.keys.values() if end != ALPHA}]


def _find_magnitudes_fault(shapes: Shapes) -> str:
    """Returns the fault of DoRA's norms: at most one of the first two sides may be longer than 1."""
    found = [shapes[role] for role in (DORA_SCALE, MAGNITUDE) if role in shapes]
    if len(found) > 1:
        return f"has both {DORA_SCALE} and {MAGNITUDE}"
    is_vector = all(0 < len(s) <= 4 and 0 not in s and math.prod(s) == max(s[:2]) for s in found)
    return "" if is_vector else f"has norms of {name_shape(found[0])} channels"


def _find_low_rank_fault(shapes: Shapes) -> str:
    """Returns the fault of a LoRA's shapes by attribute of `LowRank`."""
    if not {"down", "up"} <= shapes.keys():
        return "has only one half"
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    if mid is not None and down[2:] not in ((), (1, 1)):
        return f"has matrices of {_name_shapes(up, down)} beside a core, which are no 1 x 1 convolutions"
    if up[2:] not in ((), (1, 1)):
        return f"has matrices of {_name_shapes(up, down)}, of which the first is no 1 x 1 convolution"
    return _find_product_fault((up[1], up[0]) if mid else up[:2], down[:2], mid)


def _find_hadamard_fault(shapes: Shapes) -> str:
    """Returns the fault of a LoHa's shapes by attribute of `Hadamard`."""
    if not {"w1_a", "w1_b", "w2_a", "w2_b"} <= shapes.keys() or len({"t1", "t2"} & shapes.keys()) == 1:
        return f"has only {', '.join(sorted(shapes))}"
    for number in "12":
        if fault := _find_product_fault(shapes[f"w{number}_a"], shapes[f"w{number}_b"], shapes.get(f"t{number}")):
            return fault
    sizes = [_product_shape(shapes[f"w{n}_a"], shapes[f"w{n}_b"], shapes.get(f"t{n}")) for n in "12"]
    return "" if sizes[0] == sizes[1] else f"multiplies matrices of {_name_shapes(*sizes)} element by element"


def _find_kronecker_fault(shapes: Shapes) -> str:
    """Returns the fault of a LoKr's shapes by attribute of `Kronecker`."""
    for side in ("w1", "w2"):
        found = {name for name in shapes if name.startswith(side)}
        if found not in ({side}, {f"{side}_a", f"{side}_b"}) or (side == "w1" and len(shapes.get("w1", (0, 0))) != 2):
            return f"has {side} as {', '.join(sorted(found)) or 'nothing'}, not whole or as two factors"
        if f"{side}_a" in found:
            core = shapes.get("t2") if side == "w2" else None
            if fault := _find_product_fault(shapes[f"{side}_a"], shapes[f"{side}_b"], core):
                return fault
        elif side == "w2" and "t2" in shapes:
            return "has a core beside a whole w2"
    return ""


def _find_product_fault(a: tuple[int, ...], b: tuple[int, ...], core: tuple[int, ...] | None) -> str:
    """Returns why two matrices, or two and a Tucker core, have no product.

    Args:
        a: (out, rank); beside a core, (rank, out).
        b: (rank, in).
        core: (rank of a, rank of b, kh, kw) or None.
    """
    if len(a) != 2 or len(b) != 2 or (core is not None and len(core) != 4):
        return f"has matrices of {_name_shapes(a, b, *([core] if core else []))}"
    ranks = (a[1], b[0]) if core is None else (a[0], b[0])
    if core is None:
        return "" if ranks[0] == ranks[1] else f"has two matrices of the ranks {ranks[0]} and {ranks[1]}"
    return "" if core[:2] == ranks else f"has a core of {name_shape(core)} for the ranks {ranks[0]} and {ranks[1]}"


def _product_shape(a: tuple[int, ...], b: tuple[int, ...], core: tuple[int, ...] | None) -> tuple[int, ...]:
    return (a[0], b[1]) if core is None else (a[1], b[1], *core[2:])


def _name_shapes(*shapes: tuple[int, ...]) -> str:
    return " and ".join(map(name_shape, shapes))
