"""The engine's own weights in torch, for calls that no engine can serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from sdcompress_engines.errors import EngineError, EngineMismatch
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.graph import weights_path
from sdcompress_engines.graph_weights import GraphWeights, WeightSpec

from .calls import ADDED, CONTEXT, SAMPLE, TIMESTEPS, Plan
from .engine_folders import Artifact
from .engines import OpenEngines
from .host import Change, Host, sum_deltas
from .loras import rename_deltas
from .menu import Model
from .torch_unet import TorchUNet
from .weights import PLACES, find_weights, read_unet

_SAME_WEIGHTS = {"fp32": 1e-2, "fp16": 3e-2, "bf16": 1e-1}
"""Precision → largest relative L2 between an engine and torch with the same weights, far above rounding and TF32."""
_SAME_WEIGHTS_QUANTIZED = 0.3
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TEST_TIMESTEP = 200.0


class TorchFallback:
    """The weights of a model in torch. They are loaded at the first call, and compared with the engine.

    Args:
        model: whose weights lie beside its engines.
        host: its device is used, and messages go there.
        engines: to compare the weights with.
    """

    def __init__(self, model: Model, host: Host, engines: OpenEngines) -> None:
        self._model, self._host, self._engines = model, host, engines
        self._module: TorchUNet | None = None
        self._reported: set[str] = set()

    def close(self) -> None:
        """Free the weights' memory."""
        self._module = None
        self._reported.clear()

    def run(self, error: EngineMismatch, feeds: Mapping[str, torch.Tensor], changes: Sequence[Change]) -> torch.Tensor:
        """Returns the prediction of a call. The user gets one message for each reason.

        Args:
            error: why no engine serves the call.
            feeds: input → tensor with the batch first, any float dtype, on any device.
            changes: what to add to the weights.

        Raises:
            EngineError: there are no weights, or other ones, or it is not known which layers of a student a LoRA
                changes.
        """
        first = self._model.usable[0]
        deltas = sum_deltas(changes) if changes else None
        if deltas is not None and not first.whole:
            deltas = rename_deltas(deltas, self._student_specs(first, error))
        module = self._load(error)
        module.patch(tuple(change.key for change in changes), deltas)
        if error.what not in self._reported:
            self._reported.add(error.what)
            self._host.warn(
                f"sdcompress: {error.what}. Torch draws this picture with the same weights, without the engine's speed."
            )
        return _call(module, feeds)

    def _student_specs(self, artifact: Artifact, error: EngineMismatch) -> Mapping[str, WeightSpec]:
        """Returns a student's weights, with the names that they have in the checkpoint.

        Raises:
            EngineError: these are not known.
        """
        file = weights_path(artifact.file)
        specs = GraphWeights(file).specs if file.is_file() else {}
        if not any(spec.origin for spec in specs.values()):
            raise EngineError(
                f"{error.what}, and torch cannot add a LoRA to this student, because the WebUI matches LoRAs to the"
                " layers of the checkpoint",
                where=error.where,
                hint=error.hint,
            ) from error
        return specs

    def _load(self, error: EngineMismatch) -> TorchUNet:
        if self._module is None:
            artifact, path = self._find_weights(error)
            device = self._host.device
            dtype = torch.float32 if device.type == "cpu" else _DTYPES.get(artifact.precision, torch.float16)
            module = TorchUNet(read_unet(path), artifact.unet_config, device, dtype)
            self._check_same_weights(module, artifact, path)
            self._module = module
        return self._module

    def _find_weights(self, error: EngineMismatch) -> tuple[Artifact, Path]:
        for artifact in self._model.usable:
            path = find_weights(artifact.folder)
            if path is not None:
                return artifact, path
        raise EngineError(
            f"{error.what}; and there are no weights of this model for torch (the checkpoint's own UNet is another"
            " model)",
            where=error.where,
            expected=f"{PLACES[0]} or {PLACES[-1]} beside the engine",
            hint=error.hint,
        ) from error

    def _check_same_weights(self, module: TorchUNet, artifact: Artifact, path: Path) -> None:
        """Compare the weights with the engine, on the smallest shapes it takes: the file may be of another model.

        Raises:
            EngineError: the predictions differ.
        """
        generator = torch.Generator().manual_seed(0)
        feeds = {name: torch.randn(shapes[0], generator=generator) for name, shapes in artifact.profiles[0].items()}
        feeds[TIMESTEPS] = torch.full_like(feeds[TIMESTEPS], _TEST_TIMESTEP)
        samples = len(feeds[SAMPLE])
        profile = next(index for index, owner in enumerate(self._engines.owners) if owner is artifact)
        by_engine = self._engines.run(Plan(profile, samples, samples), feeds).float().cpu()
        error, limit = (
            relative_l2(by_engine, _call(module, feeds).float().cpu()),
            _SAME_WEIGHTS.get(artifact.precision, _SAME_WEIGHTS_QUANTIZED),
        )
        if not error <= limit:
            raise EngineError(
                f"these weights are not the engine's: their predictions differ by {error:.1%}",
                where=path,
                expected=f"at most {limit:.0%}",
                hint="the weights of the model that the engine was exported from",
            )


def _call(module: TorchUNet, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return module(feeds[SAMPLE], feeds[TIMESTEPS], feeds[CONTEXT], feeds.get(ADDED))
