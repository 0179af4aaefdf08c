"""The UNet a WebUI calls: each call on the engine that fits it best, else an error that says what to build, or the same
weights in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from sdcompress_engines.errors import EngineError, EngineMismatch
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.runners import Runner, SharedMemory, open_runner
from sdcompress_engines.runners.shapes import no_profile
from sdcompress_engines.signature import CONTEXT_TOKENS

from .calls import CONTEXT, SAMPLE, Plan, plan_call
from .library import Artifact, Model, Traits, pictures_px
from .panel import build_command
from .torch_unet import Deltas, TorchUNet
from .weights import PLACES, find_weights, read_unet

_SAME_WEIGHTS = {"fp32": 1e-2, "fp16": 3e-2, "bf16": 1e-1}
"""Largest relative L2 between an engine and torch with the same weights, far above rounding (TF32 included); further
ones are quantized.
"""
_SAME_WEIGHTS_QUANTIZED = 0.3


@dataclass(frozen=True)
class Settings:
    """What the settings page says.

    Attributes:
        fallback: `error` or `torch`, for what no engine covers. cuda_graph: replay a captured graph for shapes that
            come again.
    """

    fallback: str = "error"
    cuda_graph: bool = True


@dataclass(frozen=True)
class Change:
    """Something asked of the UNet that is not among its inputs.

    Attributes:
        what: in a person's words. hint: how to have it all the same.
        deltas: what it adds to the weights, where torch can do it; `key` is the same for the same change.
        bake: as `--lora` takes it.
    """

    what: str
    hint: str
    deltas: Deltas | None = None
    key: Hashable = ()
    bake: str | None = None


class Host(Protocol):
    """What the UNet asks of the program it runs in."""

    @property
    def device(self) -> torch.device:
        """Where its models run."""

    def checkpoint(self) -> tuple[Hashable, Traits]:
        """The loaded checkpoint: something that changes when another one is loaded, and its traits."""

    def changes(self) -> Sequence[Change]:
        """What is asked of the UNet at this moment besides its inputs."""

    def warn(self, text: str) -> None:
        """Tell the person, where it is seen."""


class HostedUNet:
    """One entry of the menu, while it is chosen. `activate` and `deactivate` may follow each other any number of times.

    Args:
        settings: asked at every use, so that a change of the settings counts at once.
    """

    def __init__(self, model: Model, host: Host, settings: Callable[[], Settings] = Settings) -> None:
        self.model, self.host, self.settings = model, host, settings
        self.calls = 0
        """Calls served since `activate`."""
        self._owners = [artifact for artifact in model.usable for _ in artifact.profiles]
        self._profiles = [profile for artifact in model.usable for profile in artifact.profiles]
        self._runners: dict[Path, Runner] = {}
        self._memory: SharedMemory | None = None
        self._torch: TorchUNet | None = None
        self._checked: tuple[Hashable, ...] = ()
        self._active = False
        self._told: set[str] = set()

    def activate(self) -> None:
        """Check that it fits this machine and the loaded checkpoint; the only engine of a model is opened, of several
        each at the first call it serves.

        Raises:
            EngineMismatch, BackendMissing, ArtifactError, EngineError: why not. A host may call `forward` all the same,
                which then tries again.
        """
        self.deactivate()
        self._check_fits()
        if len(self.model.usable) == 1:
            self._runner(self.model.usable[0])
        self._active = True

    def activate_once(self) -> None:
        """`activate`, where it is not active."""
        if not self._active:
            self.activate()

    def deactivate(self) -> None:
        """Give all memory back."""
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
        self._memory = self._torch = None
        self._checked, self._active, self.calls = (), False, 0
        self._told.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """The prediction, in `x`'s dtype and on its device.

        Args:
            x: noisy latents, (B, C, H/8, W/8). timesteps: (B,). context: text embeddings, (B, 77·k, width). y: SDXL's
                added vector, (B, width).
            others: what hosts pass besides; anything that would change the picture is refused.

        Raises:
            EngineMismatch: a shape no engine of the model takes. EngineError: something asked for that an engine cannot
                do, or one that failed.
        """
        self.activate_once()
        self._check_fits()
        changes = self.host.changes()
        if refused := [
            *(f"{change.what}: {change.hint}" for change in changes if change.deltas is None),
            *_asked(others),
        ]:
            raise EngineError(f"an engine cannot take {'; '.join(refused)}", where=self.model.title)
        feeds = {
            name: value
            for name, value in (
                (SAMPLE, x),
                ("timesteps", torch.as_tensor(timesteps).reshape(-1).expand(len(x))),
                (CONTEXT, context),
                ("y", y),
            )
            if value is not None
        }
        shapes = {name: tuple(value.shape) for name, value in feeds.items()}
        self._check_inputs(shapes)
        try:
            out = self._on_engine(feeds, shapes, changes)
        except EngineMismatch as error:
            if self.settings().fallback != "torch":
                raise
            out = self._in_torch(error, feeds, changes)
        self.calls += 1
        return out.to(x.device, x.dtype)

    def _check_fits(self) -> None:
        """The loaded checkpoint, looked at when it is another one."""
        key, traits = self.host.checkpoint()
        if self._checked == (key,):
            return
        if reason := self.model.why_not(traits):
            folder = self.model.usable[0].folder if self.model.usable else self.model.faults[0][0]
            manifest = self.model.usable[0].manifest if self.model.usable else None
            hint = (
                f"choose another SD Unet, or build one for this: {build_command(manifest)}"
                if self.model.usable
                else "the sdcompress tab has the command that makes it again"
            )
            raise EngineMismatch(reason, where=folder, hint=hint)
        self._checked = (key,)

    def _check_inputs(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """What no engine of the model can have, whatever its profiles, and torch with its weights neither."""
        first = self.model.usable[0]
        expected = {spec.name: spec for spec in first.inputs}
        if lacking := set(expected) ^ set(shapes):
            raise EngineError(
                f"this checkpoint gives {'no' if lacking <= set(expected) else 'also'} {', '.join(sorted(lacking))}",
                where=first.folder,
                expected=", ".join(expected),
            )
        for name, shape in shapes.items():
            spec = expected[name].shape
            if len(shape) != len(spec) or any(
                isinstance(want, int) and size != want for size, want in zip(shape, spec, strict=True)
            ):
                raise EngineError(
                    f"{name} has the shape {shape}",
                    where=first.folder,
                    expected=str(expected[name]),
                    hint="an engine of this checkpoint's family",
                )
        tokens = shapes[CONTEXT][1]
        if tokens % CONTEXT_TOKENS:
            raise EngineError(
                f"a context of {tokens} tokens: something adds to the prompt, as IP-Adapter does",
                where=first.folder,
                expected=f"a multiple of {CONTEXT_TOKENS}",
                hint="turn it off, or set SD Unet to None",
            )

    def _on_engine(
        self, feeds: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], changes: Sequence[Change]
    ) -> torch.Tensor:
        first = self.model.usable[0]
        if changes:
            command = build_command(first.manifest, lora=[change.bake for change in changes if change.bake])
            raise EngineMismatch(
                f"an engine cannot take {', '.join(change.what for change in changes)}",
                where=first.folder,
                hint=f"bake it in: {command}",
            )
        for size, side in zip(shapes[SAMPLE][2:], ("height", "width"), strict=True):
            if size % first.multiple:
                below, above = pictures_px(size, first)
                raise EngineMismatch(
                    f"{side} {size * first.vae_scale} px",
                    where=first.folder,
                    expected=(
                        f"a multiple of {first.multiple * first.vae_scale} px, as this model has"
                        f" {first.multiple.bit_length()} levels"
                    ),
                    hint=f"{side} {below} or {above}",
                )
        plan = plan_call(self._profiles, shapes)
        if plan is None:
            found = no_profile(self._profiles, shapes, first.inputs, "unet", first.vae_scale, first.folder)
            raise EngineMismatch(
                found.what,
                where=first.folder,
                expected=found.expected,
                hint=build_command(first.manifest, widen=shapes),
            )
        return self._run(plan, feeds)

    def _run(self, plan: Plan, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The call in its parts, on one engine."""
        runner = self._runner(self._owners[plan.profile])
        results = []
        for start, stop, rows in plan.parts(len(feeds[SAMPLE])):
            given = {}
            for spec in runner.inputs:
                part = feeds[spec.name][start:stop]
                if spec.name == CONTEXT and plan.repeats > 1:
                    part = part.repeat(1, plan.repeats, 1)
                if rows > stop - start:
                    part = torch.cat([part, part[-1:].expand(rows - (stop - start), *part.shape[1:])])
                given[spec.name] = part.to(runner.device, spec.dtype)
            results.append(runner.infer(given)[runner.outputs[0].name][: stop - start])
        self._report_without_graph(runner)
        return results[0] if len(results) == 1 else torch.cat(results)

    def _report_without_graph(self, runner: Runner) -> None:
        """Say once why an engine runs without the CUDA graphs that the settings ask for."""
        reason = getattr(runner, "graph_failure", None)
        if reason is not None and (key := f"{runner.path}: {reason}") not in self._told:
            self._told.add(key)
            self.host.warn(f"sdcompress: {self.model.title} runs without CUDA graphs: {reason}")

    def _runner(self, artifact: Artifact) -> Runner:
        """The open runner of an engine. Where there is no room for one more, those of other shapes make it."""
        if artifact.folder not in self._runners:
            try:
                self._runners[artifact.folder] = self._open(artifact)
            except EngineError as error:
                if isinstance(error, EngineMismatch) or not self._runners:
                    raise
                for runner in self._runners.values():
                    runner.close()
                self._runners.clear()
                self._runners[artifact.folder] = self._open(artifact)
        return self._runners[artifact.folder]

    def _open(self, artifact: Artifact) -> Runner:
        device = self.host.device
        options: dict[str, Any] = {}
        if artifact.backend == "onnxruntime":
            artifact.check_contents()
            device = device if device.type == "cuda" and _onnxruntime_has_cuda() else torch.device("cpu")
        elif device.type == "cuda":
            self._memory = self._memory or SharedMemory(device)
            options["memory"] = self._memory
        if self.settings().cuda_graph and device.type == "cuda":
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

    def _in_torch(
        self, error: EngineMismatch, feeds: Mapping[str, torch.Tensor], changes: Sequence[Change]
    ) -> torch.Tensor:
        """The call by the engine's own weights in torch, which says so once for each reason."""
        first = self.model.usable[0]
        if changes and not first.whole:
            raise EngineError(
                f"{error.what}; and torch cannot add it to a student, whose layers are not the ones the WebUI has"
                " matched it to",
                where=error.where,
                hint=error.hint,
            ) from error
        module = self._torch_unet(error)
        added = tuple(change for change in changes if change.deltas is not None)
        module.patch(tuple(change.key for change in added), _sum_of(added) if added else None)
        if error.what not in self._told:
            self._told.add(error.what)
            self.host.warn(
                f"sdcompress: {error.what}. This picture is made by the same weights in torch, without the engine's"
                " speed."
            )
        return module(feeds[SAMPLE], feeds["timesteps"], feeds[CONTEXT], feeds.get("y"))

    def _torch_unet(self, error: EngineMismatch) -> TorchUNet:
        if self._torch is None:
            found = next(
                (
                    (artifact, path)
                    for artifact in self.model.usable
                    if (path := find_weights(artifact.folder)) is not None
                ),
                None,
            )
            if found is None:
                raise EngineError(
                    f"{error.what}; and there are no weights of this model to fall back to (the checkpoint's own UNet"
                    " is another model)",
                    where=error.where,
                    expected=f"{PLACES[0]} or {PLACES[-1]} beside the engine",
                    hint=error.hint,
                ) from error
            artifact, path = found
            dtype = (
                torch.float32
                if self.host.device.type == "cpu"
                else {"fp32": torch.float32, "bf16": torch.bfloat16}.get(artifact.precision, torch.float16)
            )
            module = TorchUNet(read_unet(path), artifact.unet_config, self.host.device, dtype)
            self._check_same(module, artifact, path)
            self._torch = module
        return self._torch

    def _check_same(self, module: TorchUNet, artifact: Artifact, path: Path) -> None:
        """Hold the weights against the engine, once, on the smallest shapes it takes: files beside one another need not
        belong together.
        """
        generator = torch.Generator().manual_seed(0)
        feeds = {name: torch.randn(shapes[0], generator=generator) for name, shapes in artifact.profiles[0].items()}
        feeds["timesteps"] = torch.full_like(feeds["timesteps"], 200.0)
        rows = len(feeds[SAMPLE])
        index = next(at for at, owner in enumerate(self._owners) if owner is artifact)
        engine = self._run(Plan(index, rows, rows), feeds).float().cpu()
        torch_out = module(feeds[SAMPLE], feeds["timesteps"], feeds[CONTEXT], feeds.get("y")).float().cpu()
        off = relative_l2(engine, torch_out)
        if not off <= (most := _SAME_WEIGHTS.get(artifact.precision, _SAME_WEIGHTS_QUANTIZED)):
            raise EngineError(
                f"these weights are not the engine's: their predictions differ by {off:.1%}",
                where=path,
                expected=f"at most {most:.0%}",
                hint="the weights of the model that the engine was exported from",
            )


def _asked(others: Mapping[str, Any]) -> list[str]:
    """What of a host's further arguments would change the picture, in a person's words."""
    found = []
    for name, value in others.items():
        if name == "transformer_options":
            found += [
                f"patches of the UNet's layers ({key})"
                for key in (
                    "patches",
                    "patches_replace",
                    "block_modifiers",
                    "block_inner_modifiers",
                    "group_norm_wrapper",
                )
                if (value or {}).get(key)
            ]
        elif name == "control" and value is not None:
            found.append("ControlNet: it acts inside the UNet; turn it off, or choose no engine for this picture")
        elif name != "control_model" and value is not None and value is not False:
            found.append(f"the argument {name}")
    return found


def _sum_of(changes: Sequence[Change]) -> Deltas:
    def deltas(layer: str, weight: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        total: list[torch.Tensor | None] = [None, None]
        for change in changes:
            assert change.deltas is not None
            for at, more in enumerate(change.deltas(layer, weight)):
                held = total[at]
                if more is not None:
                    total[at] = more if held is None else held + more
        return total[0], total[1]

    return deltas


def _onnxruntime_has_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
