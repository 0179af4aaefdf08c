"""Forge: it has no UNet menu, but a model patcher that takes a wrapper.

The host is imported inside the functions that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import util
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import SdCompressError, UsageError

from . import pages
from .a1111 import find_other_checkpoint
from .hints import find_hint
from .host import Change
from .loras import flatten_name
from .menu import REASON
from .torch_unet import Deltas
from .traits import Traits, read_traits
from .unet import HostedUNet

NONE = "None"
_UNET_PARAMETER = "diffusion_model."
"""The beginning of the names of the UNet's parameters."""
_PREDICTIONS = {"eps": "epsilon", "epsilon": "epsilon", "v_prediction": "v_prediction"}


def is_forge() -> bool:
    """Returns whether the host is Forge, not A1111."""
    return util.find_spec("modules_forge") is not None


class ForgeHost:
    """Forge as a `Host`.

    Attributes:
        job: the picture in progress, which takes comments for the page, or None.
        patcher: the model patcher of its sampling, or None.
    """

    def __init__(self) -> None:
        self.job: Any = None
        self.patcher: Any = None
        self._known: tuple[Hashable, Traits] | None = None

    @property
    def device(self) -> torch.device:
        from modules import devices

        return torch.device(devices.device)

    def checkpoint(self) -> tuple[Hashable, Traits]:
        unet = getattr(getattr(self.patcher, "model", None), "diffusion_model", None)
        if unet is None:
            return None, Traits()
        key = id(unet)
        if self._known is None or self._known[0] != key:
            predictor = getattr(self.patcher.model, "predictor", None)
            prediction = _PREDICTIONS.get(str(getattr(predictor, "prediction_type", "")))
            self._known = key, read_traits(unet.named_parameters(), prediction)
        return self._known

    def changes(self) -> Sequence[Change]:
        changes = find_other_checkpoint(self.job, getattr(self.job, "sd_model", None))
        changes += find_loras(self.patcher)
        if patches := getattr(self.patcher, "patches", None):
            names = sorted({str(key[0]) for key in patches if isinstance(key, tuple)})
            changes.append(
                Change(
                    f"patches of weights {', '.join(names)}".strip(),
                    "bake a LoRA in: sdcompress export MODEL --trt --signature webui --lora FILE:WEIGHT -o DIR",
                )
            )
        if getattr(self.patcher, "controlnet_linked_list", None) is not None:
            changes.append(
                Change("ControlNet", "it acts inside the UNet; turn it off, or choose no engine for this picture")
            )
        return changes

    def warn(self, text: str) -> None:
        print(f"*** {text}")
        if self.job is not None and hasattr(self.job, "comment"):
            self.job.comment(text)


def find_loras(patcher: Any) -> list[Change]:
    """Returns the LoRAs of the prompt that change the UNet.

    Args:
        patcher: the model patcher, or None. Its `lora_patches` are (file, strength, ...) → parameter → patches.
    """
    changes = []
    for (file, strength, *others), patches in (getattr(patcher, "lora_patches", None) or {}).items():
        own = {key: value for key, value in patches.items() if key.startswith(_UNET_PARAMETER)}
        if not own or strength == 0:
            continue
        parameters = dict(patcher.model.diffusion_model.named_parameters())
        shapes = {
            key.removeprefix(_UNET_PARAMETER): tuple(parameters[key.removeprefix(_UNET_PARAMETER)].shape) for key in own
        }
        name = Path(str(file)).stem
        changes.append(
            Change(
                f"the LoRA {name} ({strength:g})",
                "bake it in",
                _patch_deltas(own),
                (str(file), strength, *others),
                f"{file}:{strength:g}",
                {flatten_name(key.removesuffix(".weight")): shape for key, shape in shapes.items()},
            )
        )
    return changes


