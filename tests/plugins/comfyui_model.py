"""ComfyUI's model classes, written from its contracts."""

from __future__ import annotations

import copy
import enum
import math
import uuid
from typing import Any

import torch


class ModelType(enum.Enum):
    EPS = 1
    V_PREDICTION = 2


class ModelSampling(torch.nn.Module):
    """The discrete noise schedule, with σ by timestep, and the meaning of a prediction."""

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

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        low = timestep.floor().long()
        return torch.lerp(self.sigmas[low].log(), self.sigmas[timestep.ceil().long()].log(), timestep - low).exp()

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return noise / (sigma.view(-1, 1, 1, 1) ** 2 + 1) ** 0.5

    def calculate_denoised(self, sigma: torch.Tensor, output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        sigma = sigma.view(-1, 1, 1, 1)
        if self.kind is ModelType.EPS:
            return given - output * sigma
        return given / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5


class DistilledSampling(ModelSampling):
    """The schedule and the prediction of the node ModelSamplingDiscrete set to lcm: 50 timesteps."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, ModelType.EPS)
        self.timesteps = torch.arange(19, len(self.sigmas), 20)
        self.register_buffer("sigmas", self.sigmas[self.timesteps])

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.timesteps[super().timestep(sigma)]

    def calculate_denoised(self, sigma: torch.Tensor, output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        scale = 10.0 * self.timestep(sigma).view(-1, 1, 1, 1)
        clean = super().calculate_denoised(sigma, output, given)
        return clean * scale / (scale**2 + 0.25).sqrt() + given * 0.25 / (scale**2 + 0.25)


class LatentFormat:
    def __init__(self, scale_factor: float) -> None:
        self.scale_factor = scale_factor


class Config:
    """A model class of `supported_models`. Settings belong to the class until an object gets its own (before 2025)."""

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
    """That of December 2024 and later. It patches parameters of modules, and ignores patches of other keys."""

    def __init__(self, model: Any, load_device: Any, offload_device: Any, size: int = 0) -> None:
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        self.patches: dict[str, list[Any]] = {}
        self.patches_uuid = uuid.uuid4()
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        for name, value in (("model_loaded_weight_memory", 0), ("current_weight_patches_uuid", None)):
            if not hasattr(model, name):
                setattr(model, name, value)

    def model_size(self) -> int:
        return self.size or sum(value.nelement() * value.element_size() for value in self.model.state_dict().values())

    def clone(self) -> ModelPatcher:
        copied = ModelPatcher(
            self.model, self.load_device, self.offload_device, self.size
        )  # not `type(self)`, as before December 2024
        copied.patches = {key: list(found) for key, found in self.patches.items()}
        copied.patches_uuid = self.patches_uuid
        copied.model_options = copy.deepcopy(self.model_options)
        return copied

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> list[Any]:
        known = self.model.state_dict()
        for key in (found := [key for key in patches if key in known]):
            self.patches.setdefault(key, []).append((strength_patch, patches[key], strength_model, None, None))
        self.patches_uuid = uuid.uuid4()
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
        assert not list(self.model.diffusion_model.parameters())
        if full_load:
            self.model.to(device_to)
        self.model.model_loaded_weight_memory = self.model_size() if full_load else 0
        self.model.current_weight_patches_uuid = self.patches_uuid

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            self.model.to(device_to)
            self.model.model_loaded_weight_memory = 0
            self.model.current_weight_patches_uuid = None

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> None:
        loaded = self.model.current_weight_patches_uuid
        self.unpatch_model(
            self.offload_device,
            unpatch_weights=loaded is not None and (loaded != self.patches_uuid or force_patch_weights),
        )
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
