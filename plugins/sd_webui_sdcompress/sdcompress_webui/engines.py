"""The open engines of one model, which share the GPU's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.calls import set_tokens, take_part
from sdcompress_engines.errors import EngineError, EngineMismatch
from sdcompress_engines.runners import Runner, SharedMemory, open_runner

from .calls import CONTEXT, SAMPLE, Plan
from .engine_folders import Artifact
from .host import Change, Host, Settings
from .loras import EngineLoras
from .menu import Model
from .panel import build_command


class OpenEngines:
    """The engines of one model. Each is opened at the first call it serves.

    Args:
        model: whose engines to run.
        host: where messages go; its device is used.
        settings: returns the current settings.

    Attributes:
        runners: folder → the open runner.
        profiles: of all engines of the model.
        owners: the engine of each profile.
    """

    def __init__(self, model: Model, host: Host, settings: Callable[[], Settings]) -> None:
        self.owners = [artifact for artifact in model.usable for _ in artifact.profiles]
        self.profiles = [profile for artifact in model.usable for profile in artifact.profiles]
        self.runners: dict[Path, Runner] = {}
        self._title, self._host, self._settings = model.title, host, settings
        self._memory: SharedMemory | None = None
        self._reported: set[str] = set()
        self._loras = EngineLoras(host)

    def run(self, plan: Plan, feeds: Mapping[str, torch.Tensor], changes: Sequence[Change] = ()) -> torch.Tensor:
        """Returns the prediction of a call, run in the parts of its plan on one engine.

        Args:
            plan: of `plan_call` for these shapes.
            feeds: input → tensor with the batch first, any float dtype, on any device.
            changes: the LoRAs of the picture.

        Raises:
            EngineMismatch: the engine does not take these LoRAs.
        """
        runner = self.open(self.owners[plan.profile])
        self._loras.apply(runner, changes)
        results = []
        for part in plan.parts(len(feeds[SAMPLE])):
            inputs = {}
            for spec in runner.inputs:
                value = take_part(feeds[spec.name], part)
                if spec.name == CONTEXT:
                    value = set_tokens(value, plan.repeats * value.shape[1])
                inputs[spec.name] = value.to(runner.device, spec.dtype)
            results.append(runner.infer(inputs)[runner.outputs[0].name][: part.stop - part.start])
        self._report_without_graph(runner)
        return results[0] if len(results) == 1 else torch.cat(results)

    def open(self, artifact: Artifact) -> Runner:
        """Returns the open runner of an engine. If it does not fit into memory, the other engines are closed first.

        Raises:
            ArtifactError, BackendMissing, EngineError, EngineMismatch: it cannot be opened.
        """
        if artifact.folder not in self.runners:
            try:
                self.runners[artifact.folder] = self._open_runner(artifact)
            except EngineError as error:
                if isinstance(error, EngineMismatch) or not self.runners:
                    raise
                self._close_runners()
                self.runners[artifact.folder] = self._open_runner(artifact)
        return self.runners[artifact.folder]

    def close(self) -> None:
        """Close all engines and free their memory."""
        self._close_runners()
        self._memory = None
        self._reported.clear()

    def _close_runners(self) -> None:
        for runner in self.runners.values():
            runner.close()
        self.runners.clear()

    def _open_runner(self, artifact: Artifact) -> Runner:
        device = self._host.device
        options: dict[str, Any] = {}
        if artifact.backend == "onnxruntime":
            artifact.check_contents()
            device = device if device.type == "cuda" and _onnxruntime_has_cuda() else torch.device("cpu")
        elif device.type == "cuda":
            self._memory = self._memory or SharedMemory(device)
            options["memory"] = self._memory
        if self._settings().cuda_graph and device.type == "cuda":
            options["cuda_graph"] = True
        runner = open_runner(artifact.file, device, **options)
        names = [spec.name for spec in artifact.inputs]
        if sorted(spec.name for spec in runner.inputs) != sorted(names) or len(runner.outputs) != 1:
            runner.close()
            raise EngineMismatch(
                f"the engine has the inputs {', '.join(spec.name for spec in runner.inputs)}",
                where=artifact.file,
                expected=", ".join(names),
                hint=build_command(artifact.manifest),
            )
        return runner

    def _report_without_graph(self, runner: Runner) -> None:
        """Report once why an engine runs without the CUDA graphs that the settings ask for."""
        reason = getattr(runner, "graph_failure", None)
        if reason is not None and (key := f"{runner.path}: {reason}") not in self._reported:
            self._reported.add(key)
            self._host.warn(f"sdcompress: {self._title} runs without CUDA graphs: {reason}")


def _onnxruntime_has_cuda() -> bool:
    from sdcompress_engines.runners.onnxruntime_install import missing

    return missing("cuda") is None
