"""The engines of a folder: what each is, whether this machine and the loaded checkpoint can have it, and which of them
are one model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ArtifactError, EngineMismatch, SdCompressError, UsageError
from sdcompress_engines.flavour import obstacle
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, faults, read_manifest, sha256_file
from sdcompress_engines.runners.base import TensorSpec
from sdcompress_engines.runners.shapes import Ranges
from sdcompress_engines.signature import CONTEXT_TOKENS, signature
from sdcompress_engines.engine_files import engine_faults

SIGNATURE = "webui"
PREFIX = "[sdcompress] "
REASON = " – cannot run: "
_FILES = {"engine": "unet.engine", "onnx": "unet.onnx"}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_ENDLESS = 2**20


@dataclass(frozen=True)
class Traits:
    """What a UNet and the checkpoint around it must have in common; None is not known.

    Attributes:
        context_width: of the text embedding: 768 for SD1, 1024 for SD2, 2048 for SDXL.
        added_width: of the vector `y` that SDXL adds; 0 is none.
        channels: of the latents it takes: 4, and 9 for inpainting.
        prediction: `epsilon` or `v_prediction`.
    """

    context_width: int | None = None
    added_width: int | None = None
    channels: int | None = None
    prediction: str | None = None

    def why_not(self, checkpoint: Traits) -> str | None:
        """Why a UNet of these traits does not fit under `checkpoint`, or None."""
        for field, what in (
            ("context_width", "text embeddings of width"),
            ("added_width", "an added vector of width"),
            ("channels", "latents with channels:"),
            ("prediction", "prediction type"),
        ):
            mine, theirs = getattr(self, field), getattr(checkpoint, field)
            if mine is not None and theirs is not None and mine != theirs:
                return (
                    f"it takes {what} {mine} ({self.family}), and the loaded checkpoint has {theirs}"
                    f" ({checkpoint.family})"
                )
        return None

    @property
    def family(self) -> str:
        return (
            "SDXL"
            if self.added_width
            else {768: "SD1.x", 1024: "SD2.x"}.get(self.context_width or 0, "a family of its own")
        )


def traits_of_parameters(parameters: Iterable[tuple[str, Any]], prediction: str | None = None) -> Traits:
    """The traits of a UNet in LDM layout by the shapes of its parameters, as A1111 and Forge hold it."""
    context, added, channels = None, 0, None
    for name, value in parameters:
        shape = tuple(value.shape)
        if context is None and name.endswith("attn2.to_k.weight"):
            context = shape[1]
        elif name.endswith("label_emb.0.0.weight"):
            added = shape[1]
        elif name.endswith("input_blocks.0.0.weight"):
            channels = shape[1]
    if context is None and channels is None:
        return Traits(prediction=prediction)
    return Traits(context, added, channels, prediction)


@dataclass(frozen=True)
class Artifact:
    """One UNet on disk that a runner can open: an engine, or an ONNX graph.

    Attributes:
        name: of the model, with the LoRAs that are baked in. source: sha256 of what it was exported from.
        profiles: the shapes it was built for; a graph takes any that its UNet does.
        inputs: as the `webui` signature has them. multiple: what latent heights and widths must be divisible by.
        whole: no block has been removed, so its layers are the checkpoint's.
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

    @property
    def file(self) -> Path:
        return self.folder / _FILES[self.manifest.kind]

    @property
    def backend(self) -> str:
        """`tensorrt`, `tensorrt-rtx` or `onnxruntime`."""
        return identity(self.folder, self.manifest)[3]

    @property
    def loras(self) -> tuple[str, ...]:
        """Those baked in, as `NAME:WEIGHT`."""
        return baked_loras(self.manifest)

    def why_not_here(self) -> str | None:
        """Why this machine cannot run it, or None; no runtime sees the file."""
        if self.manifest.kind == "engine":
            found = obstacle(self.manifest.config)
            return None if found is None else _reason(found)
        from sdcompress_engines.runners.onnxruntime import missing

        return missing()

    def check_contents(self) -> None:
        """Read the files whole: an engine's runner does this itself, a graph's does not.

        Raises:
            ArtifactError: a file is missing, cut or altered.
        """
        for name, entry in self.manifest.files.items():
            if name.startswith(self.file.name) and sha256_file(self.folder / name) != entry.sha256:
                raise ArtifactError(
                    f"{name} is not what the manifest says: its sha256 differs",
                    where=self.folder,
                    hint="install it again: sdcompress install webui WEBUI ENGINE",
                )


