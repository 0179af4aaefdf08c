"""Forge: no UNet menu, but a model patcher that takes a wrapper. The host is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import util
from typing import Any

import torch
from sdcompress_engines.errors import SdCompressError, UsageError

from . import pages
from .a1111 import other_checkpoint
from .library import REASON, Traits, traits_of_parameters
from .unet import Change, HostedUNet

NONE = "None"
_PREDICTIONS = {"eps": "epsilon", "epsilon": "epsilon", "v_prediction": "v_prediction"}


def is_forge() -> bool:
    return util.find_spec("modules_forge") is not None


class ForgeHost:
    """What a `HostedUNet` asks of Forge, for the job that runs."""

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
            self._known = (
                key,
                traits_of_parameters(
                    unet.named_parameters(), _PREDICTIONS.get(str(getattr(predictor, "prediction_type", "")))
                ),
            )
        return self._known

    def changes(self) -> Sequence[Change]:
        found = other_checkpoint(self.job, getattr(self.job, "sd_model", None))
        for patches in (getattr(self.patcher, "lora_patches", None), getattr(self.patcher, "patches", None)):
            if patches:
                names = sorted({str(key[0]) for key in patches if isinstance(key, tuple)})
                found.append(
                    Change(
                        f"LoRA {', '.join(names)}".strip(),
                        "bake it in: sdcompress export MODEL --trt --signature webui --lora FILE:WEIGHT -o DIR",
                    )
                )
        if getattr(self.patcher, "controlnet_linked_list", None) is not None:
            found.append(
                Change("ControlNet", "it acts inside the UNet; turn it off, or choose no engine for this picture")
            )
        return found

    def warn(self, text: str) -> None:
        print(f"*** {text}")
        if self.job is not None and hasattr(self.job, "comment"):
            self.job.comment(text)


class Forge:
    """The engine that is chosen, from one picture to the next."""

    def __init__(self) -> None:
        self.host = ForgeHost()
        self.unet: HostedUNet | None = None

    def choices(self) -> list[str]:
        return [NONE, *(str(model.label()) for model in pages.look()[1])]

    def before_sampling(self, job: Any, choice: str | None) -> None:
        """Put the chosen engine before the sampling that follows; with hires fix this comes twice.

        Forge goes on after a script's error, with the checkpoint's UNet. So the wrapper is in place before anything can
        fail, and what fails is raised from it.
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
        with suppress(SdCompressError):  # the first call tries again, and there it is heard
            choose().activate_once()

    def after(self, job: Any, processed: Any, choice: str | None) -> None:
        """Say so where the picture was made without the engine after all, as when another extension took its wrapper
        away.
        """
        if choice and choice != NONE and self.unet is not None and not self.unet.calls:
            text = (
                f"{self.unet.model.title} has not made this picture: another extension replaced the UNet's wrapper, and"
                " the checkpoint's own UNet was used."
            )
            print(f"*** {text}")
            processed.comments = f"{getattr(processed, 'comments', '')}\n{text}".strip()
        if self.unet is not None:
            self.unet.calls = 0

    def leave(self) -> None:
        """Give the engine's memory back."""
        if self.unet is not None:
            self.unet.deactivate()
        self.unet = self.host.patcher = None

    def _choose(self, choice: str) -> HostedUNet:
        """The UNet of `choice`: the one there is, where nothing about it has changed."""
        model = next((model for model in pages.look(choice)[1] if model.label() == choice), None)
        if model is None:
            raise UsageError(
                f"no engine {choice!r}", where=pages.folder(), hint="press Look again in the box sdcompress, and choose"
            )
        if self.unet is None or self.unet.model != model:
            if self.unet is not None:
                self.unet.deactivate()
            self.unet = HostedUNet(model, self.host, pages.settings)
        return self.unet


def _wrapper(inner: Any, choose: Callable[[], HostedUNet]) -> Callable[..., torch.Tensor]:
    """A function, not an object: patchers copy deeply what is in their options, and functions are not copied.

    Forge's own arithmetic around the UNet stays: its `apply_model` runs with the engine in the UNet's place. `inner` is
    another extension's wrapper, which goes on deciding what it calls, and how often.
    """
    inner = getattr(inner, "sdcompress_inner", inner)

    def wrapper(apply_model: Any, args: Any) -> torch.Tensor:
        def call(*given: Any, **named: Any) -> torch.Tensor:
            with _in_place(apply_model.__self__.diffusion_model, choose()):
                result: torch.Tensor = apply_model(*given, **named)
                return result

        call.__self__ = apply_model.__self__  # type: ignore[attr-defined]
        made: torch.Tensor = call(args["input"], args["timestep"], **args["c"]) if inner is None else inner(call, args)
        return made

    wrapper.sdcompress_inner = inner  # type: ignore[attr-defined]
    return wrapper


@contextmanager
def _in_place(module: Any, unet: HostedUNet) -> Iterator[None]:
    """Calls of `module` come to `unet` within the block."""

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
