"""ComfyUI as a custom node sees it: a small stand-in written from its contracts, and ComfyUI itself where a checkout of
it is given.

`SDCOMPRESS_COMFYUI=~/ComfyUI pytest tests/plugins/test_comfyui_plugin.py`, in a Python that has ComfyUI's requirements,
runs the same tests against it.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import importlib.util
import itertools
import math
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

REAL = os.environ.get("SDCOMPRESS_COMFYUI")
GIB = 2**30


class ModelType(enum.Enum):
    EPS = 1
    V_PREDICTION = 2


class ModelSampling(torch.nn.Module):
    """The discrete noise schedule, with σ for t, and how a prediction is taken."""

    def __init__(self, config: Any, kind: ModelType) -> None:
        super().__init__()
        given = config.sampling_settings
        first, last, count = (
            given.get("linear_start", 0.00085),
            given.get("linear_end", 0.012),
            given.get("timesteps", 1000),
        )
        root = {"linear": 0.5, "sqrt_linear": 1.0}[given.get("beta_schedule", "linear")]
        betas = torch.linspace(first**root, last**root, count, dtype=torch.float64) ** (1 / root)
        alphas = torch.cumprod(1 - betas, 0)
        if given.get("zsnr", False):
            roots = alphas.sqrt()
            roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
            alphas = roots**2
            alphas[-1] = 4.8973451890853435e-08
        self.register_buffer("sigmas", ((1 - alphas) / alphas).sqrt().float())
        self.kind = kind

    @property
    def sigma_max(self) -> torch.Tensor:
        return self.sigmas[-1]

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(dim=0)

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return noise / (sigma.view(-1, 1, 1, 1) ** 2 + 1) ** 0.5

    def calculate_denoised(self, sigma: torch.Tensor, output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        sigma = sigma.view(-1, 1, 1, 1)
        if self.kind is ModelType.EPS:
            return given - output * sigma
        return given / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5


class LatentFormat:
    def __init__(self, scale_factor: float) -> None:
        self.scale_factor = scale_factor


class Config:
    """A model class of `supported_models`; settings belong to the class until somebody gives the object its own, as
    before 2025.
    """

    scale_factor = 0.18215
    sampling_settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, unet_config: dict[str, Any]) -> None:
        self.unet_config = dict(unet_config)
        self.latent_format = LatentFormat(self.scale_factor)


class SD15(Config): ...


class SD20(Config): ...


class SDXL(Config):
    scale_factor = 0.13025


class BaseModel(torch.nn.Module):
    def __init__(self, model_config: Any, model_type: ModelType = ModelType.EPS, device: Any = None) -> None:
        super().__init__()
        assert model_config.unet_config["disable_unet_model_creation"]
        self.model_config, self.latent_format, self.device = model_config, model_config.latent_format, device
        self.model_sampling = ModelSampling(model_config, model_type)
        self.adm_channels = model_config.unet_config.get("adm_in_channels") or 0
        self.diffusion_model: Any

    def get_dtype(self) -> torch.dtype:
        return self.diffusion_model.dtype

    def encode_adm(self, **kwargs: Any) -> torch.Tensor | None:
        return None

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        return float(input_shape[0] * math.prod(input_shape[2:]) * 0.15 * 2**20)

    def apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_crossattn: torch.Tensor,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        dtype = self.get_dtype()
        given = self.model_sampling.calculate_input(t, x).to(dtype)
        more = {name: value.to(dtype) for name, value in kwargs.items()}
        output = self.diffusion_model(
            given,
            self.model_sampling.timestep(t).float(),
            context=c_crossattn.to(dtype),
            control=control,
            transformer_options=transformer_options,
            **more,
        ).float()
        return self.model_sampling.calculate_denoised(t, output, x)

    def state_dict_for_saving(self, *others: Any) -> dict[str, Any]:
        return {f"model.diffusion_model.{key}": value for key, value in self.diffusion_model.state_dict().items()}


class SDXLModel(BaseModel):
    def encode_adm(self, **kwargs: Any) -> torch.Tensor:
        pooled = kwargs["pooled_output"]
        width = (self.adm_channels - pooled.shape[1]) // 6
        frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
        sizes = torch.tensor(
            [kwargs[name] for name in ("height", "width", "crop_h", "crop_w", "target_height", "target_width")],
            dtype=torch.float32,
        )
        angles = sizes[:, None] * frequencies
        return torch.cat([pooled, torch.cat([angles.cos(), angles.sin()], 1).reshape(1, -1).expand(len(pooled), -1)], 1)


class ModelPatcher:
    def __init__(self, model: Any, load_device: Any, offload_device: Any, size: int = 0) -> None:
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        self.patches: dict[str, list[Any]] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.model.model_loaded_weight_memory = getattr(model, "model_loaded_weight_memory", 0)

    def model_size(self) -> int:
        return self.size or sum(value.nelement() * value.element_size() for value in self.model.state_dict().values())

    def clone(self) -> ModelPatcher:
        copied = ModelPatcher(
            self.model, self.load_device, self.offload_device, self.size
        )  # by this name, as before December 2024
        copied.patches = {key: list(found) for key, found in self.patches.items()}
        copied.model_options = copy.deepcopy(self.model_options)
        return copied

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> list[Any]:
        known = self.model.state_dict()
        for key in (found := [key for key in patches if key in known]):
            self.patches.setdefault(key, []).append((strength_patch, patches[key], strength_model))
        return found

    def add_hook_patches(
        self, hook: Any, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        return self.add_patches(patches, strength_patch, strength_model)

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, Any]:
        return {key: [value] for key, value in self.model.state_dict().items() if key.startswith(filter_prefix or "")}

    def set_patch(self, name: str, patch: Any) -> None:
        self.model_options["transformer_options"].setdefault("patches", {}).setdefault(name, []).append(patch)

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        for key in self.patches:
            raise AttributeError(f"no weight {key} to patch")
        if full_load:
            self.model.to(device_to)
        self.model.model_loaded_weight_memory = self.model_size() if full_load else 0

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            self.model.to(device_to)
            self.model.model_loaded_weight_memory = 0

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> None:
        self.unpatch_model(self.offload_device, unpatch_weights=False)
        if self.model.model_loaded_weight_memory == 0:
            self.load(
                device_to,
                lowvram_model_memory=extra_memory,
                force_patch_weights=force_patch_weights,
                full_load=extra_memory > self.model_size(),
            )

    def detach(self, unpatch_all: bool = True) -> None:
        if unpatch_all:
            self.unpatch_model(self.offload_device, unpatch_weights=unpatch_all)


class WrapperExecutor:
    def __init__(self, original: Any, owner: Any, wrappers: list[Any], at: int = 0) -> None:
        self.original, self.class_obj, self.wrappers, self.at = original, owner, wrappers, at

    @classmethod
    def new_class_executor(cls, original: Any, owner: Any, wrappers: list[Any]) -> WrapperExecutor:
        return cls(original, owner, wrappers)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.at == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.at](
            WrapperExecutor(self.original, self.class_obj, self.wrappers, self.at + 1), *args, **kwargs
        )

    __call__ = execute


def get_all_wrappers(kind: str, options: dict[str, Any]) -> list[Any]:
    return [wrapper for group in options.get("wrappers", {}).get(kind, {}).values() for wrapper in group]


def unet_to_diffusers(config: dict[str, Any]) -> dict[str, str]:
    """diffusers' name → LDM's, of each attention's query: enough to tell where a LoRA goes."""
    found: dict[str, str] = {}

    def add(theirs: str, ours: str, depth: int) -> None:
        found.update(
            {
                f"{theirs}.transformer_blocks.{t}.attn1.to_q.weight": (
                    f"{ours}.1.transformer_blocks.{t}.attn1.to_q.weight"
                )
                for t in range(depth)
            }
        )

    pairs, down, up = (
        config["num_res_blocks"],
        iter(config["transformer_depth"]),
        list(config["transformer_depth_output"]),
    )
    at = 1
    for level, count in enumerate(pairs):
        for pair in range(count):
            add(f"down_blocks.{level}.attentions.{pair}", f"input_blocks.{at}", next(down))
            at += 1
        at += 1
    add("mid_block.attentions.0", "middle_block", max(config["transformer_depth_middle"], 0))
    at = 0
    for level, count in enumerate(reversed(pairs)):
        for pair in range(count + 1):
            add(f"up_blocks.{level}.attentions.{pair}", f"output_blocks.{at}", up.pop())
            at += 1
    return found