def _patch_deltas(patches: Mapping[str, Sequence[Any]]) -> Deltas:
    flat = {flatten_name(key.removeprefix(_UNET_PARAMETER).removesuffix(".weight")): key for key in patches}

    def deltas(layer: str, weight: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        from backend.patcher.lora import merge_lora_to_weight

        key = flat.get(flatten_name(layer))
        if key is None:
            return None, None
        # Forge merges in inference mode; its result could not be changed outside of that.
        return merge_lora_to_weight(list(patches[key]), weight, key).clone() - weight, None

    return deltas


class Forge:
    """The chosen engine, from one picture to the next.

    Attributes:
        host: Forge.
        unet: the engine, or None.
    """

    def __init__(self) -> None:
        self.host = ForgeHost()
        self.unet: HostedUNet | None = None

    def choices(self) -> list[str]:
        """Returns the entries of the box below the prompt."""
        return [NONE, *(str(model.label()) for model in pages.list_models())]

    def before_sampling(self, job: Any, choice: str | None) -> None:
        """Make the sampling that follows use the chosen engine. With hires fix this is called twice.

        After an error in a script, Forge continues with the checkpoint's UNet. So the wrapper is set before anything
        can fail, and it raises the error.

        Args:
            job: the picture in progress.
            choice: an entry of `choices`, or None.
        """
        self.host.job = job
        if not choice or choice == NONE:
            self.leave()
            return
        patcher = job.sd_model.forge_objects.unet.clone()
        chosen: list[HostedUNet] = []

        def choose() -> HostedUNet:
            if not chosen:
                chosen.append(self._choose(choice))
            return chosen[0]

        patcher.set_model_unet_function_wrapper(_wrapper(patcher.model_options.get("model_function_wrapper"), choose))
        job.sd_model.forge_objects.unet = self.host.patcher = patcher
        job.extra_generation_params["sdcompress"] = choice.partition(REASON)[0]
        with suppress(SdCompressError):  # the first call tries again, and its error reaches the user
            choose().activate_once()
            self._hint(job, choose())

    def _hint(self, job: Any, unet: HostedUNet) -> None:
        """Compare a few-step model's settings with the picture's, before its first sampling."""
        from modules import shared

        is_first = not getattr(job, "iteration", 0) and not getattr(job, "is_hr_pass", False)
        if is_first and (hint := find_hint(unet.model, job, "forge", shared.opts)) is not None:
            self.host.warn(hint)

    def after(self, job: Any, processed: Any, choice: str | None) -> None:
        """Report a picture that was drawn without the engine, because another extension has replaced its wrapper.

        Args:
            job: the picture in progress.
            processed: its result, which takes comments for the page.
            choice: an entry of `choices`, or None.
        """
        if choice and choice != NONE and self.unet is not None and not self.unet.calls:
            text = (
                f"{self.unet.model.title} has not drawn this picture: another extension replaced the UNet's wrapper,"
                " and the checkpoint's own UNet was used."
            )
            print(f"*** {text}")
            processed.comments = f"{getattr(processed, 'comments', '')}\n{text}".strip()
        if self.unet is not None:
            self.unet.calls = 0

    def leave(self) -> None:
        """Free the engine's memory."""
        if self.unet is not None:
            self.unet.deactivate()
        self.unet = self.host.patcher = None

    def _choose(self, choice: str) -> HostedUNet:
        """Returns the UNet of an entry, the current one if its engines have not changed."""
        model = next((model for model in pages.list_models(choice) if model.label() == choice), None)
        if model is None:
            raise UsageError(
                f"no engine {choice!r}",
                where=pages.engine_folder(),
                hint="press Refresh in the panel sdcompress, then choose an engine",
            )
        if self.unet is None or self.unet.model != model:
            if self.unet is not None:
                self.unet.deactivate()
            self.unet = HostedUNet(model, self.host, pages.read_settings)
        return self.unet


def _wrapper(inner: Any, choose: Callable[[], HostedUNet]) -> Callable[..., torch.Tensor]:
    """Returns a wrapper for a model patcher.

    It is a function, not an object: patchers deep-copy their options, and functions are not copied. Forge's own
    `apply_model` runs, with the engine in the UNet's place.

    Args:
        inner: another extension's wrapper, which still decides what it calls and how often, or None.
        choose: returns the engine. It may raise.
    """
    inner = getattr(inner, "sdcompress_inner", inner)

    def wrapper(apply_model: Any, args: Any) -> torch.Tensor:
        def call(*given: Any, **named: Any) -> torch.Tensor:
            with _in_place(apply_model.__self__.diffusion_model, choose()):
                result: torch.Tensor = apply_model(*given, **named)
                return result

        call.__self__ = apply_model.__self__  # type: ignore[attr-defined]
        denoised: torch.Tensor
        denoised = call(args["input"], args["timestep"], **args["c"]) if inner is None else inner(call, args)
        return denoised

    wrapper.sdcompress_inner = inner  # type: ignore[attr-defined]
    return wrapper


@contextmanager
def _in_place(module: Any, unet: HostedUNet) -> Iterator[None]:
    """Send calls of `module` to `unet` within the block."""

    def forward(
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        assert timesteps is not None
        assert context is not None
        return unet.forward(x, timesteps, context, *args, **kwargs)

    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
