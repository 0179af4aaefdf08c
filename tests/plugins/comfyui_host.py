"""ComfyUI as a custom node sees it: a small stand-in written from its contracts, or ComfyUI itself.

`SDCOMPRESS_COMFYUI=~/ComfyUI pytest tests/plugins -k comfyui`, in a Python that has ComfyUI's requirements, runs the
same tests against a checkout of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .comfyui_lora import calculate_weight, load_lora
from .comfyui_model import (
    SD15,
    SD20,
    SDXL,
    BaseModel,
    DistilledSampling,
    ModelPatcher,
    ModelType,
    SDXLModel,
    WrapperExecutor,
    get_all_wrappers,
)

REAL = os.environ.get("SDCOMPRESS_COMFYUI")


GIB = 2**30


def seeded_noise(x: torch.Tensor, seed: int | None = None) -> Callable[..., torch.Tensor]:
    """Returns what draws the noise of a sampler. ComfyUI's own adds 1 to the seed in some versions only."""
    generator = torch.Generator().manual_seed(seed or 0)
    return lambda sigma, following: torch.randn(x.shape, generator=generator)


class Harness:
    """The stand-in for ComfyUI.

    A condition is `(text (1, T, D), extras)`; extras are what a CLIP node adds, such as `pooled_output`.
    """

    free_memory = 64 * GIB
    reloads = False
    """Whether it unloads the model at each change of its patches."""

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
            "comfy.lora": {"calculate_weight": calculate_weight},
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

    def sigmas(self, patcher: Any, steps: int, scheduler: str = "normal") -> torch.Tensor:
        sampling = patcher.model.model_sampling
        table = sampling.sigmas
        if scheduler == "sgm_uniform":
            chosen = sampling.sigma(torch.linspace(len(table) - 1, 0, steps + 1)[:-1])
        elif scheduler == "simple":
            chosen = table[[-1 - step * len(table) // steps for step in range(steps)]]
        else:
            chosen = table[torch.linspace(len(table) - 1, 0, steps).round().long()]
        return torch.cat([chosen, torch.zeros(1)])

    def sample(
        self,
        patcher: Any,
        positive: Any,
        negative: Any,
        shape: tuple[int, ...],
        steps: int,
        cfg: float,
        seed: int,
        sampler: str = "euler",
        scheduler: str = "normal",
    ) -> torch.Tensor:
        """Returns the final latents of Euler's method or of LCM, unscaled as a VAE takes them."""
        self.loaded = [each for each in self.loaded if each.model is not patcher.model] + [patcher]
        patcher.partially_load(patcher.load_device, 1e32)
        sigmas, noise = self.sigmas(patcher, steps, scheduler), self.noise(shape, seed)
        more_noise = seeded_noise(noise, seed)
        x = noise * (1 + sigmas[0] ** 2) ** 0.5
        for now, then in itertools.pairwise(sigmas):
            conds = [positive] if math.isclose(cfg, 1) else [positive, negative]
            good, *bad = self._denoised(patcher, conds, x, now)
            denoised = bad[0] + cfg * (good - bad[0]) if bad else good
            if sampler == "lcm":
                x = denoised + then * more_noise(now, then) if then > 0 else denoised
            else:
                x = x + (x - denoised) / now * (then - now)
        return x / patcher.model.latent_format.scale_factor

    def _denoised(self, patcher: Any, conds: list[Any], x: torch.Tensor, sigma: torch.Tensor) -> list[torch.Tensor]:
        """Run the conditions in one call if the memory suffices and the lengths have a small common multiple.

        The shorter text is repeated to that length. Otherwise each condition runs alone.
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

    def lora(self, patcher: Any, tensors: dict[str, torch.Tensor], strength: float) -> Any:
        """Returns a copy of the model with a LoRA's layers of the UNet, as *Load LoRA* makes it."""
        copied = patcher.clone()
        copied.add_patches(load_lora(tensors, patcher.model), strength)
        return copied

    def wrap(self, patcher: Any, wrapper: Any) -> Any:
        copied = patcher.clone()
        copied.model_options["transformer_options"]["wrappers"] = {"diffusion_model": {"a test": [wrapper]}}
        return copied

    def sample_as_lcm(self, patcher: Any) -> Any:
        """Returns the model after the node ModelSamplingDiscrete, set to lcm."""
        copied = patcher.clone()
        copied.model.model_sampling = DistilledSampling(patcher.model.model_config)
        return copied

    def unload(self) -> None:
        for patcher in self.loaded:
            patcher.detach()
        self.loaded.clear()


class Real:
    """ComfyUI itself, with the same methods. The latest one and that of October 2025 were tried."""

    def __init__(self, models_dir: Path) -> None:
        assert REAL is not None
        if REAL not in sys.path:
            sys.path.insert(0, REAL)
        from comfy.cli_args import args

        args.cpu = True
        import comfy.lora
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
        sampling = self.comfy.k_diffusion.sampling
        sampler_noise, sampling.default_noise_sampler = sampling.default_noise_sampler, seeded_noise
        self.folder_paths.models_dir = str(self.models_dir)
        try:
            yield self
        finally:
            self.unload()
            sampling.default_noise_sampler = sampler_noise
            self.folder_paths.models_dir = before
            self.folder_paths.folder_names_and_paths.clear()
            self.folder_paths.folder_names_and_paths.update(known)

    @property
    def reloads(self) -> bool:
        """Whether it is of before December 2024."""
        return importlib.util.find_spec("comfy.patcher_extension") is None

    @property
    def free_memory(self) -> int:
        return 0

    @free_memory.setter
    def free_memory(self, value: int) -> None:
        raise NotImplementedError("ComfyUI reads it from the machine")

    def noise(self, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        found: torch.Tensor = self.comfy.sample.prepare_noise(torch.zeros(shape), seed, None)
        return found

    def sigmas(self, patcher: Any, steps: int, scheduler: str = "normal") -> torch.Tensor:
        found: torch.Tensor = self.comfy.samplers.KSampler(
            patcher, steps, torch.device("cpu"), "euler", scheduler, 1.0, {}
        ).sigmas
        return found

    def sample(
        self,
        patcher: Any,
        positive: Any,
        negative: Any,
        shape: tuple[int, ...],
        steps: int,
        cfg: float,
        seed: int,
        sampler: str = "euler",
        scheduler: str = "normal",
    ) -> torch.Tensor:
        conds = [[[text, dict(extras)]] for text, extras in (positive, negative)]
        found: torch.Tensor = self.comfy.sample.sample(
            patcher,
            self.noise(shape, seed),
            steps,
            cfg,
            sampler,
            scheduler,
            *conds,
            torch.zeros(shape),
            disable_pbar=True,
            seed=seed,
        )
        return found

    def lora(self, patcher: Any, tensors: dict[str, torch.Tensor], strength: float) -> Any:
        return self.comfy.sd.load_lora_for_models(patcher, None, dict(tensors), strength, 1.0)[0]

    def calculate(self, patcher: Any) -> Callable[..., torch.Tensor]:
        """Returns ComfyUI's own sum of a weight and its patches; before August 2024 it was a method."""
        return getattr(self.comfy.lora, "calculate_weight", None) or patcher.calculate_weight

    def wrap(self, patcher: Any, wrapper: Any) -> Any:
        import comfy.patcher_extension

        copied = patcher.clone()
        copied.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapper)
        return copied

    def sample_as_lcm(self, patcher: Any) -> Any:
        from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

        return ModelSamplingDiscrete().patch(patcher, "lcm", False)[0]

    def unload(self) -> None:
        self.comfy.model_management.unload_all_models()


def load_custom_node(folder: Path) -> Any:
    """Import a custom node as ComfyUI does: by its path, under a name derived from it."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