@dataclass(frozen=True)
class Unreadable:
    """A folder that holds no engine this plugin can offer, and why."""

    folder: Path
    fault: str
    manifest: Manifest | None = None


def find(root: Path) -> list[Artifact | Unreadable]:
    """What lies in the folders of `root`, two levels deep, so that the folder `sdcompress export` wrote can be dropped
    in as it is; symbolic links are followed.

    Raises:
        UsageError: `root` cannot be listed.
    """
    if not root.is_dir():
        return []
    try:
        folders = [
            folder
            for top in sorted(root.iterdir())
            if top.is_dir() and not top.name.startswith(".")
            for folder in [top, *sorted(sub for sub in top.iterdir() if sub.is_dir())]
        ]
    except OSError as error:
        raise UsageError(
            f"the engine folder cannot be listed ({error.strerror or error})",
            where=root,
            hint="Settings → sdcompress → folder of the engines",
        ) from error
    found: list[Artifact | Unreadable] = []
    for folder in folders:
        if (folder / MANIFEST_NAME).is_file():
            found.append(_look(folder))
        elif stray := next((folder / name for name in _FILES.values() if (folder / name).is_file()), None):
            found.append(
                Unreadable(
                    folder, f"{stray.name} has no {MANIFEST_NAME} beside it, so nothing says what it was made for"
                )
            )
    return found


def _look(folder: Path) -> Artifact | Unreadable:
    manifest = None
    try:
        manifest = read_manifest(folder)
        if manifest is None:  # it was there a moment ago
            return Unreadable(folder, f"its {MANIFEST_NAME} is gone")
        return read_artifact(folder, manifest)
    except SdCompressError as error:
        return Unreadable(folder, _reason(error), manifest)
    # whatever a strange manifest or config leads to: one folder must not take the menu away from the others
    except Exception as error:
        return Unreadable(folder, f"cannot be read ({type(error).__name__}: {error})", manifest)


def read_artifact(folder: Path, manifest: Manifest) -> Artifact:
    """What a folder with this manifest holds; sizes are checked, the bytes of the engine are not read.

    Raises:
        ArtifactError: not an engine or graph of the `webui` signature, or one with missing or cut files. ModelError: a
            UNet config without shapes.
    """
    config = manifest.config
    if manifest.kind not in _FILES:
        raise ArtifactError(f"is a {manifest.kind}", where=folder, expected="an engine, or an ONNX graph")
    if config.get("signature") != SIGNATURE:
        raise ArtifactError(
            f"was exported with the signature {config.get('signature')!r}", where=folder, expected=SIGNATURE
        )
    if "unet" not in (config.get("components") or ()):
        raise ArtifactError("holds no UNet", where=folder)
    found = (
        engine_faults(folder, contents=False) if manifest.kind == "engine" else faults(folder, "onnx", contents=False)
    )
    if found:
        raise ArtifactError(f"is damaged: {'; '.join(found[:3])}", where=folder)
    if _FILES[manifest.kind] not in manifest.files:
        raise ArtifactError(f"the manifest names no {_FILES[manifest.kind]}", where=folder)
    unet = _json(folder, manifest, "pipeline/unet/config.json")
    name, source, precision, _ = identity(folder, manifest)
    made = signature("unet", unet, _DTYPES.get(precision, torch.float32), host=SIGNATURE)
    return Artifact(
        folder=folder,
        manifest=manifest,
        name=name,
        source=source,
        precision=precision,
        profiles=(
            tuple(_ranges(folder, profile) for profile in config["profiles"]["unet"])
            if manifest.kind == "engine"
            else (_any_shape(made.inputs, made.multiple),)
        ),
        inputs=made.inputs,
        multiple=made.multiple,
        vae_scale=int(config.get("vae_scale", 8)),
        traits=Traits(
            context_width=int(unet["cross_attention_dim"]),
            added_width=next((int(spec.shape[1]) for spec in made.inputs if spec.name == "y"), 0),
            channels=int(unet["in_channels"]),
            prediction=_json(folder, manifest, "pipeline/scheduler/scheduler_config.json", needed=False).get(
                "prediction_type"
            ),
        ),
        unet_config=unet,
        whole=is_whole(unet),
    )


