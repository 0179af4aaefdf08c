"""The engine folders of `models/sdcompress`: what each holds, and why one does not load here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .calls import Limits
from .layout import ldm_layout
from .library import (
    engine_files,
    errors,
    export_folder,
    few_steps,
    flavour,
    graph,
    manifest,
    noise,
    paths,
    signature,
    trust,
    verified,
)

if TYPE_CHECKING:
    from sdcompress_engines.few_steps import FewStepSampling
    from sdcompress_engines.manifest import Manifest

BUILD = "sdcompress export MODEL --trt --signature comfyui -o DIR"
_INSTALL = "install it again: sdcompress install comfyui COMFYUI ENGINE"
FAMILIES = {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL"}
_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float16,
    "int8": torch.float16,
}
# diffusers' name of a noise schedule → ComfyUI's, which comes from the LDM code base.
_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "squaredcos_cap_v2"}


@dataclass(frozen=True)
class EngineFolder:
    """A UNet graph and what ComfyUI needs to know about it.

    Attributes:
        name: of the folder, as the node lists it.
        graph: the path of `unet.engine` or `unet.onnx`.
        manifest: of the folder.
        family: `sd1`, `sd2` or `sdxl`.
        host: whose names the graph's inputs have, a key of `signature.HOSTS`.
        unet: diffusers' config of the UNet.
        whole: that of the whole model, which `unet` is a student of, or `unet` itself.
        prediction: `epsilon` or `v_prediction`.
        schedule: the noise schedule, as ComfyUI's `sampling_settings`.
        scaling_factor: of the latents, or None if the pipeline lacks it.
        dtype: of the graph's float tensors.
        limits: of its profiles; empty if every shape runs.
        sampling: that a few-step model was trained for, or None.
    """

    name: str
    graph: Path
    manifest: Manifest
    family: str
    host: str
    unet: Mapping[str, Any]
    whole: Mapping[str, Any]
    prediction: str
    schedule: Mapping[str, Any]
    scaling_factor: float | None
    dtype: torch.dtype
    limits: tuple[Limits, ...]
    sampling: FewStepSampling | None = None

    @property
    def bytes(self) -> int:
        """The size of the graph with its weights, which is what it takes of the memory.

        An engine contains its weights. The file of weights beside it is only read when they are exchanged.
        """
        if self.graph.suffix == ".engine":
            return self.manifest.files[self.graph.name].bytes
        return sum(entry.bytes for name, entry in self.manifest.files.items() if name.startswith(self.graph.name))

    @property
    def weights(self) -> Path | None:
        """The file with the weights that a LoRA changes, or None if the graph's weights cannot be exchanged."""
        file = graph.weights_path(self.graph)
        return file if file.name in self.manifest.files else None

    @property
    def precision(self) -> str:
        """The precision that the engine was exported in, such as `fp16`."""
        return _precision(self.manifest)

    @property
    def context_width(self) -> int:
        """The width of the text embeddings that it takes."""
        return signature.context_width(self.unet)


def engine_folders(roots: Iterable[str | Path]) -> dict[str, Path]:
    """Returns name → folder of every engine and ONNX folder in `roots`, in the order of names. The first root wins.

    The manifest may lie in the folder itself, or in its `engine` or `onnx` folder, as `export` writes them.
    """
    folders: dict[str, Path] = {}
    for root in map(Path, roots):
        for folder in sorted(root.iterdir()) if root.is_dir() else []:
            try:
                place = engine_files.find_manifest_folder(folder)
            except OSError:  # one folder without permission must not hide the others
                continue
            if place is not None and not folder.name.startswith("."):
                folders.setdefault(folder.name, place)
    return dict(sorted(folders.items(), key=lambda item: item[0].lower()))


