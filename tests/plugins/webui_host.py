"""A1111's WebUI and Forge as an extension sees them: small, and written from what the two promise, in their order of
calls.

`WebUI` puts `modules`, `gradio` and, for Forge, `modules_forge` into `sys.modules`, loads an extension's scripts, and
samples with k-diffusion's Euler method.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch

from sdcompress.checkpoints.ldm_keys import unet_keys


class UNetModel(torch.nn.Module):
    """The checkpoint's UNet: LDM's names for its parameters, diffusers' arithmetic; A1111 patches `forward` of the
    class.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self._run = [unet]  # a list, so that its parameters have LDM's names only
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


def reference(unet: Any) -> Callable[..., torch.Tensor]:
    """The same call by diffusers: `y` is SDXL's embedding and sizes in one vector."""

    @torch.no_grad()
    def run(
        x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        if y is None:
            return unet(x, timesteps, context).sample
        unet.get_aug_embed = lambda **_: unet.add_embedding(y)
        try:
            return unet(x, timesteps, context, added_cond_kwargs={}).sample
        finally:
            del unet.get_aug_embed

    return run


SIGMAS = (
    (
        (
            1
            - (
                cumulative := torch.cumprod(
                    1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0
                )
            )
        )
        / cumulative
    )
    .sqrt()
    .float()
)


def schedule(steps: int) -> torch.Tensor:
    """Sigmas from the largest down to zero, between the model's own, as k-diffusion's Karras-free schedule has them."""
    times = torch.linspace(999, 0, steps)
    low = times.floor().long()
    logs = SIGMAS.log()
    return torch.cat([torch.lerp(logs[low], logs[times.ceil().long()], times - low).exp(), torch.zeros(1)])


def timestep_of(sigma: torch.Tensor) -> torch.Tensor:
    """A timestep that may lie between two of the model's, float32, (B,)."""
    logs, wanted = SIGMAS.log(), sigma.log()
    low = (torch.searchsorted(logs, wanted.contiguous()) - 1).clamp(0, 998)
    share = ((wanted - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)
    return low + share


Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


def denoise(
    predict: Predict, x: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, y: torch.Tensor | None
) -> torch.Tensor:
    """What the picture would be without its noise, by a UNet that predicts the noise."""
    scaled = x / (sigma**2 + 1).sqrt()[:, None, None, None]
    return x - sigma[:, None, None, None] * predict(scaled, timestep_of(sigma), context, y)


class Guidance:
    """Classifier-free guidance as A1111 arranges it: cond and uncond in one call or in two, or cond alone."""

    def __init__(
        self, predict: Predict, together: bool = True, skip_uncond: Callable[[int], bool] = lambda step: False
    ) -> None:
        self.predict, self.together, self.skip = predict, together, skip_uncond
        self.steps: list[torch.Tensor] = []

    def __call__(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        cond: torch.Tensor,
        uncond: torch.Tensor,
        y: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        sigmas = sigma.expand(len(x))
        if self.skip(len(self.steps)):
            found = denoise(self.predict, x, sigmas, cond, y)
        elif self.together and cond.shape[1] == uncond.shape[1]:
            both = denoise(
                self.predict,
                torch.cat([x, x]),
                torch.cat([sigmas, sigmas]),
                torch.cat([cond, uncond]),
                None if y is None else torch.cat([y, y]),
            )
            with_prompt, without = both.chunk(2)
            found = without + (with_prompt - without) * scale
        else:
            with_prompt, without = (denoise(self.predict, x, sigmas, each, y) for each in (cond, uncond))
            found = without + (with_prompt - without) * scale
        self.steps.append(found)
        return found


def euler(
    guidance: Guidance,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    y: torch.Tensor | None = None,
    scale: float = 4.0,
) -> torch.Tensor:
    """Final latents; `guidance.steps` has the denoised ones of each step."""
    for sigma, following in itertools.pairwise(sigmas):
        denoised = guidance(x, sigma, cond, uncond, y, scale)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


class Job(SimpleNamespace):
    """A picture in the making."""

    def comment(self, text: str) -> None:
        self.comments.append(text)


class Widget:
    """A gradio component: what it was made with, and what a click would do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs, self.clicked = args, kwargs, None
        Widget.made.append(self)

    made: ClassVar[list[Widget]] = []

    def click(self, fn: Any, inputs: Any, outputs: Any) -> None:
        self.clicked = fn

    def __enter__(self) -> Widget:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class WebUI:
    """One start of a WebUI in `root`, with a checkpoint of which only the UNet is there. Use `running`."""

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
        """Another checkpoint, kept in memory beside the first: A1111 then leaves the chosen UNet active."""

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
        """What an extension imports."""

        class SdUnetOption:
            model_name: Any = None
            label: Any = None

            def create_unet(self) -> Any:
                raise NotImplementedError

        class SdUnet(torch.nn.Module):
            def activate(self) -> None:
                return None

            def deactivate(self) -> None:
                return None

        class Script:
            sorting_priority = 0

            def ui(self, is_img2img: bool) -> Any:
                return None

        class OptionInfo:
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
        found = {"modules": _module("modules", **parts), **{f"modules.{name}": part for name, part in parts.items()}}
        found["gradio"] = _module(
            "gradio",
            **{
                name: type(name, (Widget,), {})
                for name in ("Accordion", "Blocks", "Button", "Dropdown", "HTML", "Radio")
            },
            update=dict,
        )
        found["networks"] = _module("networks", loaded_networks=[])
        if self.is_forge:
            found["modules_forge"] = _module("modules_forge")
        return found

    def load_extension(self, folder: Path) -> None:
        """Its scripts, each by its file and with the folder first on the path meanwhile."""
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
        """A callback's error is written down, and the host goes on."""
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
        """The HTML of the extension's tab."""
        Widget.made.clear()
        for fn in self.callbacks.get("ui_tabs", []):
            fn()
        return next(str(widget.kwargs["value"]) for widget in Widget.made if type(widget).__name__ == "HTML")

    def apply_unet(self, choice: str | None = None) -> None:
        """A1111's order: the old one deactivated, the checkpoint's UNet to the CPU, the new one made, named, activated;
        nothing where it is the same.
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
    def job(self, *args: Any) -> Iterator[Job]:
        """A picture: scripts before and after, the chosen UNet between. It knows the checkpoint it was begun with."""
        job = Job(
            comments=[],
            extra_generation_params={},
            sd_model=self.sd_model,
            sd_model_name=self.sd_model.sd_checkpoint_info.name_for_extra,
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
        """The host's call of its UNet, as LDM's wrapper makes it."""
        module = self.sd_model.model.diffusion_model
        return (
            module(x, timesteps, context=context) if y is None else module(x, timesteps=timesteps, context=context, y=y)
        )

    def before_sampling(self, job: Job, *args: Any) -> None:
        """Forge, before each of a picture's samplings: the patchers as they were after the LoRAs, then the scripts."""
        job.sd_model = self.sd_model
        self.sd_model.forge_objects = SimpleNamespace(unet=self.sd_model.after_lora)
        for script in sorted(self.scripts, key=lambda script: script.sorting_priority):
            self._guarded(script.process_before_every_sampling, job, *args)

    def forge_denoise(
        self, x: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, control: Any = None
    ) -> torch.Tensor:
        """One call of Forge's sampling function: by the wrapper where there is one."""
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


class KModel(torch.nn.Module):
    """Forge's arithmetic around the UNet: sigmas in, denoised latents out."""

    def __init__(self, unet: torch.nn.Module, prediction: str) -> None:
        super().__init__()
        self.diffusion_model = unet
        self.predictor = SimpleNamespace(prediction_type=prediction)

    def apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **extra: Any,
    ) -> torch.Tensor:
        scaled = x / (t**2 + 1).sqrt()[:, None, None, None]
        out = self.diffusion_model(
            scaled,
            timestep_of(t),
            context=c_crossattn,
            control=control,
            transformer_options=transformer_options,
            **extra,
        ).float()
        return x - out * t[:, None, None, None]


class Patcher:
    """Forge's model patcher, whose options are copied deeply with it."""

    def __init__(self, model: KModel) -> None:
        self.model, self.lora_patches, self.controlnet_linked_list = model, {}, None
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Patcher:
        made = Patcher(self.model)
        made.lora_patches, made.controlnet_linked_list = dict(self.lora_patches), self.controlnet_linked_list
        made.model_options = copy.deepcopy(self.model_options)
        return made

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.model_options["model_function_wrapper"] = wrapper


def forge_model(unet: torch.nn.Module, prediction: str) -> SimpleNamespace:
    patcher = Patcher(KModel(unet, prediction))
    return SimpleNamespace(after_lora=patcher, forge_objects=SimpleNamespace(unet=patcher))


def _module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    made.__dict__.update(content)
    return made


@contextmanager
def running(webui: WebUI) -> Iterator[WebUI]:
    """The host's modules are importable within; afterwards everything is as it was."""
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
                ):  # or an import from the package would find it still
                    delattr(sys.modules[parent], leaf)
        for name in webui.modules():
            if name in kept:
                sys.modules[name] = kept[name]
