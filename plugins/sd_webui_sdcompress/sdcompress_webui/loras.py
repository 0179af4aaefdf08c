"""The prompt's LoRAs → an engine's weights.

A WebUI matches a LoRA to the layers of the loaded checkpoint. The engine's weights have the names of the same layers
beside them, also those of a student, which lacks some of the checkpoint's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from sdcompress_engines.errors import EngineError, EngineMismatch, shorten
from sdcompress_engines.graph_weights import WeightSpec
from sdcompress_engines.ldm_keys import ldm_unet_keys
from sdcompress_engines.runners import Runner

from .host import Change, Host, sum_deltas
from .torch_unet import Deltas


def flatten_name(layer: str) -> str:
    """Returns a layer's LDM name with underscores for dots, as A1111 writes it."""
    return layer.replace(".", "_")


class EngineLoras:
    """Puts the LoRAs of a picture into engines.

    Args:
        host: where messages go.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._reported: set[Hashable] = set()

    def apply(self, runner: Runner, changes: Sequence[Change]) -> None:
        """Give an engine the weights of a picture. Nothing is done if it has them already.

        Args:
            runner: the open engine.
            changes: the LoRAs of the picture, in their order, each with `deltas`. None is the original weights.

        Raises:
            EngineMismatch: the engine takes no LoRA, or not one of these.
            EngineError: a LoRA's tensors do not fit the checkpoint, or its numbers are not finite.
        """
        key = tuple(change.key for change in changes)
        if runner.weights_key == key:
            return
        places = {flatten_name(spec.origin.removesuffix(".weight")): name for name, spec in _known(runner).items()}
        if changes and not places:
            raise EngineMismatch(_explain_refusal(runner, changes), where=runner.path)
        layers: dict[str, str] = {}
        for change in changes:
            _refuse_vectors(change, runner)
            layers.update({places[layer]: layer for layer in change.layers if layer in places})
            self._report_lost(change, places, runner)
        deltas = sum_deltas(changes) if changes else None
        runner.set_weights({} if deltas is None else _ChangedWeights(runner, layers, deltas), key)

    def _report_lost(self, change: Change, places: Mapping[str, str], runner: Runner) -> None:
        """Tell the user once how much of a LoRA the engine has no layers for.

        Raises:
            EngineMismatch: it has none of them.
        """
        lost = [layer for layer in change.layers if layer not in places]
        if len(lost) == len(change.layers):
            raise EngineMismatch(
                f"{change.what} changes {len(lost)} layers, and this model has none of them", where=runner.path
            )
        if not lost or change.key[:1] in self._reported:
            return
        self._reported.add(change.key[:1])
        whole, missing = (_norm(change, names) for names in (change.layers, lost))
        kept = math.sqrt(max(0.0, 1 - (missing / whole) ** 2)) if whole else 1.0
        self._host.warn(
            f"sdcompress: {change.what} was made for the whole model. This one has"
            f" {len(change.layers) - len(lost)} of its {len(change.layers)} layers, {kept:.0%} of its change by norm."
        )


class _ChangedWeights(Mapping[str, torch.Tensor]):
    """An engine's weights with LoRAs added, each computed when it is asked for.

    Args:
        runner: of the engine.
        layers: weight of the engine → the checkpoint's layer.
        deltas: what the LoRAs add.
    """

    def __init__(self, runner: Runner, layers: Mapping[str, str], deltas: Deltas) -> None:
        self._runner, self._layers, self._deltas = runner, layers, deltas

    def __getitem__(self, name: str) -> torch.Tensor:
        layer = self._layers[name]
        before = self._runner.read_weight(name).to(self._runner.device, torch.float32, copy=True)
        try:
            more, bias = self._deltas(layer, before)
            if bias is not None:
                raise EngineMismatch(
                    f"a LoRA changes the bias of {layer}, which an engine cannot", where=self._runner.path
                )
            return before if more is None else before + more.to(before).reshape(before.shape)
        except RuntimeError as error:
            raise EngineError(
                f"a LoRA does not fit the layer {layer} ({shorten(error, 120)})",
                where=self._runner.path,
                hint="a LoRA for this checkpoint's family",
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def rename_deltas(deltas: Deltas, specs: Mapping[str, WeightSpec]) -> Deltas:
    """Returns changes by a student's own LDM names, of changes by those of the whole model.

    Args:
        deltas: by the whole model's names.
        specs: the student's weights, by diffusers' names.
    """
    own = ldm_unet_keys(specs)
    origins = {
        str(own[name]).removesuffix(".weight"): spec.origin.removesuffix(".weight") for name, spec in specs.items()
    }

    def renamed(layer: str, weight: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        origin = origins.get(layer)
        return deltas(origin, weight) if origin else (None, None)

    return renamed


def _known(runner: Runner) -> dict[str, WeightSpec]:
    """Returns the weights of an engine whose names in the whole model are known."""
    return {name: spec for name, spec in runner.weights.items() if spec.origin}


def _explain_refusal(runner: Runner, changes: Sequence[Change]) -> str:
    what = ", ".join(change.what for change in changes)
    if runner.weights:
        return f"an engine cannot take {what}: from which layers of the whole model this student was made is not known"
    return f"an engine cannot take {what}: it was built with --no-lora, without its card, or in int8 or fp8"


def _refuse_vectors(change: Change, runner: Runner) -> None:
    """Refuse a LoRA that changes norms or biases, which an engine cannot exchange.

    Raises:
        EngineMismatch: names the first of them.
    """
    vectors = [layer for layer, shape in change.layers.items() if len(shape) < 2]
    if vectors:
        raise EngineMismatch(
            f"{change.what} changes {len(vectors)} norms or biases, such as {vectors[0]}, which an engine cannot",
            where=runner.path,
        )


def _norm(change: Change, layers: Sequence[str] | Mapping[str, object]) -> float:
    """Returns the Frobenius norm of a LoRA's change of these layers."""
    assert change.deltas is not None
    norms = []
    for layer in layers:
        more, _ = change.deltas(layer, torch.zeros(change.layers[layer]))
        norms.append(0.0 if more is None else float(more.float().norm()))
    return math.hypot(*norms)