def read_folder(name: str, folder: Path) -> EngineFolder:
    """Returns what an engine folder holds. The graph's bytes are not read.

    Args:
        name: of the engine in the node's list.
        folder: that holds the manifest.

    Raises:
        ArtifactError: no manifest, a broken or edited one, or files of other sizes than it lists.
        EngineMismatch: not a UNet of a family and signature that the node can run.
    """
    try:
        return _read_folder(name, folder)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, OSError) as error:
        raise errors.ArtifactError(
            f"its manifest or configs have an unexpected value ({type(error).__name__}: {errors.shorten(error, 120)})",
            where=folder,
            hint=BUILD,
        ) from error


def _read_folder(name: str, folder: Path) -> EngineFolder:
    """Returns what `read_folder` returns."""
    folder_manifest = manifest.read_manifest(folder)
    if folder_manifest is None or folder_manifest.kind not in ("engine", "onnx"):
        raise errors.ArtifactError(
            "is not an engine's folder"
            if folder_manifest is None
            else f"is of kind {folder_manifest.kind!r}, not an engine",
            where=folder,
            expected="what `sdcompress export` has written",
            hint=BUILD,
        )
    _check_sizes(folder, folder_manifest)
    file = folder / ("unet.engine" if folder_manifest.kind == "engine" else "unet.onnx")
    if file.name not in folder_manifest.files:
        raise errors.EngineMismatch(f"holds no {file.name}", where=folder, expected="the engine of a UNet", hint=BUILD)
    unet = _read_config(folder, folder_manifest, "unet/config.json")
    signature.check_unet_inputs(unet)
    family, host = _read_family(unet, folder), str(folder_manifest.config.get("signature"))
    if host not in signature.HOSTS or (host == "diffusers" and family == "sdxl"):
        raise errors.EngineMismatch(
            f"has the signature {host!r}, which ComfyUI does not call", where=folder, expected="comfyui", hint=BUILD
        )
    scheduler = _read_config(folder, folder_manifest, "scheduler/scheduler_config.json")
    vae = _read_config(folder, folder_manifest, "vae/config.json", needed=False)
    if difference := noise.find_host_difference(scheduler, vae, schedule=False):
        raise errors.EngineMismatch(
            f"is of a model with {difference}", where=folder, expected="noise and latents of Stable Diffusion"
        )
    prediction, schedule = _read_sampling(scheduler, folder)
    scaling = vae.get("scaling_factor")
    precision = _precision(folder_manifest)
    if precision not in _DTYPES:
        raise errors.ArtifactError(
            f"has the precision {precision!r}", where=folder, expected=", ".join(_DTYPES), hint=BUILD
        )
    return EngineFolder(
        name=name,
        graph=file,
        manifest=folder_manifest,
        family=family,
        host=host,
        unet=unet,
        whole=_read_whole(folder_manifest, unet, family, folder),
        prediction=prediction,
        schedule=schedule,
        scaling_factor=None if scaling is None else float(scaling),
        dtype=_DTYPES[precision],
        limits=tuple(Limits.of(each, host) for each in folder_manifest.config.get("profiles", {}).get("unet", [])),
        sampling=few_steps.read_exported_few_steps(folder, folder_manifest),
    )


def _precision(folder_manifest: Manifest) -> Any:
    config = folder_manifest.config
    return config.get("precisions", {}).get("unet", config.get("precision"))


def _read_whole(folder_manifest: Manifest, unet: Mapping[str, Any], family: str, where: Path) -> Mapping[str, Any]:
    """Returns the config of the whole model's UNet, from the plan in the manifest; without a plan it is the engine's.

    Raises:
        ArtifactError: the plan is of another model. TypeError, ValueError, LookupError: it is broken.
    """
    plan = folder_manifest.config.get("plan")
    if plan is None:
        ldm_layout(unet)
        return unet
    whole: dict[str, Any] = dict(plan["teacher"])
    ldm_layout(whole)
    found, width, wanted = _read_family(whole, where), signature.context_width(whole), signature.context_width(unet)
    if (found, width) != (family, wanted):
        raise errors.ArtifactError(
            f"names a whole model of {FAMILIES[found]} with text embeddings {width} wide",
            where=where,
            expected=f"{FAMILIES[family]}, {wanted} wide, as the engine is",
            hint=BUILD,
        )
    return whole


