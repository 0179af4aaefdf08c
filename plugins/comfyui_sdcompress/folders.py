"""The engine folders of `models/sdcompress`: which there are, what each is an engine of, and why one does not load
here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .library import engine_files, errors, flavour, manifest, signature

BUILD = "sdcompress export MODEL --trt --signature comfyui -o DIR"
FAMILIES = {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL"}
_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float16,
    "int8": torch.float16,
}
# diffusers' name of a noise schedule → ComfyUI's, which is the LDM code base's.
_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "squaredcos_cap_v2"}


@dataclass(frozen=True)
class EngineFolder:
    """A UNet graph and what a host has to know of it.

    Attributes:
        name: of the folder, as the node lists it.
        graph: `unet.engine` or `unet.onnx`.
        family: `sd1`, `sd2` or `sdxl`.
        host: whose names the graph's inputs have, a key of `signature.HOSTS`.
        unet: diffusers' config of the UNet.
        prediction: `epsilon` or `v_prediction`.
        schedule: the noise schedule as ComfyUI's `sampling_settings` say it.
        scaling_factor: of the latents; None where the pipeline does not say it.
        dtype: of the graph's floats.
    """

    name: str
    graph: Path
    manifest: Any
    family: str
    host: str
    unet: Mapping[str, Any]
    prediction: str
    schedule: Mapping[str, Any]
    scaling_factor: float | None
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of the graph, its weights included."""
        return sum(entry.bytes for name, entry in self.manifest.files.items() if name.startswith(self.graph.name))

    @property
    def context_width(self) -> int:
        """Of the text embeddings it takes."""
        return int(self.unet["cross_attention_dim"])

    @property
    def profiles(self) -> list[Mapping[str, Any]]:
        """Input → [min, opt, max] shapes, one mapping a profile; none where every shape runs."""
        return list(self.manifest.config.get("profiles", {}).get("unet", []))


def engine_folders(roots: Iterable[str | Path]) -> dict[str, Path]:
    """Name → folder of every engine and ONNX folder in `roots`, by name; the first root wins.

    What `export --trt` has written counts as one.
    """
    found: dict[str, Path] = {}
    for root in map(Path, roots):
        for folder in sorted(root.iterdir()) if root.is_dir() else []:
            held = next(
                (
                    place
                    for place in (folder, folder / "engine", folder / "onnx")
                    if (place / manifest.MANIFEST_NAME).is_file()
                ),
                None,
            )
            if held is not None and not folder.name.startswith("."):
                found.setdefault(folder.name, held)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def read_folder(name: str, folder: Path) -> EngineFolder:
    """What an engine folder holds; the graph's bytes are not read.

    Raises:
        ArtifactError: no manifest, a broken or edited one, or files of other sizes than it says. EngineMismatch: it is
            no UNet of a family or with a signature that ComfyUI's nodes can run.
    """
    made = manifest.read_manifest(folder)
    if made is None or made.kind not in ("engine", "onnx"):
        raise errors.ArtifactError(
            "is no folder of an engine" if made is None else f"is a {made.kind}, not an engine",
            where=folder,
            expected="what `sdcompress export` has written",
            hint=BUILD,
        )
    if faults := (
        engine_files.engine_faults(folder, contents=False)
        if made.kind == "engine"
        else manifest.faults(folder, contents=False)
    ):
        raise errors.ArtifactError(
            f"is damaged: {'; '.join(faults[:3])}",
            where=folder,
            hint="install it again: sdcompress install comfyui COMFYUI ENGINE",
        )
    graph = folder / ("unet.engine" if made.kind == "engine" else "unet.onnx")
    if graph.name not in made.files:
        raise errors.EngineMismatch(f"holds no {graph.name}", where=folder, expected="the engine of a UNet", hint=BUILD)
    unet = _config(folder, "unet/config.json")
    family, host = _family(unet, folder), str(made.config.get("signature"))
    if host not in signature.HOSTS or (host == "diffusers" and family == "sdxl"):
        raise errors.EngineMismatch(
            f"has the signature {host!r}, which ComfyUI does not call", where=folder, expected="comfyui", hint=BUILD
        )
    scheduler = _config(folder, "scheduler/scheduler_config.json")
    prediction, schedule = _sampling(scheduler, folder)
    scaling = _config(folder, "vae/config.json", needed=False).get("scaling_factor")
    precision = made.config.get("precisions", {}).get("unet", made.config.get("precision"))
    if precision not in _DTYPES:
        raise errors.ArtifactError(
            f"has the precision {precision!r}", where=folder, expected=", ".join(_DTYPES), hint=BUILD
        )
    return EngineFolder(
        name,
        graph,
        made,
        family,
        host,
        unet,
        prediction,
        schedule,
        None if scaling is None else float(scaling),
        _DTYPES[precision],
    )


