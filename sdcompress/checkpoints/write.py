"""A pipeline → one `.safetensors` file in LDM layout, which A1111, Forge and ComfyUI load."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ModelError, UsageError
from sdcompress_engines.few_steps import GUIDANCE, STEPS
from sdcompress_engines.output_folders import check_file, require_space, staged_file

from sdcompress.checkpoints.ldm_keys import (
    METADATA_KEY,
    UNET,
    USAGE_HINT,
    V_PREDICTION,
    VAE,
    ZERO_SNR,
    is_openclip,
    openclip_keys,
    qkv_index,
    qkv_keys,
    text_prefixes,
    unet_keys,
    vae_keys,
)
from sdcompress.families.registry import family_of_pipeline
from sdcompress.families.sampling_defaults import few_step_sampling
from sdcompress.families.schemas.index import NOT_LOADED, SWITCHES
from sdcompress.support.pipeline import TextToImagePipeline, check_host_noise


def ldm_state_dict(pipeline: TextToImagePipeline) -> dict[str, torch.Tensor]:
    """Returns the weights of a pipeline's UNet, VAE and text encoders by LDM key.

    Tensors keep the dtype and device of the pipeline; they are views of its weights where the layout allows. An empty
    `v_pred` or `ztsnr` is added where the scheduler is set to v-prediction or to zero terminal SNR.

    Raises:
        ModelError: the LDM layout has no place for a parameter, or for the model's noise schedule.
    """
    check_host_noise(pipeline, "a checkpoint of one file")
    family = family_of_pipeline(type(pipeline).__name__, pipeline.unet.config)
    unet = pipeline.unet.state_dict()
    weights = {UNET + name: unet[key] for key, name in unet_keys(unet).items()}
    vae = pipeline.vae.state_dict()
    for key, name in vae_keys(vae).items():
        tensor = vae[key]
        weights[VAE + name] = tensor[:, :, None, None] if ".mid.attn_1." in name and tensor.ndim == 2 else tensor
    for name in family.text_encoders:
        encoder = getattr(pipeline, name, None)
        if encoder is not None:
            weights |= _text_state_dict(encoder, family.text_prefixes)
    scheduler = pipeline.scheduler.config
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
        elif qkv_index(key) is None:
            weights[prefix + name] = state[key]
        elif prefix + name not in weights:
            weights[prefix + name] = torch.cat([state[part] for part in qkv_keys(key)])
    return weights


def export_ldm(
    pipeline: TextToImagePipeline,
    path: Path,
    dtype: torch.dtype = torch.float16,
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> Path:
    """Check the path, the free disk space and the range of the weights, then `write_ldm`; returns the absolute path.

    Args:
        pipeline: in torch, on any device.
        path: of the new file, ending in `.safetensors`.
        dtype: of the weights in the file.
        metadata: further entries for the file, such as its title and its source; values are text.
        force: replace an existing file.

    Raises:
        UsageError: `path` is a folder or does not end in `.safetensors`.
        ArtifactError: the file exists already.
        ModelError: the LDM layout has no place for a parameter, or a weight is not finite in `dtype`.
        StorageError: there is no space or no permission.
    """
    path = path.absolute()
    if path.suffix != ".safetensors" or path.is_dir():
        raise UsageError(
            "is a folder" if path.is_dir() else f"ends in {path.suffix}" if path.suffix else "has no suffix",
            where=path,
            expected="a file that ends in .safetensors",
        )
    check_file(path, replace=force)
    weights = ldm_state_dict(pipeline)
    limit = torch.finfo(dtype).max
    # "not <=" also finds NaN.
    too_large = [key for key, tensor in weights.items() if tensor.numel() and not tensor.abs().max() <= limit]
    if too_large:
        raise ModelError(
            f"{len(too_large)} weights do not fit into {str(dtype).removeprefix('torch.')}, or are not finite",
            where=too_large[0],
            hint="--precision fp32, or bf16",
        )
    require_space(
        path.parent, sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize + 2**20, "the LDM file"
    )
    return write_ldm(pipeline, path, dtype, metadata)


def write_ldm(
    pipeline: TextToImagePipeline,
    path: Path,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a pipeline as one `.safetensors` file in LDM layout; returns the absolute path.

    A1111, Forge, ComfyUI and `load_pipeline` read it. Its metadata holds the pipeline's configs, and its tokenizer
    where that is not CLIP's, so that reading it back is exact for any width. Of a few-step model it says what to choose
    in each host. The file appears by one rename.

    Args:
        pipeline: in torch, on any device.
        path: of the new file.
        dtype: of the weights in the file.
        metadata: further entries beside the configs; values are text.

    Raises:
        ModelError: the LDM layout has no place for a parameter.
        StorageError: there is no space or no permission.
    """
    from safetensors.torch import save_file

    weights = {
        key: tensor.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)
        for key, tensor in ldm_state_dict(pipeline).items()
    }
    metadata = {**(metadata or {}), "format": "pt", METADATA_KEY: json.dumps(_collect_configs(pipeline))}
    if (sampling := few_step_sampling(pipeline)) is not None:
        metadata[USAGE_HINT] = sampling.describe_in()
    path = path.absolute()
    with staged_file(path) as partial:
        save_file(weights, partial, metadata=metadata)
        _sort_metadata(partial)
    return path


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place.

    safetensors writes it in an order that differs from process to process; sorted, the same model gives the same bytes.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= size:
            file.seek(8)
            file.write(ordered.ljust(size))


def _collect_configs(pipeline: TextToImagePipeline) -> dict[str, str]:
    """Returns the configs of a pipeline folder, relative path → text; a vocabulary only where it is not CLIP's."""
    from sdcompress.families.vocabulary import shared_vocabulary
    from sdcompress.support.quiet import quiet

    switches = {name: pipeline.config[name] for name in (*SWITCHES, STEPS, GUIDANCE) if name in pipeline.config}
    index: dict[str, Any] = {"_class_name": type(pipeline).__name__} | switches
    files: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch, quiet():
        for name, component in pipeline.components.items():
            if component is None or name in NOT_LOADED:
                continue
            folder = Path(scratch) / name
            index[name] = [type(component).__module__.partition(".")[0], type(component).__name__]
            if hasattr(component, "get_vocab"):
                component.save_pretrained(folder)
                if component.get_vocab() == shared_vocabulary():
                    (folder / "tokenizer.json").unlink(missing_ok=True)
            elif hasattr(component, "save_config"):
                component.save_config(folder)
            else:
                component.config.save_pretrained(folder)
            files |= {
                f"{name}/{path.name}": _read_without_local_paths(path)
                for path in sorted(folder.iterdir())
                if path.suffix in (".json", ".txt")
            }
    return {"model_index.json": json.dumps(index)} | files


def _read_without_local_paths(path: Path) -> str:
    """Returns a config's text without the names of folders on this machine."""
    text = path.read_text(encoding="utf-8")
    if path.name in ("vocab.json", "merges.txt", "tokenizer.json"):
        return text
    content: Mapping[str, Any] = json.loads(text)
    return json.dumps({key: value for key, value in content.items() if key not in ("_name_or_path", "name_or_path")})