class Harness:
    """The stand-in.

    A condition is `(text (1, T, D), extras)`; extras are what a CLIP node adds, such as `pooled_output`.
    """

    free_memory = 64 * GIB

    def __init__(self, models_dir: Path) -> None:
        self.loaded: list[Any] = []
        self.folder_paths: Any = types.ModuleType("folder_paths")
        known: dict[str, tuple[list[str], set[str]]] = {}
        self.folder_paths.models_dir, self.folder_paths.folder_names_and_paths = str(models_dir), known
        self.folder_paths.add_model_folder_path = lambda name, path: known.setdefault(name, ([], set()))[0].append(path)
        self.folder_paths.get_folder_paths = lambda name: known[name][0]

    def modules(self) -> dict[str, Any]:
        cpu = torch.device("cpu")
        contents: dict[str, dict[str, Any]] = {
            "comfy": {},
            "comfy.model_base": {"BaseModel": BaseModel, "SDXL": SDXLModel, "ModelType": ModelType},
            "comfy.supported_models": {"SD15": SD15, "SD20": SD20, "SDXL": SDXL},
            "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
            "comfy.model_management": {"get_torch_device": lambda: cpu, "unet_offload_device": lambda: cpu},
            "comfy.patcher_extension": {
                "WrapperExecutor": WrapperExecutor,
                "get_all_wrappers": get_all_wrappers,
                "WrappersMP": types.SimpleNamespace(DIFFUSION_MODEL="diffusion_model"),
            },
            "comfy.utils": {"unet_to_diffusers": unet_to_diffusers},
        }
        found: dict[str, Any] = {"folder_paths": self.folder_paths}
        for name, content in contents.items():
            found[name] = types.ModuleType(name)
            vars(found[name]).update(content)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(found[parent], child, found[name])
        return found

    @contextlib.contextmanager
    def running(self) -> Iterator[Harness]:
        before = dict(sys.modules)
        sys.modules.update(self.modules())
        try:
            yield self
        finally:
            for name in [name for name in sys.modules if name.split(".")[0] in ("comfy", "folder_paths")]:
                del sys.modules[name]
            sys.modules.update(
                {name: module for name, module in before.items() if name.split(".")[0] in ("comfy", "folder_paths")}
            )

    def noise(self, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.manual_seed(seed))

    def sigmas(self, patcher: Any, steps: int) -> torch.Tensor:
        table = patcher.model.model_sampling.sigmas
        return torch.cat([table[torch.linspace(len(table) - 1, 0, steps).round().long()], torch.zeros(1)])

    def sample(
        self, patcher: Any, positive: Any, negative: Any, shape: tuple[int, ...], steps: int, cfg: float, seed: int
    ) -> torch.Tensor:
        """Final latents by Euler, unscaled as a VAE takes them."""
        if patcher not in self.loaded:
            patcher.partially_load(patcher.load_device, 1e32)
            self.loaded.append(patcher)
        sigmas, noise = self.sigmas(patcher, steps), self.noise(shape, seed)
        x = noise * (1 + sigmas[0] ** 2) ** 0.5
        for now, then in itertools.pairwise(sigmas):
            good, bad = self._denoised(patcher, [positive, negative], x, now)
            x = x + (x - (bad + cfg * (good - bad))) / now * (then - now)
        return x / patcher.model.latent_format.scale_factor

    def _denoised(self, patcher: Any, conds: list[Any], x: torch.Tensor, sigma: torch.Tensor) -> list[torch.Tensor]:
        """Together in one call where memory allows and lengths have a small common multiple, to which the shorter text
        is repeated; else one by one.
        """
        model, times = patcher.model, sigma.expand(len(x))
        lengths = [cond[0].shape[1] for cond in conds]
        common = math.lcm(*lengths)
        together = (
            common // min(lengths) <= 4 and model.memory_required([2 * len(x), *x.shape[1:]]) * 1.5 < self.free_memory
        )
        groups = [conds] if together else [[cond] for cond in conds]
        results = []
        for group in groups:
            size = common if together else group[0][0].shape[1]
            more = [
                model.encode_adm(
                    height=8 * x.shape[2],
                    width=8 * x.shape[3],
                    crop_h=0,
                    crop_w=0,
                    target_height=8 * x.shape[2],
                    target_width=8 * x.shape[3],
                    **cond[1],
                )
                for cond in group
            ]
            text = torch.cat([cond[0].repeat(len(x), size // cond[0].shape[1], 1) for cond in group])
            extra = {} if more[0] is None else {"y": torch.cat([each.expand(len(x), -1) for each in more])}
            options = {
                **patcher.model_options["transformer_options"],
                "cond_or_uncond": list(range(len(group))),
                "sigmas": times,
            }
            out = model.apply_model(
                torch.cat([x] * len(group)),
                torch.cat([times] * len(group)),
                c_crossattn=text,
                transformer_options=options,
                **extra,
            )
            results += out.chunk(len(group))
        return results

    def lora(self, patcher: Any, keys: list[str], strength: float) -> Any:
        """As the node *Load LoRA*: a LoRA's layers, by kohya's or diffusers' names, on a copy of the model."""
        known = patcher.model.state_dict()
        named = {
            f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}": f"diffusion_model.{ours}"
            for key, ours in unet_to_diffusers(patcher.model.model_config.unet_config).items()
        }
        named |= {
            f"lora_unet_{key.removeprefix('diffusion_model.').removesuffix('.weight').replace('.', '_')}": key
            for key in known
            if key.startswith("diffusion_model.")
        }
        copied = patcher.clone()
        copied.add_patches({named[key]: torch.ones(1) for key in keys if key in named}, strength)
        return copied

    def wrap(self, patcher: Any, wrapper: Any) -> Any:
        copied = patcher.clone()
        copied.model_options["transformer_options"]["wrappers"] = {"diffusion_model": {"a test": [wrapper]}}
        return copied

    def unload(self) -> None:
        for patcher in self.loaded:
            patcher.detach()
        self.loaded.clear()


class Real:
    """ComfyUI itself, by the same calls; the latest and that of October 2025 were tried."""

    def __init__(self, models_dir: Path) -> None:
        assert REAL is not None
        if REAL not in sys.path:
            sys.path.insert(0, REAL)
        from comfy.cli_args import args

        args.cpu = True
        import comfy.model_management
        import comfy.sample
        import comfy.samplers
        import comfy.sd
        import folder_paths

        self.comfy, self.folder_paths = comfy, folder_paths
        self.models_dir = models_dir

    @contextlib.contextmanager
    def running(self) -> Iterator[Real]:
        before, known = self.folder_paths.models_dir, dict(self.folder_paths.folder_names_and_paths)
        self.folder_paths.models_dir = str(self.models_dir)
        try:
            yield self
        finally:
            self.unload()
            self.folder_paths.models_dir = before
            self.folder_paths.folder_names_and_paths.clear()
            self.folder_paths.folder_names_and_paths.update(known)

    @property
    def free_memory(self) -> int:
        return 0

    @free_memory.setter
    def free_memory(self, value: int) -> None:
        raise NotImplementedError("ComfyUI asks the machine")

    def noise(self, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        found: torch.Tensor = self.comfy.sample.prepare_noise(torch.zeros(shape), seed, None)
        return found

    def sigmas(self, patcher: Any, steps: int) -> torch.Tensor:
        found: torch.Tensor = self.comfy.samplers.KSampler(
            patcher, steps, torch.device("cpu"), "euler", "normal", 1.0, {}
        ).sigmas
        return found

    def sample(
        self, patcher: Any, positive: Any, negative: Any, shape: tuple[int, ...], steps: int, cfg: float, seed: int
    ) -> torch.Tensor:
        conds = [[[text, dict(extras)]] for text, extras in (positive, negative)]
        found: torch.Tensor = self.comfy.sample.sample(
            patcher,
            self.noise(shape, seed),
            steps,
            cfg,
            "euler",
            "normal",
            *conds,
            torch.zeros(shape),
            disable_pbar=True,
            seed=seed,
        )
        return found

    def lora(self, patcher: Any, keys: list[str], strength: float) -> Any:
        parts = {"lora_up.weight": torch.ones(4, 2), "lora_down.weight": torch.ones(2, 4), "alpha": torch.tensor(2.0)}
        return self.comfy.sd.load_lora_for_models(
            patcher, None, {f"{key}.{name}": part for key in keys for name, part in parts.items()}, strength, 1.0
        )[0]

    def wrap(self, patcher: Any, wrapper: Any) -> Any:
        import comfy.patcher_extension

        copied = patcher.clone()
        copied.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapper)
        return copied

    def unload(self) -> None:
        self.comfy.model_management.unload_all_models()


def load_custom_node(folder: Path) -> Any:
    """A custom node's module, imported as ComfyUI does it: by its path, under a name made of it."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