def identity(folder: Path, manifest: Manifest) -> tuple[str, str, str, str]:
    """Name, source, precision and backend: folders that agree in them are one entry of the menu, the sound and the
    damaged.
    """
    config = manifest.config
    precisions = config.get("precisions")
    precision = (precisions.get("unet") if isinstance(precisions, dict) else None) or config.get("precision") or ""
    name = " + ".join([str(config.get("model_name") or folder.name), *baked_loras(manifest)])
    return (
        name,
        str(manifest.inputs.get("pipeline", "")),
        str(precision),
        str(config.get("flavour")) if manifest.kind == "engine" else "onnxruntime",
    )


def baked_loras(manifest: Manifest) -> tuple[str, ...]:
    return tuple(sorted(name.removeprefix("lora ") for name in manifest.inputs if name.startswith("lora ")))


def is_whole(unet_config: Mapping[str, Any]) -> bool:
    """Whether no block has been removed from a UNet with this config, by what every Stable Diffusion UNet has: two
    pairs a level, a middle, and attention nowhere innermost but in SDXL.
    """
    layers = unet_config.get("layers_per_block", 2)
    kinds = list(unet_config.get("down_block_types", ()))
    if (min(layers) if isinstance(layers, (list, tuple)) else layers) < 2 or unet_config.get(
        "mid_block_type", "UNetMidBlock2DCrossAttn"
    ) != "UNetMidBlock2DCrossAttn":
        return False
    if unet_config.get("addition_embed_type") == "text_time":
        return (
            list(unet_config.get("transformer_layers_per_block") or ()) == [1, 2, 10]
            and unet_config.get("reverse_transformer_layers_per_block") is None
        )
    return len(kinds) == 4 and kinds[-1] == "DownBlock2D"


class Label(str):
    """A menu entry's text.

    It equals every text that names the same engine: the reason it may end in comes and goes, and what the settings have
    kept must find it all the same,
    or the WebUI would take the checkpoint's own UNet without a word."""

    def _named(self) -> str:
        return str(self).partition(REASON)[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self._named() == str(other).partition(REASON)[0]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._named())


@dataclass(frozen=True)
class Model:
    """One entry of the menu: the engines of one model, in one precision and on one backend, that this machine can run.

    Attributes:
        title: of the entry, without a reason. usable: none where `faults` say why each cannot run.
    """

    title: str
    usable: tuple[Artifact, ...]
    faults: tuple[tuple[Path, str], ...] = ()

    @property
    def model_name(self) -> str | None:
        """The checkpoint this is an engine of, which "Automatic" may take for it: none for a student, and none with a
        LoRA baked in, as that is another model.
        """
        first = self.usable[0] if self.usable else None
        return first.name if first is not None and first.whole and not first.loras else None

    def why_not(self, checkpoint: Traits | None) -> str | None:
        """Why it cannot serve here and now, or None."""
        if not self.usable:
            return "; ".join(dict.fromkeys(fault for _, fault in self.faults))
        return None if checkpoint is None else self.usable[0].traits.why_not(checkpoint)

    def label(self, checkpoint: Traits | None = None) -> Label:
        reason = self.why_not(checkpoint)
        return Label(
            self.title
            if reason is None
            else f"{self.title}{REASON}{reason if len(reason) <= 120 else reason[:117] + '...'}"
        )


