"""The UNet that a WebUI calls: each call runs on the engine that fits it best.

A call that no engine can serve is an error that says what to build, or runs with the same weights in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from sdcompress_engines.errors import EngineError, EngineMismatch
from sdcompress_engines.runners.shapes import make_shape_error
from sdcompress_engines.signature import CONTEXT_TOKENS

from .calls import ADDED, CONTEXT, SAMPLE, TIMESTEPS, plan_call
from .engine_folders import Artifact, nearest_sizes_px
from .engines import OpenEngines
from .fallback import TorchFallback
from .host import Change, Host, Settings, find_unsupported
from .menu import Model
from .panel import build_command


class HostedUNet:
    """One entry of the menu, while it is chosen. `activate` and `deactivate` may be called any number of times.

    Args:
        model: the entry.
        host: the program.
        settings: returns the current settings. It is called at every use, so that a change takes effect at once.

    Attributes:
        engines: of the model.
        calls: how many calls were served since `activate`.
    """

    def __init__(self, model: Model, host: Host, settings: Callable[[], Settings] = Settings) -> None:
        self.model, self.host, self.settings = model, host, settings
        self.calls = 0
        self.engines = OpenEngines(model, host, settings)
        self._torch = TorchFallback(model, host, self.engines)
        self._checked: tuple[Hashable, ...] = ()
        self._active = False

    def activate(self) -> None:
        """Check that the entry fits this machine and the loaded checkpoint.

        If the model has one engine, it is opened. Of several, each is opened at the first call it serves.

        Raises:
            ArtifactError, BackendMissing, EngineError, EngineMismatch: the entry cannot serve. A host may call
                `forward` nevertheless, which tries again.
        """
        self.deactivate()
        self._check_checkpoint()
        if len(self.model.usable) == 1:
            self.engines.open(self.model.usable[0])
        self._active = True

    def activate_once(self) -> None:
        """Call `activate` if the entry is not active."""
        if not self._active:
            self.activate()

    def deactivate(self) -> None:
        """Free all memory."""
        self.engines.close()
        self._torch.close()
        self._checked, self._active, self.calls = (), False, 0
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
        """Returns the prediction, (B, C, H/8, W/8), in `x`'s dtype and on its device.

        Args:
            x: noisy latents, (B, C, H/8, W/8), any float dtype, on any device.
            timesteps: (B,) or one for all samples.
            context: text embeddings, (B, 77·k, width).
            y: SDXL's added vector, (B, width).
            others: further arguments of the host. One that would change the picture is refused.

        Raises:
            EngineMismatch: no engine of the model takes the shapes.
            EngineError: the picture asks for something that an engine cannot do, or an engine failed.
        """
        self.activate_once()
        self._check_checkpoint()
        changes = self.host.changes()
        refused = [f"{change.what}: {change.hint}" for change in changes if change.deltas is None]
        if refused := [*refused, *find_unsupported(others)]:
            raise EngineError(f"an engine cannot take {'; '.join(refused)}", where=self.model.title)
        times = torch.as_tensor(timesteps).reshape(-1).expand(len(x))
        feeds = {SAMPLE: x, TIMESTEPS: times, CONTEXT: context} | ({} if y is None else {ADDED: y})
        shapes = {name: tuple(value.shape) for name, value in feeds.items()}
        check_inputs(self.model.usable[0], shapes)
        try:
            out = self._run_engine(feeds, shapes, changes)
        except EngineMismatch as error:
            if self.settings().fallback != "torch":
                raise
            out = self._torch.run(error, feeds, changes)
        self.calls += 1
        return out.to(x.device, x.dtype)

    def _check_checkpoint(self) -> None:
        """Check the loaded checkpoint if it has not been checked yet."""
        key, traits = self.host.checkpoint()
        if self._checked == (key,):
            return
        reason = self.model.find_obstacle(traits)
        if reason and self.model.usable:
            first = self.model.usable[0]
            hint = f"choose another engine, or build one for this checkpoint: {build_command(first.manifest)}"
            raise EngineMismatch(reason, where=first.folder, hint=hint)
        if reason:
            hint = "the sdcompress tab shows the command that builds it again"
            raise EngineMismatch(reason, where=self.model.faults[0][0], hint=hint)
        self._checked = (key,)

    def _run_engine(
        self, feeds: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], changes: Sequence[Change]
    ) -> torch.Tensor:
        first = self.model.usable[0]
        check_sides(first, shapes[SAMPLE])
        plan = plan_call(self.engines.profiles, shapes)
        if plan is None:
            error = make_shape_error(self.engines.profiles, shapes, first.inputs, "unet", first.vae_scale, first.folder)
            raise EngineMismatch(
                error.what,
                where=first.folder,
                expected=error.expected,
                hint=build_command(first.manifest, widen=shapes),
            )
        try:
            return self.engines.run(plan, feeds, changes)
        except EngineMismatch as error:
            if not changes or error.hint is not None:
                raise
            command = build_command(first.manifest, lora=[change.bake for change in changes if change.bake])
            raise EngineMismatch(error.what, where=first.folder, hint=f"bake it in: {command}") from error


def check_inputs(artifact: Artifact, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that inputs are those of a UNet, whatever sizes its engines were built for.

    Args:
        artifact: an engine of the UNet.
        shapes: input → shape.

    Raises:
        EngineError: an input is missing, unknown, or of a shape that neither engines nor torch can run.
    """
    expected = {spec.name: spec for spec in artifact.inputs}
    if differing := set(expected) ^ set(shapes):
        raise EngineError(
            f"this checkpoint gives {'no' if differing <= set(expected) else 'also'} {', '.join(sorted(differing))}",
            where=artifact.folder,
            expected=", ".join(expected),
        )
    for name, shape in shapes.items():
        sizes = expected[name].shape
        if len(shape) != len(sizes) or any(
            isinstance(size, int) and given != size for given, size in zip(shape, sizes, strict=True)
        ):
            raise EngineError(
                f"{name} has the shape {shape}",
                where=artifact.folder,
                expected=str(expected[name]),
                hint="an engine of this checkpoint's family",
            )
    tokens = shapes[CONTEXT][1]
    if tokens % CONTEXT_TOKENS:
        raise EngineError(
            f"a context of {tokens} tokens: an extension adds to the prompt, as IP-Adapter does",
            where=artifact.folder,
            expected=f"a multiple of {CONTEXT_TOKENS}",
            hint="turn off that extension, or choose no engine for this picture",
        )


def check_sides(artifact: Artifact, sample: tuple[int, ...]) -> None:
    """Check that height and width are multiples of what the UNet's levels need.

    Args:
        artifact: an engine of the UNet.
        sample: the latents' shape, (B, C, H/8, W/8).

    Raises:
        EngineMismatch: one is not; the nearest sizes are named.
    """
    for size, side in zip(sample[2:], ("height", "width"), strict=True):
        if size % artifact.multiple:
            below, above = nearest_sizes_px(size, artifact)
            step_px, levels = artifact.multiple * artifact.vae_scale, artifact.multiple.bit_length()
            raise EngineMismatch(
                f"{side} {size * artifact.vae_scale} px",
                where=artifact.folder,
                expected=f"a multiple of {step_px} px, as this model has {levels} levels",
                hint=f"{side} {below} or {above}",
            )
