"""The engine folders of a WebUI: what each holds, and why one cannot serve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.engine_files import folder_faults
from sdcompress_engines.errors import ArtifactError, SdCompressError, UsageError, shorten
from sdcompress_engines.export_folder import check_export, read_named_json
from sdcompress_engines.few_steps import FewStepSampling, read_few_steps
from sdcompress_engines.flavour import obstacle
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, read_manifest
from sdcompress_engines.noise import find_host_difference
from sdcompress_engines.paths import is_link
from sdcompress_engines.runners.base import TensorSpec
from sdcompress_engines.runners.shapes import Ranges
from sdcompress_engines.signature import CONTEXT_TOKENS, context_width, signature
from sdcompress_engines.trust import find_consent

from .calls import ADDED, CONTEXT, SAMPLE, SIGNATURE
from .traits import Traits, is_whole

_FILES = {"engine": "unet.engine", "onnx": "unet.onnx"}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_ENDLESS = 2**20
NOT_ALLOWED = (
    "it was built elsewhere or by an earlier version, and is executable code: allow it in the sdcompress tab, if you"
    " trust its source"
)


@dataclass(frozen=True)
class Artifact:
    """A UNet on disk that a runner can open: an engine, or an ONNX graph.

    Attributes:
        folder: that holds the manifest and the graph.
        manifest: read from there.
        name: of the model, with the LoRAs that are baked in.
        source: sha256 of the model it was exported from.
        precision: such as `fp16`.
        profiles: the shapes it was built for. An ONNX graph takes all that its UNet takes.
        inputs: in the `webui` signature.
        multiple: what latent heights and widths must be divisible by.
        vae_scale: pixels per latent pixel.
        traits: what it needs from the checkpoint.
        unet_config: diffusers' config.
        whole: whether no block has been removed, so that its layers are the checkpoint's.
        sampling: that a few-step model was trained for, or None.
    """

    folder: Path
    manifest: Manifest
    name: str
    source: str
    precision: str
    profiles: tuple[Ranges, ...]
    inputs: tuple[TensorSpec, ...]
    multiple: int
    vae_scale: int
    traits: Traits
    unet_config: Mapping[str, Any]
    whole: bool
    sampling: FewStepSampling | None = None

    @property
    def file(self) -> Path:
        """The engine or graph."""
        return self.folder / _FILES[self.manifest.kind]

    @property
    def backend(self) -> str:
        """`tensorrt`, `tensorrt-rtx` or `onnxruntime`."""
        return identify(self.folder, self.manifest)[3]

    @property
    def loras(self) -> tuple[str, ...]:
        """The LoRAs that are baked in, as `NAME:WEIGHT`."""
        return baked_loras(self.manifest)

    @property
    def sha256(self) -> str:
        """Of the engine or graph, as its manifest has it."""
        return self.manifest.files[self.file.name].sha256

    @property
    def lacks_consent(self) -> bool:
        """Whether it is an engine that this machine could run, and that nobody has built or allowed here."""
        return (
            self.manifest.kind == "engine"
            and obstacle(self.manifest.config) is None
            and find_consent(self.sha256) is None
        )

    def find_obstacle(self) -> str | None:
        """Returns why this machine cannot run it, or may not, or None. The file is not opened."""
        if self.manifest.kind == "engine":
            error = obstacle(self.manifest.config)
            if error is not None:
                return _describe(error)
            return NOT_ALLOWED if self.lacks_consent else None
        from sdcompress_engines.runners.onnxruntime_install import missing

        return missing()

    def check_contents(self) -> None:
        """Compare every file with the manifest. The runner of an engine does this itself.

        Raises:
            ArtifactError: a file is missing, cut, altered or a link.
        """
        check_export(self.folder, [self.manifest.kind], unnamed=True)


@dataclass(frozen=True)
class Unreadable:
    """A folder whose engine cannot be offered.

    Attributes:
        folder: where it lies.
        fault: why.
        manifest: None if it cannot be read.
    """

    folder: Path
    fault: str
    manifest: Manifest | None = None


def find_artifacts(root: Path) -> list[Artifact | Unreadable]:
    """Returns what lies in the folders of `root`, two levels deep.

    So a folder that `sdcompress export` has written can be copied here unchanged. A folder in `root` may be a link, and
    one in it may not.

    Raises:
        UsageError: `root` cannot be listed.
    """
    if not root.is_dir():
        return []
    try:
        tops = _subfolders(root)
    except OSError as error:
        raise UsageError(
            f"the engine folder cannot be listed ({error.strerror or error})",
            where=root,
            hint="Settings → sdcompress → folder of the engines",
        ) from error
    artifacts: list[Artifact | Unreadable] = []
    for top in tops:
        try:
            folders = [top, *(folder for folder in _subfolders(top) if not is_link(folder))]
        except OSError as error:
            artifacts.append(Unreadable(top, f"cannot be listed ({error.strerror or error})"))
            continue
        artifacts += [artifact for folder in folders if (artifact := _read_folder(folder)) is not None]
    return artifacts


def _subfolders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))


def _read_folder(folder: Path) -> Artifact | Unreadable | None:
    """Returns what a folder holds; None if that is no engine and no graph."""
    manifest = None
    try:
        if (folder / MANIFEST_NAME).is_file():
            manifest = read_manifest(folder)
            if manifest is None:  # deleted since it was listed
                return Unreadable(folder, f"its {MANIFEST_NAME} is gone")
            return read_artifact(folder, manifest)
        stray = next((folder / name for name in _FILES.values() if (folder / name).is_file()), None)
        if stray is None:
            return None
        fault = f"{stray.name} has no {MANIFEST_NAME} beside it, so it is unknown what it was built for"
        return Unreadable(folder, fault)
    except SdCompressError as error:
        return Unreadable(folder, _describe(error), manifest)
    # Whatever a strange manifest or config leads to: one folder must not hide the others from the menu.
    except Exception as error:
        return Unreadable(folder, f"cannot be read ({type(error).__name__}: {shorten(error)})", manifest)


def read_artifact(folder: Path, manifest: Manifest) -> Artifact:
    """Returns what a folder with this manifest holds. File sizes are checked, the engine's bytes are not read.

    Raises:
        ArtifactError: not an engine or graph of the `webui` signature, or one with missing or cut files.
        ModelError: a UNet config that lacks shapes.
    """
    config = manifest.config
    _check_kind(folder, manifest)
    unet = read_named_json(folder, manifest, "pipeline/unet/config.json")
    if unet is None:
        raise ArtifactError("has no pipeline/unet/config.json, which describes the UNet", where=folder)
    scheduler = read_named_json(folder, manifest, "pipeline/scheduler/scheduler_config.json") or {}
    vae = read_named_json(folder, manifest, "pipeline/vae/config.json") or {}
    index = read_named_json(folder, manifest, "pipeline/model_index.json") or {}
    if difference := find_host_difference(scheduler, vae, schedule=True):
        raise ArtifactError(f"is of a model with {difference}, which a WebUI does not know", where=folder)
    name, source, precision, _ = identify(folder, manifest)
    graph = signature("unet", unet, _DTYPES.get(precision, torch.float32), host=SIGNATURE)
    profiles: tuple[Ranges, ...] = (_any_shape(graph.inputs, graph.multiple),)
    if manifest.kind == "engine":
        profiles = tuple(_read_profile(folder, profile) for profile in config["profiles"]["unet"])
    traits = Traits(
        context_width=context_width(unet),
        added_width=next((int(spec.shape[1]) for spec in graph.inputs if spec.name == ADDED), 0),
        channels=int(unet["in_channels"]),
        prediction=scheduler.get("prediction_type"),
    )
    return Artifact(
        folder=folder,
        manifest=manifest,
        name=name,
        source=source,
        precision=precision,
        profiles=profiles,
        inputs=graph.inputs,
        multiple=graph.multiple,
        vae_scale=int(config.get("vae_scale", 8)),
        traits=traits,
        unet_config=unet,
        whole=is_whole(unet),
        sampling=read_few_steps(index, scheduler),
    )


def _check_kind(folder: Path, manifest: Manifest) -> None:
    config = manifest.config
    if manifest.kind not in _FILES:
        raise ArtifactError(f"is of kind {manifest.kind!r}", where=folder, expected="an engine, or an ONNX graph")
    if config.get("signature") != SIGNATURE:
        raise ArtifactError(
            f"was exported with the signature {config.get('signature')!r}", where=folder, expected=SIGNATURE
        )
    if "unet" not in (config.get("components") or ()):
        raise ArtifactError("holds no UNet", where=folder)
    if damage := folder_faults(folder, manifest.kind, contents=False):
        raise ArtifactError(f"is damaged: {'; '.join(damage[:3])}", where=folder)
    if _FILES[manifest.kind] not in manifest.files:
        raise ArtifactError(f"the manifest names no {_FILES[manifest.kind]}", where=folder)


def can_be_offered(manifest: Manifest | None) -> bool:
    """Returns whether a manifest is one of an engine or of an ONNX graph."""
    return manifest is not None and manifest.kind in _FILES


def identify(folder: Path, manifest: Manifest) -> tuple[str, str, str, str]:
    """Returns name, source, precision and backend.

    Folders that agree in all four are one entry of the menu, intact or damaged.
    """
    config = manifest.config
    precisions = config.get("precisions")
    precision = (precisions.get("unet") if isinstance(precisions, dict) else None) or config.get("precision") or ""
    name = shorten(" + ".join([str(config.get("model_name") or folder.name), *baked_loras(manifest)]), 200)
    backend = str(config.get("flavour")) if manifest.kind == "engine" else "onnxruntime"
    return name, str(manifest.inputs.get("pipeline", "")), str(precision), backend


def baked_loras(manifest: Manifest) -> tuple[str, ...]:
    """Returns the LoRAs that are baked in, as `NAME:WEIGHT`, in the order of their names."""
    return tuple(sorted(name.removeprefix("lora ") for name in manifest.inputs if name.startswith("lora ")))


def _read_profile(folder: Path, profile: Any) -> Ranges:
    try:
        ranges = {}
        for name, (least, best, most) in profile.items():
            ranges[str(name)] = _read_shape(least), _read_shape(best), _read_shape(most)
        if not {SAMPLE, CONTEXT} <= set(ranges):
            raise ValueError("it lacks an input")
    except (TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"the manifest has no valid profile ({error})", where=folder) from error
    return ranges


def _read_shape(shape: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in shape)


def _any_shape(inputs: Iterable[TensorSpec], multiple: int) -> Ranges:
    """Returns the profile of an ONNX graph, which takes any size, as if tuned for two samples of 64×64 latents."""
    sizes = {
        "batch": (1, 2, 64),
        "tokens": (CONTEXT_TOKENS, CONTEXT_TOKENS, _ENDLESS),
        "height": (multiple, 64, _ENDLESS),
        "width": (multiple, 64, _ENDLESS),
    }

    def shape(spec: TensorSpec, at: int) -> tuple[int, ...]:
        return tuple(sizes[size][at] if isinstance(size, str) else size for size in spec.shape)

    return {spec.name: (shape(spec, 0), shape(spec, 1), shape(spec, 2)) for spec in inputs}


def nearest_sizes_px(latent: int, artifact: Artifact) -> tuple[int, int]:
    """Returns the next smaller and next larger size in pixels that a UNet takes.

    Args:
        latent: the refused height or width, in latent pixels.
        artifact: the UNet.
    """
    step = artifact.multiple
    return max(1, latent // step) * step * artifact.vae_scale, math.ceil(latent / step) * step * artifact.vae_scale


def _describe(error: SdCompressError) -> str:
    """Returns an error without its path and hint, which the table shows in columns of their own."""
    text = error.what if not error.expected else f"{error.what}; expected {error.expected}"
    return " ".join(text.split())
