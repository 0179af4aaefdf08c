"""AUTOMATIC1111's WebUI: its UNet menu, and what its pictures ask of a UNet besides the inputs.

The host is imported inside the functions that use it.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from sdcompress_engines.errors import EngineError

from . import pages
from .hints import find_hint
from .host import Change
from .loras import flatten_name
from .menu import Model
from .torch_unet import Deltas
from .traits import Traits, read_traits
from .unet import HostedUNet

_UNET_LAYER = "diffusion_model_"
"""The beginning of the names of the UNet's layers."""
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


class A1111Host:
    """A1111 as a `Host`.

    Attributes:
        job: the picture in progress, which takes comments for the page, or None.
    """

    def __init__(self) -> None:
        self.job: Any = None
        self._known: tuple[Hashable, Traits] | None = None

    @property
    def device(self) -> torch.device:
        from modules import devices

        return torch.device(devices.device)

    def checkpoint(self) -> tuple[Hashable, Traits]:
        from modules import sd_models

        model = sd_models.model_data.sd_model  # `shared.sd_model` would load a checkpoint
        unet = diffusion_model(model)
        if unet is None:
            return None, Traits()
        key = id(unet), str(getattr(getattr(model, "sd_checkpoint_info", None), "filename", ""))
        if self._known is None or self._known[0] != key:
            prediction = _PREDICTIONS.get(str(getattr(model, "parameterization", "")))
            self._known = key, read_traits(unet.named_parameters(), prediction)
        return self._known

    def changes(self) -> Sequence[Change]:
        from modules import sd_models, shared

        changes = find_loras() + find_other_checkpoint(self.job, sd_models.model_data.sd_model)
        changes += [
            Change(f"the hypernetwork {getattr(each, 'name', '')}", "remove it from the prompt")
            for each in getattr(shared, "loaded_hypernetworks", None) or ()
        ]
        hijack = getattr(sys.modules.get("modules.sd_hijack"), "model_hijack", None)
        if getattr(hijack, "circular_enabled", False):
            changes.append(Change("tiling", "it changes the UNet's convolutions; turn it off, or set SD Unet to None"))
        return changes

    def warn(self, text: str) -> None:
        print(f"*** {text}")
        if self.job is not None and hasattr(self.job, "comment"):
            self.job.comment(text)


def diffusion_model(sd_model: Any) -> Any:
    """Returns the checkpoint's UNet, or None if no checkpoint is loaded."""
    return getattr(getattr(sd_model, "model", None), "diffusion_model", None)


def find_other_checkpoint(job: Any, model: Any) -> list[Change]:
    """Returns a change if the host has loaded another checkpoint during a picture, such as a refiner.

    An engine replaces the UNet of the checkpoint that the picture was started with.

    Args:
        job: the picture in progress, or None.
        model: the loaded checkpoint.
    """
    started_with = getattr(job, "sd_model_name", None)
    now = getattr(getattr(model, "sd_checkpoint_info", None), "name_for_extra", None)
    if started_with is None or now is None or started_with == now:
        return []
    return [
        Change(
            f"the checkpoint {now} in a picture that was started with {started_with}",
            "turn off the refiner, or the checkpoint of hires fix, or choose no engine for this picture",
        )
    ]


def find_loras() -> list[Change]:
    """Returns the LoRAs of the prompt that change the UNet. The host applies those of the text encoder itself."""
    networks = sys.modules.get("networks")  # the module of A1111's built-in LoRA extension
    changes = []
    for net in getattr(networks, "loaded_networks", None) or ():
        layers = {
            name.removeprefix(_UNET_LAYER): layer
            for name, layer in getattr(net, "modules", {}).items()
            if name.startswith(_UNET_LAYER)
        }
        strength = float(getattr(net, "unet_multiplier", 1.0))
        if not layers or strength == 0:
            continue
        file = getattr(getattr(net, "network_on_disk", None), "filename", f"{net.name}.safetensors")
        changes.append(
            Change(
                f"the LoRA {net.name} ({strength:g})",
                "bake it in",
                _lora_deltas(layers),
                # The host changes strengths in place, and reads a file again when it is newer.
                (file, net.name, strength, getattr(net, "dyn_dim", None), getattr(net, "mtime", None)),
                f"{file}:{strength:g}",
                {name: _weight_shape(layer) for name, layer in layers.items()},
            )
        )
    return changes


def _weight_shape(layer: Any) -> tuple[int, ...]:
    """Returns the shape of the weight that a layer of a LoRA changes; one axis if the host does not know it."""
    weight = getattr(getattr(layer, "sd_module", None), "weight", None)
    return tuple(getattr(weight, "shape", None) or getattr(layer, "shape", None) or (0,))