def _check_sizes(folder: Path, folder_manifest: Manifest) -> None:
    if damage := engine_files.folder_faults(folder, folder_manifest.kind, contents=False):
        raise errors.ArtifactError(f"is damaged: {'; '.join(damage[:3])}", where=folder, hint=_INSTALL)


def check_contents(folder: EngineFolder) -> None:
    """Compare the files of an ONNX folder with the manifest, so that no runtime opens an altered graph.

    Raises:
        ArtifactError: a file is missing, cut, altered or a link.
    """
    if folder.graph.suffix != ".onnx":
        return  # `engine_files.read_engine` reads an engine once, and checks what it has read
    export_folder.check_export(folder.graph.parent, ["onnx"], unnamed=True)


def check_weights(folder: EngineFolder) -> None:
    """Compare the file of weights beside an engine with the manifest. Of an ONNX graph, `check_contents` has done it.

    Raises:
        ArtifactError: it is missing, cut, altered or a link.
    """
    if folder.weights is None or folder.graph.suffix == ".onnx":
        return
    place = folder.graph.parent
    file = paths.file_inside(place, folder.weights.name, source=place / manifest.MANIFEST_NAME)
    if fault := manifest.find_file_fault(file, folder.manifest.files[file.name], verified.sha256_once):
        raise errors.ArtifactError(f"{file.name} {fault}", where=place, hint=_INSTALL)


def find_obstacle(folder: EngineFolder) -> str | None:
    """Returns why the engine does not load on this machine, or may not, or None."""
    if folder.graph.suffix == ".onnx":
        from .library import runners

        return runners.onnxruntime_install.missing()
    sha256 = folder.manifest.files[folder.graph.name].sha256
    error = flavour.obstacle(folder.manifest.config, folder.graph) or trust.refusal(folder.graph, sha256)
    return None if error is None else str(error)


def _read_family(unet: Mapping[str, Any], where: Path) -> str:
    """Returns the family of a UNet.

    SD1.x projects into its attentions by 1×1 convolutions, SD2.x by linear layers. SDXL takes the picture's size beside
    the text.

    Raises:
        EngineMismatch: the UNet is of no family that the node can run.
    """
    if (
        unet.get("in_channels") != 4
        or not unet.get("cross_attention_dim")
        or unet.get("addition_embed_type") not in (None, "text_time")
    ):
        raise errors.EngineMismatch(
            "is an engine of another kind of UNet",
            where=where,
            expected=f"one of {', '.join(FAMILIES.values())} for text to image",
        )
    if unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def _read_sampling(scheduler: Mapping[str, Any], where: Path) -> tuple[str, dict[str, Any]]:
    """Returns the prediction type, and the noise schedule as ComfyUI's `sampling_settings`."""
    prediction, kind = scheduler.get("prediction_type", "epsilon"), scheduler.get("beta_schedule")
    if kind not in _SCHEDULES or scheduler.get("trained_betas") is not None:
        raise errors.EngineMismatch(
            f"was trained with the noise schedule {kind!r}, which ComfyUI lacks",
            where=where,
            expected=", ".join(_SCHEDULES),
        )
    settings = {"beta_schedule": _SCHEDULES[kind], "timesteps": int(scheduler.get("num_train_timesteps", 1000))}
    for name, source in (("linear_start", "beta_start"), ("linear_end", "beta_end")):
        if source in scheduler:
            settings[name] = float(scheduler[source])
    return prediction, settings | ({"zsnr": True} if scheduler.get("rescale_betas_zero_snr") else {})


def _read_config(folder: Path, folder_manifest: Manifest, name: str, needed: bool = True) -> dict[str, Any]:
    content = export_folder.read_named_json(folder, folder_manifest, f"pipeline/{name}")
    if content is None and needed:
        raise errors.ArtifactError(
            "is missing, so the engine's model is unknown", where=folder / "pipeline" / name, hint=BUILD
        )
    return content or {}
