"""The node, and the ComfyUI model around an engine.

ComfyUI is imported inside the functions that use it, so that everything else runs without it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .folders import EngineFolder, engine_folders, find_obstacle, read_folder
from .layout import ldm_layout
from .library import errors, manifest
from .model import LOG, EngineModel
from .patcher import patcher_class, refuse_saving
from .whole_model import read_whole_model

KIND = "sdcompress"
"""ComfyUI's name of the model folder: `models/sdcompress`, and `sdcompress:` in `extra_model_paths.yaml`."""


def model_folders() -> list[str]:
    """Returns the folders that engines may lie in, as ComfyUI is configured."""
    import folder_paths

    place = os.path.join(folder_paths.models_dir, KIND)
    if KIND not in folder_paths.folder_names_and_paths or place not in folder_paths.get_folder_paths(KIND):
        folder_paths.add_model_folder_path(KIND, place)
    return list(folder_paths.get_folder_paths(KIND))


def find_folder(name: str) -> Path:
    """Returns the folder of the engine with this name.

    Raises:
        UsageError: there is none.
    """
    roots = model_folders()
    folders = engine_folders(roots)
    if name not in folders:
        raise errors.UsageError(
            f"no engine {name!r} in {' or '.join(roots)}",
            expected=", ".join(folders) or None,
            hint="sdcompress install comfyui COMFYUI ENGINE, then press R in ComfyUI",
        )
    return folders[name]


def _list_few_step_engines(roots: list[str]) -> list[str]:
    """Returns a line for each few-step engine: what to choose in the KSampler."""
    lines = []
    for name, place in engine_folders(roots).items():
        try:
            sampling = read_folder(name, place).sampling
        except errors.SdCompressError:  # shown when this engine is chosen
            continue
        if sampling is not None:
            lines.append(f"{name}: {sampling.describe('comfyui')}")
    return lines


class LoadSdcompressEngine:
    """*Load sdcompress engine*: a MODEL whose UNet is an engine.

    Samplers, schedulers, guidance and everything else of ComfyUI's around the UNet stay as they are.
    """

    CATEGORY = "loaders"
    DESCRIPTION = (
        "A UNet engine (TensorRT, TensorRT-RTX or ONNX) built by sdcompress. Text encoder and VAE come from any"
        " checkpoint of the same family. Load LoRA works after this node, also on a student with a LoRA of the whole"
        " model. Of an engine in int8 or fp8, or built with --no-lora, LoRAs are baked in at export (sdcompress export"
        " --lora). LoRA hooks, ControlNet, IP-Adapter, FreeU and everything else that changes the UNet's layers are"
        " refused."
    )
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the node's inputs."""
        roots = model_folders()
        place = "A folder in models/sdcompress, put there by: sdcompress install comfyui COMFYUI ENGINE"
        graphs = (
            "Replay a captured CUDA graph for sizes that repeat: faster for small pictures, at the cost of some memory."
        )
        return {
            "required": {
                "engine": (
                    list(engine_folders(roots)),
                    {"tooltip": "\n".join([place, *_list_few_step_engines(roots)])},
                )
            },
            "optional": {"cuda_graph": ("BOOLEAN", {"default": False, "tooltip": graphs})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, engine: str) -> bool | str:
        """Returns True, or why this engine does not load here. ComfyUI shows it before anything runs."""
        try:
            return find_obstacle(read_folder(engine, find_folder(engine))) or True
        except errors.SdCompressError as error:
            return str(error)

    @classmethod
    def IS_CHANGED(cls, engine: str, cuda_graph: bool = False) -> str:
        """Returns a value that changes with the engine under this name, so that ComfyUI loads the new one."""
        try:
            return manifest.sha256_file(find_folder(engine) / manifest.MANIFEST_NAME)
        except (errors.SdCompressError, OSError) as error:
            return str(error)

    def load(self, engine: str, cuda_graph: bool = False) -> tuple[Any]:
        """Returns the MODEL. The engine itself is read at the first sampling.

        Raises:
            SdCompressError: it does not fit, is damaged, or does not load here.
        """
        folder = read_folder(engine, find_folder(engine))
        if folder.sampling is not None:
            LOG.info("%s was trained for %s", engine, folder.sampling.describe("comfyui"))
        return (engine_patcher(folder, {"cuda_graph": cuda_graph}),)


def engine_patcher(folder: EngineFolder, options: dict[str, Any] | None = None) -> Any:
    """Returns ComfyUI's MODEL: a `ModelPatcher` around a `BaseModel` whose diffusion model is the engine.

    Args:
        folder: the engine.
        options: of the runner, such as `cuda_graph`.
    """
    import comfy.model_management
    import comfy.model_patcher

    model = base_model(folder, options)
    patcher = patcher_class(comfy.model_patcher.ModelPatcher)(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
        size=folder.bytes,
    )
    patcher.model_keys = set(model.state_dict())  # ComfyUI before June 2024 sets it only if it computes the size itself
    return patcher


def base_model(folder: EngineFolder, options: dict[str, Any] | None = None) -> Any:
    """Returns ComfyUI's model of the engine's family, with its latents, noise schedule and prediction type.

    Args:
        folder: the engine.
        options: of the runner, such as `cuda_graph`.

    Raises:
        EngineMismatch: this ComfyUI does not support what the engine was trained with.
        ArtifactError: the file of weights beside the engine is damaged.
    """
    import comfy.model_base
    import comfy.supported_models

    config_class, model_class = {
        "sd1": (comfy.supported_models.SD15, comfy.model_base.BaseModel),
        "sd2": (comfy.supported_models.SD20, comfy.model_base.BaseModel),
        "sdxl": (comfy.supported_models.SDXL, comfy.model_base.SDXL),
    }[folder.family]
    kinds = {"epsilon": comfy.model_base.ModelType.EPS, "v_prediction": comfy.model_base.ModelType.V_PREDICTION}
    config = config_class({**ldm_layout(folder.whole), "disable_unet_model_creation": True})
    config.sampling_settings = {**config.sampling_settings, **folder.schedule}
    if folder.scaling_factor is not None:
        config.latent_format.scale_factor = folder.scaling_factor
    model = model_class(config, model_type=kinds[folder.prediction])
    if folder.schedule.get("zsnr") and float(model.model_sampling.sigma_max) < 1000:
        raise errors.EngineMismatch(
            "was trained to zero terminal SNR, which this ComfyUI does not support",
            where=folder.graph.parent,
            hint="update ComfyUI",
        )
    model.diffusion_model = EngineModel(folder, options, read_whole_model(folder), _wrapped)
    model.state_dict_for_saving = refuse_saving
    return model


def _wrapped(run: Any, model: Any, options: dict[str, Any], *arguments: Any) -> Any:
    """Run a call through the wrappers that other nodes, such as EasyCache, have put around the diffusion model.

    ComfyUI's own UNet does the same.
    """
    try:
        from comfy import patcher_extension
    except ImportError:  # ComfyUI before December 2024 has none
        return run(*arguments)
    around = patcher_extension.get_all_wrappers(patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
    return patcher_extension.WrapperExecutor.new_class_executor(run, model, around).execute(*arguments)


NODE_CLASS_MAPPINGS = {"LoadSdcompressEngine": LoadSdcompressEngine}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadSdcompressEngine": "Load sdcompress engine"}