def _lora_deltas(layers: dict[str, Any]) -> Deltas:
    def deltas(layer: str, weight: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        network = layers.get(flatten_name(layer))
        if network is None:
            return None, None
        result = network.calc_updown(weight)
        return result if isinstance(result, tuple) else (result, None)  # A1111 before 1.6 has no bias

    return deltas


class Watch:
    """Checks that each call of the checkpoint's UNet reaches the engine.

    An extension that has replaced the UNet's `forward` would draw the picture with the checkpoint's weights.
    """

    def __init__(self) -> None:
        self._module: Any = None
        self._handles: list[Any] = []
        self._unet: HostedUNet | None = None
        self._before = 0

    def start(self, module: Any, unet: HostedUNet) -> None:
        """Watch `module` for `unet`, and stop watching any other.

        Args:
            module: the checkpoint's UNet, or None.
            unet: the engine that its calls must reach.
        """
        if module is self._module and unet is self._unet:
            return
        self.stop()
        if module is not None:
            self._module, self._unet = module, unet
            self._handles = [
                module.register_forward_pre_hook(self._on_call),
                module.register_forward_hook(self._on_return),
            ]

    def stop(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._module, self._unet, self._handles = None, None, []

    def _on_call(self, module: Any, inputs: Any) -> None:
        assert self._unet is not None
        self._before = self._unet.calls
        own = vars(module).get("forward")
        if own is not None and getattr(own, "__func__", None) is not type(module).forward:
            name, owner = getattr(own, "__qualname__", own), getattr(own, "__module__", "an extension")
            raise self._missed(f"{name} of {owner} replaces the UNet")

    def _on_return(self, module: Any, inputs: Any, output: Any) -> None:
        if self._unet is not None and self._unet.calls == self._before:
            raise self._missed("something ran the checkpoint's own UNet instead")

    def _missed(self, reason: str) -> EngineError:
        assert self._unet is not None
        return EngineError(
            f"the engine cannot serve this picture: {reason}",
            where=self._unet.model.title,
            hint="turn off ControlNet and similar extensions for it, or set SD Unet to None",
        )


HOST, WATCH = A1111Host(), Watch()


def create_option(model: Model) -> Any:
    """Returns a menu entry as A1111 takes it."""
    from modules import sd_models, sd_unet

    class Unet(sd_unet.SdUnet):
        def __init__(self) -> None:
            super().__init__()
            self.hosted = HostedUNet(model, HOST, pages.read_settings)

        def activate(self) -> None:
            WATCH.start(diffusion_model(sd_models.model_data.sd_model), self.hosted)
            self.hosted.activate()

        def deactivate(self) -> None:
            WATCH.stop()
            self.hosted.deactivate()

        def forward(
            self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, *args: Any, **kwargs: Any
        ) -> torch.Tensor:
            return self.hosted.forward(x, timesteps, context, *args, **kwargs)

    class Option(sd_unet.SdUnetOption):
        def __init__(self) -> None:
            self.model, self.model_name, self.label = model, model.model_name, model.label(HOST.checkpoint()[1])
            self.sdcompress = tuple(
                (artifact.folder, artifact.manifest.seal or artifact.manifest.created) for artifact in model.usable
            )

        def create_unet(self) -> Unet:
            return Unet()

        def __eq__(self, other: object) -> bool:
            """Compare the engines, so that reading the folder again does not load them again."""
            return (
                isinstance(other, sd_unet.SdUnetOption)
                and other.label == self.label
                and getattr(other, "sdcompress", None) == self.sdcompress
            )

        def __hash__(self) -> int:
            return hash(self.label)

    return Option()


def list_unets(options: list[Any]) -> None:
    """Callback of `on_list_unets`: add the menu's entries."""
    from modules import shared

    options.extend(create_option(model) for model in pages.list_models(getattr(shared.opts, "sd_unet", None)))


def before_batch(job: Any) -> None:
    """Callback of a script before each batch: note the engine in the picture's parameters, and watch the checkpoint.

    A few-step model's settings are compared with the picture's before the first batch.

    Args:
        job: the picture in progress.
    """
    from modules import sd_models, sd_unet, shared

    HOST.job = job
    hosted = getattr(sd_unet.current_unet, "hosted", None)
    if isinstance(hosted, HostedUNet):
        job.extra_generation_params["sdcompress"] = hosted.model.title
        WATCH.start(diffusion_model(sd_models.model_data.sd_model), hosted)
        is_first = not getattr(job, "iteration", 0)
        if is_first and (hint := find_hint(hosted.model, job, "webui", shared.opts)) is not None:
            HOST.warn(hint)


def unloaded() -> None:
    """Callback when the scripts are unloaded: stop watching, and free the engine. The host creates both again."""
    from modules import sd_unet

    WATCH.stop()
    hosted = getattr(sd_unet.current_unet, "hosted", None)
    if isinstance(hosted, HostedUNet):
        hosted.deactivate()
