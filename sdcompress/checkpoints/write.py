"""A pipeline as one `.safetensors` file in LDM layout, as A1111, Forge and ComfyUI load it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sdcompress_engines.errors import ArtifactError, ModelError, UsageError
from sdcompress_engines.files import replace_file
from sdcompress_engines.manifest import require_space, storage_errors

from sdcompress.checkpoints.ldm_keys import (
    _QKV,
    METADATA_KEY,
    UNET,
    V_PREDICTION,
    VAE,
    ZERO_SNR,
    is_openclip,
    openclip_keys,
    qkv_third,
    text_prefixes,
    unet_keys,
    vae_keys,
)
from sdcompress.families.registry import family_of_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def ldm_state_dict(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """A pipeline's UNet, VAE and text encoders under LDM keys.

    Returns:
        LDM key → tensor, in the pipeline's own dtype and device; views of its weights where the layout allows. An empty
            `v_pred` (and `ztsnr`) is added
        where the scheduler says so.

    Raises:
        ModelError: a part of the pipeline that LDM files do not know.
    """
    parts: Any = pipeline
    prefixes = family_of_pipeline(type(pipeline).__name__).text_prefixes
    unet = parts.unet.state_dict()
    weights = {UNET + name: unet[key] for key, name in unet_keys(unet).items()}
    vae = parts.vae.state_dict()
    for key, name in vae_keys(vae).items():
        tensor = vae[key]
        weights[VAE + name] = tensor[:, :, None, None] if ".mid.attn_1." in name and tensor.ndim == 2 else tensor
    for encoder in (parts.text_encoder, getattr(parts, "text_encoder_2", None)):
        if encoder is not None:
            weights |= _text_state_dict(encoder, prefixes)
    scheduler = parts.scheduler.config
    flags = {
        V_PREDICTION: scheduler.get("prediction_type") == "v_prediction",
        ZERO_SNR: bool(scheduler.get("rescale_betas_zero_snr")),
    }
    return weights | {key: torch.empty(0) for key, flag in flags.items() if flag}


def _text_state_dict(encoder: Any, prefixes: Mapping[str, str]) -> dict[str, torch.Tensor]:
    state = {
        key.removeprefix("text_model."): tensor
        for key, tensor in encoder.state_dict().items()
        if not key.endswith("position_ids")
    }
    openclip = is_openclip(encoder.config)
    prefix, projection_prefix = text_prefixes(prefixes, openclip)
    if not openclip:
        return {
            (projection_prefix if key.startswith("text_projection") else prefix) + key: tensor
            for key, tensor in state.items()
        }
    weights: dict[str, torch.Tensor] = {}
    for key, name in openclip_keys(state).items():
        if name == "text_projection":
            weights[prefix + name] = state[key].T
        elif qkv_third(key) is None:
            weights[prefix + name] = state[key]
        elif prefix + name not in weights:
            weights[prefix + name] = torch.cat([state[_QKV.sub(rf"\1.{letter}_proj.\3", key)] for letter in "qkv"])
    return weights


def export_ldm(
    pipeline: DiffusionPipeline,
    path: Path,
    dtype: torch.dtype = torch.float16,
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> Path:
    """`write_ldm` with what a command has to look at first: the path, the room on its disk, and that no weight leaves
    the range of `dtype`.

    Args:
        metadata: further entries for the file, such as its name and what it was made from; values are text.
        force: replace a file that is there.

    Returns:
        The file's absolute path.

    Raises:
        UsageError: `path` is a folder or does not end in `.safetensors`. ArtifactError: it is there already.
            ModelError: a part that LDM files do not know, or weights that are infinite in `dtype`. StorageError: no
            space, no permission.
    """
    path = path.absolute()
    if path.suffix != ".safetensors" or path.is_dir():
        raise UsageError(
            "a folder" if path.is_dir() else f"a file ending in {path.suffix or 'nothing'!r}",
            where=path,
            expected="a file that ends in .safetensors",
        )
    if path.exists() and not force:
        raise ArtifactError("exists", where=path, hint="add --force to replace it, or choose another -o")
    weights = ldm_state_dict(pipeline)
    if lost := [
        key for key, tensor in weights.items() if tensor.numel() and not tensor.abs().max() <= torch.finfo(dtype).max
    ]:
        raise ModelError(
            f"{len(lost)} weights do not fit into {str(dtype).removeprefix('torch.')}, or are not finite",
            where=lost[0],
            hint="--precision fp32, or bf16",
        )
    require_space(
        path.parent, sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize + 2**20, "the LDM file"
    )
    return write_ldm(pipeline, path, dtype, metadata)


def write_ldm(
    pipeline: DiffusionPipeline,
    path: Path,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a pipeline as one `.safetensors` in LDM layout, by one rename: what A1111, Forge, ComfyUI and
    `load_pipeline` take.

    The pipeline's configs go into the file's metadata, and its tokenizer where it is not CLIP's, so that reading it
    back is exact for any width.

    Args:
        dtype: of the weights in the file.
        metadata: further entries beside the configs.

    Raises:
        ModelError: as `ldm_state_dict`. StorageError: no space, no permission.
    """
    from safetensors.torch import save_file

    weights = {
        key: tensor.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)
        for key, tensor in ldm_state_dict(pipeline).items()
    }
    metadata = {**(metadata or {}), "format": "pt", METADATA_KEY: json.dumps(pipeline_configs(pipeline))}
    path = path.absolute()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            save_file(weights, temporary, metadata=metadata)
            _sort_metadata(temporary)
            temporary.chmod(0o644)
            replace_file(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order, which is another in every process, so that the same model makes the
    same bytes.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= size:
            file.seek(8)
            file.write(ordered.ljust(size))


def pipeline_configs(pipeline: DiffusionPipeline) -> dict[str, str]:
    """A pipeline folder's small files, relative path → text; the tokenizer's vocabulary only where it is not CLIP's."""
    from sdcompress.families.vocabulary import shared_vocabulary
    from sdcompress.support.quiet import quiet

    index: dict[str, Any] = {"_class_name": type(pipeline).__name__}
    files: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch, quiet():
        for name, part in pipeline.components.items():
            if part is None or name in ("safety_checker", "feature_extractor", "image_encoder"):
                continue
            folder = Path(scratch) / name
            index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
            if hasattr(part, "get_vocab"):
                part.save_pretrained(folder)
                if part.get_vocab() == shared_vocabulary():
                    (folder / "tokenizer.json").unlink(missing_ok=True)
            elif hasattr(part, "save_config"):
                part.save_config(folder)
            else:
                part.config.save_pretrained(folder)
            files |= {
                f"{name}/{path.name}": _anonymous(path)
                for path in sorted(folder.iterdir())
                if path.suffix in (".json", ".txt")
            }
    return {"model_index.json": json.dumps(index)} | files


def _anonymous(path: Path) -> str:
    """A config's text without the names of folders on the machine that wrote it."""
    text = path.read_text(encoding="utf-8")
    if path.name in ("vocab.json", "merges.txt", "tokenizer.json"):
        return text
    content: Mapping[str, Any] = json.loads(text)
    return json.dumps({key: value for key, value in content.items() if key not in ("_name_or_path", "name_or_path")})