def check_contents(folder: EngineFolder) -> None:
    """Hold the graph's bytes against the manifest, where the runner does not do it itself, so that no runtime sees a
    graph that was altered.

    Raises:
        ArtifactError: they are not what it says.
    """
    if folder.graph.suffix != ".onnx":
        return  # `engine_files.read_engine` reads an engine once, and checks what it has read
    for name, entry in folder.manifest.files.items():
        if name.startswith(folder.graph.name) and manifest.sha256_file(folder.graph.parent / name) != entry.sha256:
            raise errors.ArtifactError(
                "was altered: its sha256 is not the one of its manifest",
                where=folder.graph.parent / name,
                expected=f"{entry.sha256[:12]}...",
                hint="install it again: sdcompress install comfyui COMFYUI ENGINE",
            )


def refusal(folder: EngineFolder) -> str | None:
    """Why the engine does not load on this machine, or None."""
    if folder.graph.suffix == ".onnx":
        from .library import runners

        return runners.available()["onnxruntime"]
    found = flavour.obstacle(folder.manifest.config, folder.graph)
    return None if found is None else str(found)


def ldm_layout(unet: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's blocks as ComfyUI's `unet_config` describes them, which is how it finds the layers that a LoRA is for.

    `transformer_depth` runs over the input blocks, `transformer_depth_output` over the output blocks from the last to
    the first; `transformer_depth_middle` is -1 without attention there and -2 without a middle block.
    """
    channels = list(unet["block_out_channels"])
    levels = len(channels)
    pairs = _per_level(unet.get("layers_per_block", 2), levels)
    depths = _per_level(unet.get("transformer_layers_per_block") or 1, levels)
    reverse = unet.get("reverse_transformer_layers_per_block") or [_spread(depth, 1)[0] for depth in reversed(depths)]
    down = [
        depth * ("CrossAttn" in kind)
        for kind, depth, count in zip(unet["down_block_types"], depths, pairs, strict=True)
        for depth in _spread(depth, count)
    ]
    up = [
        depth * ("CrossAttn" in kind)
        for kind, depth, count in zip(unet["up_block_types"], reverse, reversed(pairs), strict=True)
        for depth in _spread(depth, count + 1)
    ]
    middle = unet.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    return {
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": pairs,
        "transformer_depth": down,
        "transformer_depth_output": up[::-1],
        "transformer_depth_middle": (
            -2 if middle is None else _spread(depths[-1], 1)[0] if "CrossAttn" in middle else -1
        ),
        "context_dim": unet["cross_attention_dim"],
        "use_linear_in_transformer": bool(unet.get("use_linear_projection")),
        "adm_in_channels": unet.get("projection_class_embeddings_input_dim"),
        "use_temporal_attention": False,
    }


def _per_level(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * levels


def _spread(entry: Any, count: int) -> list[int]:
    return list(entry) if isinstance(entry, (list, tuple)) else [entry] * count


def _family(unet: Mapping[str, Any], where: Path) -> str:
    """SD1.x projects into its attentions by 1×1 convolutions, SD2.x by linear layers; SDXL takes the picture's size
    beside the text.
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


def _sampling(scheduler: Mapping[str, Any], where: Path) -> tuple[str, dict[str, Any]]:
    prediction, kind = scheduler.get("prediction_type", "epsilon"), scheduler.get("beta_schedule")
    if prediction not in ("epsilon", "v_prediction"):
        raise errors.EngineMismatch(f"predicts {prediction!r}", where=where, expected="epsilon or v_prediction")
    if kind not in _SCHEDULES or scheduler.get("trained_betas") is not None:
        raise errors.EngineMismatch(
            f"was trained with the noise schedule {kind!r}, which ComfyUI has not",
            where=where,
            expected=", ".join(_SCHEDULES),
        )
    settings = {"beta_schedule": _SCHEDULES[kind], "timesteps": int(scheduler.get("num_train_timesteps", 1000))}
    settings |= {
        ours: float(scheduler[theirs])
        for ours, theirs in (("linear_start", "beta_start"), ("linear_end", "beta_end"))
        if theirs in scheduler
    }
    return prediction, settings | ({"zsnr": True} if scheduler.get("rescale_betas_zero_snr") else {})


def _config(folder: Path, name: str, needed: bool = True) -> dict[str, Any]:
    path = folder / "pipeline" / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not needed:
            return {}
        raise errors.ArtifactError(
            "is missing, so nothing says what the engine is of", where=path, hint=BUILD
        ) from None
    except (OSError, ValueError) as error:
        raise errors.ArtifactError(f"cannot be read ({error})", where=path, hint=BUILD) from error
    if not isinstance(content, dict):
        raise errors.ArtifactError("is no config", where=path, hint=BUILD)
    return content
