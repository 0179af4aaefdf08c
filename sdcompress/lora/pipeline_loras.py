"""The LoRAs of an open pipeline, exchanged while it is open, whatever runs its components."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from sdcompress_engines.errors import UsageError
from sdcompress_engines.few_steps import GUIDANCE, STEPS
from sdcompress_engines.graph_weights import WeightSpec
from sdcompress_engines.progress import SILENT, Reporter
from sdcompress_engines.runners import TorchRunner

from sdcompress.lora.adapters import Adapter
from sdcompress.lora.fuse import add_layers, find_targets
from sdcompress.lora.model_lora import LORA_COMPONENTS, ModelLora, read_model_lora
from sdcompress.lora.sampling import apply_sampling
from sdcompress.prune.plan import BlockPlan
from sdcompress.support.pipeline import TextToImagePipeline

_MOST_FILES = 8
"""Files whose layers are kept in memory."""


class WeightTarget(Protocol):
    """Something whose weights can be exchanged: see `Runner`."""

    device: torch.device

    @property
    def weights(self) -> Mapping[str, WeightSpec]: ...

    def read_weight(self, name: str) -> torch.Tensor: ...

    def set_weights(self, changes: Mapping[str, torch.Tensor], key: Hashable = None) -> None: ...


class ChangedWeights(Mapping[str, torch.Tensor]):
    """The weights of a component with LoRAs added, each computed when it is asked for.

    Args:
        target: of the component.
        changes: layer → the layers of LoRAs that change it with their factors, in their order.
    """

    def __init__(self, target: WeightTarget, changes: Mapping[str, Sequence[tuple[Adapter, float]]]) -> None:
        self._target, self._changes = target, {f"{name}.weight": change for name, change in changes.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        before = self._target.read_weight(name).to(self._target.device)
        return add_layers(before, self._changes[name], name.removesuffix(".weight"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)


class PipelineLoras:
    """The LoRAs of an open pipeline.

    Args:
        pipeline: its components are torch modules, or runners in their place.
        plan: from the whole model to a student, by which LoRAs of the whole model are put into the student; None of a
            whole model, or where it is not known.
        report: gets a line about each LoRA that was carried over to a student.
    """

    def __init__(self, pipeline: TextToImagePipeline, plan: BlockPlan | None = None, report: Reporter = SILENT) -> None:
        self._pipeline: Any = pipeline
        self._plan, self._report = plan, report
        self._targets: dict[str, WeightTarget] = {}
        self._files: dict[Hashable, ModelLora] = {}  # the one read last comes last
        self._sampling = pipeline.scheduler, pipeline.config.get(STEPS), pipeline.config.get(GUIDANCE)
        self._sampling_changed = False

    def set(self, loras: Sequence[tuple[str | Path, float]]) -> None:
        """Put LoRAs into the pipeline instead of those before; none of them is the model without LoRAs, bit-equal.

        They are added one after another. Those already in it cost nothing. A few-step LoRA also sets how the model is
        sampled. If it fails, the pipeline is without LoRAs.

        Args:
            loras: files with the factors of their changes.

        Raises:
            UsageError: there is no such file. ModelError: it is no LoRA, or not for this model. EngineError: a
                component runs on something whose weights are fixed.
        """
        chosen = [(Path(file), float(factor)) for file, factor in loras if factor]
        try:
            keys = [(_identify(file), factor) for file, factor in chosen]
            found = [(self._read(file, key), factor) for (file, factor), (key, _) in zip(chosen, keys, strict=True)]
            changed = {component for lora, _ in found for component, _ in lora.layers}
            for component in LORA_COMPONENTS:
                if component in changed or component in self._targets:
                    self._set_component(component, found, tuple(keys))
            self._set_sampling([file for file, _ in chosen])
        except BaseException:
            for target in self._targets.values():
                target.set_weights({})
            self._set_sampling([])
            raise

    def _read(self, file: Path, key: Hashable) -> ModelLora:
        """Returns a LoRA by the layers of this model; the file is read once."""
        if (kept := self._files.pop(key, None)) is None:
            kept = read_model_lora(file, _Shapes(self), self._plan)
            if (line := kept.describe(file, self._plan)) is not None:
                self._report.show_line(line)
        self._files[key] = kept
        while len(self._files) > _MOST_FILES:
            del self._files[next(iter(self._files))]
        return kept

    def _set_component(self, component: str, loras: Sequence[tuple[ModelLora, float]], key: Hashable) -> None:
        changes: dict[str, list[tuple[Adapter, float]]] = {}
        for lora, factor in loras:
            layers = {place: layer for place, layer in lora.layers.items() if place[0] == component}
            for place, name in find_targets(layers, _Shapes(self)).items():
                changes.setdefault(name, []).append((layers[place], factor))
        target = self.target(component)
        target.set_weights(ChangedWeights(target, changes), key)

    def target(self, component: str) -> WeightTarget:
        """Returns what exchanges the weights of a component that the pipeline has."""
        if component not in self._targets:
            part = getattr(self._pipeline, component)
            # A module's weights are exchanged as those of a runner over it, which is never called.
            self._targets[component] = part if hasattr(part, "set_weights") else TorchRunner(part, (), ()).open()
        return self._targets[component]

    def shapes(self, component: str) -> Mapping[str, tuple[int, ...]] | None:
        """Returns a component's layers with their weights' shapes; None where the pipeline has no such component.

        Raises:
            EngineError: its weights are fixed.
        """
        if getattr(self._pipeline, component, None) is None:
            return None
        target = self.target(component)
        if not target.weights:
            target.set_weights({"": torch.empty(0)})  # raises the reason
        return {name.removesuffix(".weight"): spec.shape for name, spec in target.weights.items()}

    def _set_sampling(self, files: Sequence[Path]) -> None:
        """Sample as the last of these LoRAs was trained for, or as the model itself."""
        if self._sampling_changed:
            scheduler, steps, guidance = self._sampling
            self._pipeline.register_modules(scheduler=scheduler)
            self._pipeline.register_to_config(**{STEPS: steps, GUIDANCE: guidance})
        self._sampling_changed = bool(files)
        for file in files:
            apply_sampling(self._pipeline, file)


class _Shapes(Mapping[str, "Mapping[str, tuple[int, ...]] | None"]):
    """Component → its layers, looked up when a LoRA names the component."""

    def __init__(self, loras: PipelineLoras) -> None:
        self._loras = loras

    def __getitem__(self, component: str) -> Mapping[str, tuple[int, ...]] | None:
        return self._loras.shapes(component)

    def __iter__(self) -> Iterator[str]:
        return iter(LORA_COMPONENTS)

    def __len__(self) -> int:
        return len(LORA_COMPONENTS)


def _identify(file: Path) -> Hashable:
    """Returns what changes when a file does."""
    try:
        facts = file.stat()
    except OSError as error:
        raise UsageError("does not exist", where=file, expected="a LoRA, .safetensors") from error
    return str(file.absolute()), facts.st_size, facts.st_mtime_ns


def enable_loras(pipeline: TextToImagePipeline, plan: BlockPlan | None = None, report: Reporter = SILENT) -> None:
    """Give a pipeline the method `set_loras`: `PipelineLoras.set`.

    Args:
        pipeline, plan, report: see `PipelineLoras`.
    """
    holder: Any = pipeline
    holder.set_loras = PipelineLoras(pipeline, plan, report).set