def models(found: Iterable[Artifact | Unreadable], wanted: str | None = None) -> list[Model]:
    """What was found, one entry a model, in the order of their titles.

    Args:
        wanted: the title that the settings have chosen; it is listed, as one that is gone, where nothing has it.
    """
    groups: dict[tuple[str, ...], list[tuple[Artifact | Unreadable, str | None]]] = {}
    entries: list[Model] = []
    for each in found:
        if each.manifest is None or each.manifest.kind not in _FILES:
            entries.append(
                Model(
                    PREFIX + each.folder.name, (), ((each.folder, each.fault if isinstance(each, Unreadable) else ""),)
                )
            )
        else:
            groups.setdefault(identity(each.folder, each.manifest), []).append(
                (each, each.fault if isinstance(each, Unreadable) else each.why_not_here())
            )
    titles = [(key[0], key[2], key[3]) for key in groups]
    for (name, _, precision, backend), members in groups.items():
        shown = name if titles.count((name, precision, backend)) == 1 else members[0][0].folder.name
        usable = tuple(each for each, fault in members if isinstance(each, Artifact) and fault is None)
        faulty = tuple((each.folder, fault) for each, fault in members if fault is not None)
        entries.append(Model(f"{PREFIX}{shown} ({backend} {precision})", usable, faulty))
    title = str(wanted or "").partition(REASON)[0]
    if title.startswith(PREFIX) and all(entry.title != title for entry in entries):
        entries.append(
            Model(
                title,
                (),
                ((Path(title.removeprefix(PREFIX)), "it is in the engine folder no more, or cannot be read there"),),
            )
        )
    return sorted(entries, key=lambda entry: entry.title)


def _json(folder: Path, manifest: Manifest, name: str, needed: bool = True) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        if not needed:
            return {}
        raise ArtifactError(f"has no {name}, which says what the UNet is", where=folder)
    entry = manifest.files.get(name)
    if entry is not None and sha256_file(path) != entry.sha256:
        raise ArtifactError(f"{name} is not what the manifest says: its sha256 differs", where=folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{name} is not readable ({error})", where=folder) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{name} is no mapping", where=folder)
    return content


def _ranges(folder: Path, profile: Any) -> Ranges:
    try:
        found = {
            str(name): tuple(tuple(int(size) for size in shape) for shape in shapes) for name, shapes in profile.items()
        }
        if any(len(shapes) != 3 for shapes in found.values()) or "sample" not in found:
            raise ValueError("not min, opt and max")
    except (TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"the manifest's profile is not one ({error})", where=folder) from error
    return found  # type: ignore[return-value]


def _any_shape(inputs: Iterable[TensorSpec], multiple: int) -> Ranges:
    """The profile of a graph, whose free sizes are any: tuned for one call of two pictures of 64 latents."""
    sizes = {
        "batch": (1, 2, 64),
        "tokens": (CONTEXT_TOKENS, CONTEXT_TOKENS, _ENDLESS),
        "height": (multiple, 64, _ENDLESS),
        "width": (multiple, 64, _ENDLESS),
    }

    def shape(spec: TensorSpec, at: int) -> tuple[int, ...]:
        return tuple(sizes[size][at] if isinstance(size, str) else size for size in spec.shape)

    return {spec.name: (shape(spec, 0), shape(spec, 1), shape(spec, 2)) for spec in inputs}


def pictures_px(latent: int, artifact: Artifact) -> tuple[int, int]:
    """The sizes in pixels, next below and next above, that this UNet takes instead of `latent`."""
    step = artifact.multiple
    return max(1, latent // step) * step * artifact.vae_scale, math.ceil(latent / step) * step * artifact.vae_scale


def _reason(error: SdCompressError) -> str:
    """An error without its path and command, which the table shows in columns of their own."""
    text = error.what if not error.expected else f"{error.what}; expected {error.expected}"
    return " ".join(text.split())


def mismatch(reason: str, artifact: Artifact, hint: str) -> EngineMismatch:
    return EngineMismatch(reason, where=artifact.folder, hint=hint)
