"""A1111's WebUI and Forge as an extension sees them: a small stand-in, written from their contracts.

`WebUI` puts `modules`, `gradio` and, for Forge, `modules_forge` into `sys.modules`, loads an extension's scripts, and
calls them in the host's order.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch

from sdcompress.checkpoints.ldm_keys import unet_keys

from .webui_forge import forge_model
from .webui_sampling import reference


class UNetModel(torch.nn.Module):
    """The checkpoint's UNet, with LDM's names for its parameters and diffusers' arithmetic.

    A1111 patches the `forward` of its class.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self._run = [unet]  # in a list, so that it is no submodule and its parameters have LDM's names only
        state = unet.state_dict()
        for key, name in unet_keys(state).items():
            place: torch.nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in place._modules:
                    place.add_module(part, torch.nn.Module())
                place = place._modules[part]  # type: ignore[assignment]
            place.register_parameter(leaf, torch.nn.Parameter(state[key], requires_grad=False))

    def forward(
        self, x: torch.Tensor, timesteps: Any = None, context: Any = None, y: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        return reference(self._run[0])(x, timesteps, context, y)


class Job(SimpleNamespace):
    """A picture in progress."""

    def comment(self, text: str) -> None:
        self.comments.append(text)


class Widget:
    """A gradio component: its arguments, and what a click would do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs, self.clicked = args, kwargs, None
        Widget.created.append(self)

    created: ClassVar[list[Widget]] = []

    def click(self, fn: Any, inputs: Any, outputs: Any) -> None:
        self.clicked = fn

    def __enter__(self) -> Widget:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class SdUnetOption:
    """The base of a menu entry, as A1111 has it."""

    model_name: Any = None
    label: Any = None

    def create_unet(self) -> Any:
        raise NotImplementedError


class SdUnet(torch.nn.Module):
    """The base of a UNet of the menu, as A1111 has it."""

    def activate(self) -> None:
        return None

    def deactivate(self) -> None:
        return None


class Script:
    """The base of an extension's script."""

    sorting_priority = 0

    def ui(self, is_img2img: bool) -> Any:
        return None


class OptionInfo:
    """An entry of the settings page."""

    def __init__(
        self,
        default: Any = None,
        label: str = "",
        component: Any = None,
        component_args: Any = None,
        section: Any = None,
    ) -> None:
        self.default, self.label, self.component_args, self.section = default, label, component_args, section

    def info(self, text: str) -> Any:
        return self


class WebUI:
    """A started WebUI in `root`. Its checkpoint has only a UNet. Use it with `running`."""

    def __init__(
        self, root: Path, unet: Any, *, name: str = "teacher", parameterization: str = "eps", forge: bool = False
    ) -> None:
        self.root, self.is_forge = root, forge
        self.errors: list[BaseException] = []
        (root / "models").mkdir(parents=True, exist_ok=True)
        self.devices = SimpleNamespace(device=torch.device("cpu"), cpu=torch.device("cpu"), torch_gc=lambda: None)
        self.opts = SimpleNamespace(sd_unet="Automatic")
        self.labels: dict[str, Any] = {}
        self.opts.add_option = lambda key, info: (
            self.labels.setdefault(key, info),
            hasattr(self.opts, key) or setattr(self.opts, key, info.default),
        )
        self.callbacks: dict[str, list[Any]] = {}
        self.scripts: list[Any] = []
        self.hijack = SimpleNamespace(circular_enabled=False)
        self.load(unet, name=name, parameterization=parameterization)

    def load(self, unet: Any, *, name: str, parameterization: str = "eps") -> None:
        """Load another checkpoint, and keep the first in memory: A1111 then leaves the chosen UNet active."""

        class Own(UNetModel):  # each checkpoint's class is patched on its own, as LDM's and SDXL's are
            pass

        if self.is_forge:
            self.sd_model = forge_model(Own(unet), {"eps": "epsilon", "v": "v_prediction"}[parameterization])
            self.sd_model.sd_checkpoint_info = SimpleNamespace(name_for_extra=name)
        else:
            model = SimpleNamespace(diffusion_model=Own(unet))
            self.sd_model = SimpleNamespace(
                model=model,
                lowvram=False,
                parameterization=parameterization,
                sd_checkpoint_info=SimpleNamespace(
                    model_name=name, name_for_extra=name, filename=f"{name}.safetensors"
                ),
            )
        if hasattr(self, "sd_unet"):
            self._patch()
            sys.modules["modules.sd_models"].model_data.sd_model = self.sd_model  # type: ignore[attr-defined]

    def _patch(self) -> None:
        if not self.is_forge:
            kind = type(self.sd_model.model.diffusion_model)
            original = kind.forward

            def forward(
                module: Any, x: Any, timesteps: Any = None, context: Any = None, *args: Any, **kwargs: Any
            ) -> Any:
                current = self.sd_unet.current_unet
                return (
                    original(module, x, timesteps, context, *args, **kwargs)
                    if current is None
                    else current.forward(x, timesteps, context, *args, **kwargs)
                )

            kind.forward = forward  # type: ignore[method-assign]

    def modules(self) -> dict[str, ModuleType]:
        """Returns the modules that an extension imports, by name."""
        self.sd_unet = _module(
            "modules.sd_unet",
            SdUnetOption=SdUnetOption,
            SdUnet=SdUnet,
            current_unet=None,
            current_unet_option=None,
            unet_options=[],
        )
        registrars = {
            f"on_{name}": lambda fn, name=name: self.callbacks.setdefault(name, []).append(fn)
            for name in ("list_unets", "ui_settings", "ui_tabs", "script_unloaded")
        }
        parts = {
            "sd_unet": self.sd_unet,
            "script_callbacks": _module("modules.script_callbacks", **registrars),
            "scripts": _module("modules.scripts", Script=Script, AlwaysVisible=object()),
            "shared": _module("modules.shared", opts=self.opts, OptionInfo=OptionInfo, loaded_hypernetworks=[]),
            "paths": _module("modules.paths", models_path=str(self.root / "models")),
            "devices": _module("modules.devices", **vars(self.devices)),
            "sd_models": _module("modules.sd_models", model_data=SimpleNamespace(sd_model=self.sd_model)),
            "sd_hijack": _module("modules.sd_hijack", model_hijack=self.hijack),
        }
        widgets = ("Accordion", "Blocks", "Button", "Dropdown", "HTML", "Radio")
        gradio = _module("gradio", **{name: type(name, (Widget,), {}) for name in widgets}, update=dict)
        others = {"gradio": gradio, "networks": _module("networks", loaded_networks=[])}
        if self.is_forge:
            others["modules_forge"] = _module("modules_forge")
        return {
            "modules": _module("modules", **parts),
            **{f"modules.{name}": part for name, part in parts.items()},
            **others,
        }

    def load_extension(self, folder: Path) -> None:
        """Load an extension's scripts by their files, with the folder first on the path."""
        kind = sys.modules["modules.scripts"].Script  # type: ignore[attr-defined]
        for path in sorted((folder / "scripts").glob("*.py")):
            before, sys.path = sys.path, [str(folder), *sys.path]
            try:
                spec = importlib.util.spec_from_file_location(path.name, path)
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            finally:
                sys.path = before
            self.scripts += [
                each()
                for each in vars(module).values()
                if isinstance(each, type) and issubclass(each, kind) and each is not kind
            ]
        for fn in self.callbacks.get("ui_settings", []):
            self._guarded(fn)
        self.controls = [script.ui(False) or [] for script in self.scripts]
        self.list_unets()

    def _guarded(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a callback. Its error is noted, and the host continues."""
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            self.errors.append(error)
            return None

    def list_unets(self) -> list[str]:
        found: list[Any] = []
        for fn in self.callbacks.get("list_unets", []):
            self._guarded(fn, found)
        self.sd_unet.unet_options[:] = found
        return ["Automatic", *(option.label for option in found), "None"]

    def tab(self) -> str:
        """Returns the HTML of the extension's tab."""
        Widget.created.clear()
        for fn in self.callbacks.get("ui_tabs", []):
            fn()
        return next(str(widget.kwargs["value"]) for widget in Widget.created if type(widget).__name__ == "HTML")

    def apply_unet(self, choice: str | None = None) -> None:
        """Change the UNet in A1111's order: deactivate the old one, create the new one, name it and activate it.

        The same choice again changes nothing.
        """
        choice = choice or self.opts.sd_unet
        if choice == "Automatic":
            options = [
                option
                for option in self.sd_unet.unet_options
                if option.model_name == self.sd_model.sd_checkpoint_info.model_name
            ]
            choice = options[0].label if options else "None"
        option = (
            None
            if choice == "None"
            else next((each for each in self.sd_unet.unet_options if each.label == choice), None)
        )
        if option == self.sd_unet.current_unet_option:
            return
        if self.sd_unet.current_unet is not None:
            self.sd_unet.current_unet.deactivate()
        self.sd_unet.current_unet_option = option
        if option is None:
            self.sd_unet.current_unet = None
            return
        self.sd_unet.current_unet = option.create_unet()
        self.sd_unet.current_unet.option = option
        self.sd_unet.current_unet.activate()

    @contextmanager
    def job(self, *args: Any, **settings: Any) -> Iterator[Job]:
        """Begin a picture: the scripts run before and after it. It knows the checkpoint that it was started with.

        `settings` are those of the picture, such as its steps.
        """
        job = Job(
            comments=[],
            extra_generation_params={},
            sd_model=self.sd_model,
            sd_model_name=self.sd_model.sd_checkpoint_info.name_for_extra,
            **settings,
        )
        if not self.is_forge:
            self.apply_unet()
        for script in self.scripts:
            self._guarded(script.process_batch, job, *args, batch_number=0)
        try:
            yield job
        finally:
            for script in self.scripts:
                self._guarded(script.postprocess, job, job, *args)

    def predict(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Call the UNet as LDM's wrapper does."""
        module = self.sd_model.model.diffusion_model
        return (
            module(x, timesteps, context=context) if y is None else module(x, timesteps=timesteps, context=context, y=y)
        )

    def before_sampling(self, job: Job, *args: Any) -> None:
        """Prepare one of a picture's samplings in Forge: restore the patchers with LoRAs, then run the scripts."""
        job.sd_model = self.sd_model
        self.sd_model.forge_objects = SimpleNamespace(unet=self.sd_model.after_lora)
        for script in sorted(self.scripts, key=lambda script: script.sorting_priority):
            self._guarded(script.process_before_every_sampling, job, *args)

    def forge_denoise(
        self, x: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, control: Any = None
    ) -> torch.Tensor:
        """Call Forge's sampling function once, through the wrapper if there is one."""
        patcher = self.sd_model.forge_objects.unet
        options = patcher.model_options
        c = {"c_crossattn": context, "transformer_options": dict(options["transformer_options"], cond_or_uncond=[0])}
        if control is not None:
            c |= {"control": control, "control_model": object()}
        if "model_function_wrapper" in options:
            return options["model_function_wrapper"](
                patcher.model.apply_model, {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": [0]}
            )
        return patcher.model.apply_model(x, sigma, **c)


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(content)
    return module


@contextmanager
def running(webui: WebUI) -> Iterator[WebUI]:
    """Make the host's modules importable within the block, and restore `sys.modules` after it."""
    kept = dict(sys.modules)
    sys.modules.update(webui.modules())
    webui._patch()
    try:
        yield webui
    finally:
        for name in set(sys.modules) - set(kept):
            if name.partition(".")[0] in ("modules", "modules_forge", "networks", "gradio", "sdcompress_webui"):
                gone, (parent, _, leaf) = sys.modules.pop(name), name.rpartition(".")
                if (
                    getattr(sys.modules.get(parent), leaf, None) is gone
                ):  # an import from the package would still find it
                    delattr(sys.modules[parent], leaf)
        for name in webui.modules():
            if name in kept:
                sys.modules[name] = kept[name]
