"""AUTOMATIC1111's WebUI: its UNet menu, and what it asks of a UNet besides the inputs.

The host is imported where it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from sdcompress_engines.errors import EngineError

from . import pages
from .library import Model, Traits, traits_of_parameters
from .unet import Change, HostedUNet

_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


class A1111Host:
    """What a `HostedUNet` asks of A1111."""

    def __init__(self) -> None:
        self.job: Any = None
        """The processing that runs, which takes comments for the page."""
        self._known: tuple[Hashable, Traits] | None = None

    @property
    def device(self) -> torch.device:
        from modules import devices

        return torch.device(devices.device)

    def checkpoint(self) -> tuple[Hashable, Traits]:
        from modules import sd_models

        model = sd_models.model_data.sd_model  # `shared.sd_model` would load one
        unet = diffusion_model(model)
        if unet is None:
            return None, Traits()
        key = id(unet), str(getattr(getattr(model, "sd_checkpoint_info", None), "filename", ""))
        if self._known is None or self._known[0] != key:
            self._known = (
                key,
                traits_of_parameters(
                    unet.named_parameters(), _PREDICTIONS.get(str(getattr(model, "parameterization", "")))
                ),
            )
        return self._known

    def changes(self) -> Sequence[Change]:
        from modules import sd_models, shared

        found = lora_changes() + other_checkpoint(self.job, sd_models.model_data.sd_model)
        found += [
            Change(f"the hypernetwork {getattr(each, 'name', '')}", "remove it from the prompt")
            for each in getattr(shared, "loaded_hypernetworks", None) or ()
        ]
        hijack = getattr(sys.modules.get("modules.sd_hijack"), "model_hijack", None)
        if getattr(hijack, "circular_enabled", False):
            found.append(Change("tiling", "it changes the UNet's convolutions; turn it off, or set SD Unet to None"))
        return found

    def warn(self, text: str) -> None:
        print(f"*** {text}")
        if self.job is not None and hasattr(self.job, "comment"):
            self.job.comment(text)


def diffusion_model(sd_model: Any) -> Any:
    """The checkpoint's UNet, or None where none is loaded."""
    return getattr(getattr(sd_model, "model", None), "diffusion_model", None)


def other_checkpoint(job: Any, model: Any) -> list[Change]:
    """A checkpoint that the host has loaded in the midst of a picture, as the refiner and that of hires fix are: an
    engine stands in for the one the picture was begun with.
    """
    begun, now = (
        getattr(job, "sd_model_name", None),
        getattr(getattr(model, "sd_checkpoint_info", None), "name_for_extra", None),
    )
    if begun is None or now is None or begun == now:
        return []
    return [
        Change(
            f"the checkpoint {now} in a picture that was begun with {begun}",
            "turn off the refiner, or the checkpoint of hires fix, or set SD Unet to None",
        )
    ]


def lora_changes() -> list[Change]:
    """The LoRAs of the prompt that change the UNet; those of the text encoder alone are the host's."""
    networks = sys.modules.get("networks")  # the built-in extension's, under the name it gives itself
    found = []
    for net in getattr(networks, "loaded_networks", None) or ():
        layers = {
            name: layer for name, layer in getattr(net, "modules", {}).items() if name.startswith("diffusion_model_")
        }
        strength = float(getattr(net, "unet_multiplier", 1.0))
        if not layers or strength == 0:
            continue
        key = net.name, strength, getattr(net, "te_multiplier", None), getattr(net, "dyn_dim", None)
        file = getattr(getattr(net, "network_on_disk", None), "filename", f"{net.name}.safetensors")
        found.append(
            Change(
                f"the LoRA {net.name} ({strength:g})", "bake it in", _lora_deltas(layers), key, f"{file}:{strength:g}"
            )
        )
    return found


def _lora_deltas(layers: dict[str, Any]) -> Any:
    def deltas(layer: str, weight: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        network = layers.get(f"diffusion_model_{layer.replace('.', '_')}")
        if network is None:
            return None, None
        made = network.calc_updown(weight)
        return made if isinstance(made, tuple) else (made, None)  # without a bias before A1111 1.6

    return deltas


class Watch:
    """Sees that a call of the checkpoint's UNet comes to the engine: an extension that has put its own function in the
    way would make the picture with the checkpoint's weights.
    """

    def __init__(self) -> None:
        self._module: Any = None
        self._handles: list[Any] = []
        self._unet: HostedUNet | None = None
        self._before = 0

    def put(self, module: Any, unet: HostedUNet) -> None:
        """Watch `module` for `unet`, and nothing else."""
        if module is self._module and unet is self._unet:
            return
        self.lift()
        if module is not None:
            self._module, self._unet = module, unet
            self._handles = [
                module.register_forward_pre_hook(self._on_call),
                module.register_forward_hook(self._on_return),
            ]

    def lift(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._module, self._unet, self._handles = None, None, []

    def _on_call(self, module: Any, inputs: Any) -> None:
        assert self._unet is not None
        self._before = self._unet.calls
        own = vars(module).get("forward")
        if own is not None and getattr(own, "__func__", None) is not type(module).forward:
            raise self._astray(
                f"{getattr(own, '__qualname__', own)} of {getattr(own, '__module__', 'an extension')} stands in its way"
            )

    def _on_return(self, module: Any, inputs: Any, output: Any) -> None:
        if self._unet is not None and self._unet.calls == self._before:
            raise self._astray("something ran the checkpoint's own UNet instead")

    def _astray(self, why: str) -> EngineError:
        assert self._unet is not None
        return EngineError(
            f"the engine cannot serve this picture: {why}",
            where=self._unet.model.title,
            hint="turn ControlNet and the like off for it, or set SD Unet to None",
        )


HOST, WATCH = A1111Host(), Watch()


def option_of(model: Model) -> Any:
    """A menu entry as A1111 takes it."""
    from modules import sd_models, sd_unet

    class Unet(sd_unet.SdUnet):
        def __init__(self) -> None:
            super().__init__()
            self.hosted = HostedUNet(model, HOST, pages.settings)

        def activate(self) -> None:
            WATCH.put(diffusion_model(sd_models.model_data.sd_model), self.hosted)
            self.hosted.activate()

        def deactivate(self) -> None:
            WATCH.lift()
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
            """The same engines, so that looking at the folder again does not load them again."""
            return (
                isinstance(other, sd_unet.SdUnetOption)
                and other.label == self.label
                and getattr(other, "sdcompress", None) == self.sdcompress
            )

        def __hash__(self) -> int:
            return hash(self.label)

    return Option()


def list_unets(options: list[Any]) -> None:
    """Callback of `on_list_unets`."""
    from modules import shared

    options.extend(option_of(model) for model in pages.look(getattr(shared.opts, "sd_unet", None))[1])


def before_batch(job: Any) -> None:
    """Callback of a script before each batch: remember the job, say in the picture's parameters which UNet makes it,
    and watch the checkpoint that is loaded now.
    """
    from modules import sd_models, sd_unet

    HOST.job = job
    hosted = getattr(sd_unet.current_unet, "hosted", None)
    if isinstance(hosted, HostedUNet):
        job.extra_generation_params["sdcompress"] = hosted.model.title
        WATCH.put(diffusion_model(sd_models.model_data.sd_model), hosted)


def unloaded() -> None:
    """Callback when the scripts are unloaded: the watch goes, and with the engine its memory; the host makes both anew."""
    from modules import sd_unet

    WATCH.lift()
    hosted = getattr(sd_unet.current_unet, "hosted", None)
    if isinstance(hosted, HostedUNet):
        hosted.deactivate()
