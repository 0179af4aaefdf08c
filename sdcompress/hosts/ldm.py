"""The LDM key layout, in which WebUIs and checkpoint sites keep a whole Stable Diffusion model in one file.

Each map goes from diffusers' key to LDM's and is derived from the structure the keys themselves show, so it holds for
any levels and pairs, with or without a middle block. Writing applies it, reading (`sdcompress.single_file`) looks a
tensor up through it.

LDM numbers a UNet's blocks through (`input_blocks.0` is the first convolution, then each resnet–attention pair and each
downsampler is one); within one the resnet is `.0` and the attention `.1`; an upsampler comes last in the last pair of
its level.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sdcompress_engines.errors import ArtifactError, ModelError, UsageError
from sdcompress_engines.manifest import require_space, storage_errors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

UNET, VAE = "model.diffusion_model.", "first_stage_model."
METADATA_KEY = "sdcompress.configs"
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors by which ComfyUI and A1111 tell such models

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPENCLIP_ENDS = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_QKV = re.compile(r"(encoder\.layers\.\d+\.self_attn)\.([qkv])_proj\.(weight|bias)")


def unet_keys(keys: Iterable[str]) -> dict[str, str]:
    """diffusers' parameter names of a UNet → LDM's, without the `model.diffusion_model.` prefix.

    Args:
        keys: all of the UNet's parameters.

    Raises:
        ModelError: a parameter that the LDM layout has no place for.
    """
    keys = list(keys)
    resnets, samplers, attended = _blocks(keys)
    first: dict[tuple[str, int], int] = {}
    for side, start, extra in (("down", 1, 1), ("up", 0, 0)):
        for block in range(len([b for s, b in resnets if s == side])):
            first[side, block] = start
            start += resnets[side, block] + extra * ((side, block) in samplers)

    def place(key: str) -> str | None:
        module, _, leaf = key.rpartition(".")
        if module in _UNET_ENDS:
            return f"{_UNET_ENDS[module]}.{leaf}"
        match = re.fullmatch(
            r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key
        )
        if match is None:
            return None
        side, number, kind, position, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks.{first[side, number] + resnets[side, number]}.0.op.{leaf}"
        if kind == "upsamplers":
            return f"output_blocks.{first[side, number] + resnets[side, number] - 1}.{2 if (side, number) in attended else 1}.conv.{leaf}"
        if kind == "resnets":
            name = rest.rpartition(".")[0]
            if name not in _RESNET:
                return None
            rest = f"{_RESNET[name]}.{leaf}"
        if side is None:
            return f"middle_block.{2 * position + (kind == 'attentions')}.{rest}"
        return f"{'input' if side == 'down' else 'output'}_blocks.{first[side, number] + position}.{int(kind == 'attentions')}.{rest}"

    return _placed(keys, place, "UNet")


def _blocks(keys: list[str]) -> tuple[dict[tuple[str, int], int], set[tuple[str, int]], set[tuple[str, int]]]:
    """(side, block) → number of resnets, and which blocks have a sampler, and which attentions."""
    resnets: dict[tuple[str, int], int] = {}
    samplers, attended = set(), set()
    for key in keys:
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", key):
            block = match[1], int(match[2])
            if match[3] == "resnets":
                resnets[block] = max(resnets.get(block, 0), int(match[4]) + 1)
            elif match[3] == "attentions":
                attended.add(block)
            else:
                samplers.add(block)
    return resnets, samplers, attended


def vae_keys(keys: Iterable[str]) -> dict[str, str]:
    """diffusers' parameter names of an AutoencoderKL → LDM's, without the `first_stage_model.` prefix.

    Attention weights are 1×1 convolutions in LDM.

    Raises:
        ModelError: a parameter that the LDM layout has no place for.
    """
    keys = list(keys)
    levels = 1 + max(
        (int(match[1]) for key in keys if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key))), default=-1
    )

    def place(key: str) -> str | None:
        if re.fullmatch(r"((en|de)coder\.conv_(in|out)|(post_)?quant_conv)\.(weight|bias)", key):
            return key
        if match := re.fullmatch(r"(encoder|decoder)\.conv_norm_out\.(\w+)", key):
            return f"{match[1]}.norm_out.{match[2]}"
        if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", key):
            return f"{match[1]}.mid.block_{int(match[2]) + 1}.{_vae_resnet(match[3])}"
        if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", key):
            return (
                f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}" if match[2] in _VAE_ATTENTION else None
            )
        match = re.fullmatch(
            r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)\.(.+)|(?:down|up)samplers\.0\.(conv\.\w+))",
            key,
        )
        if match is None:
            return None
        level = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
        base = f"{match[1]}.{match[2]}.{level}"
        return f"{base}.{match[2]}sample.{match[6]}" if match[6] else f"{base}.block.{match[4]}.{_vae_resnet(match[5])}"

    return _placed(keys, place, "VAE")


def _vae_resnet(name: str) -> str:
    return name.replace("conv_shortcut", "nin_shortcut")


def openclip_keys(keys: Iterable[str]) -> dict[str, str]:
    """transformers' parameter names of a CLIP text encoder (without `text_model.`) → OpenCLIP's.

    Query, key and value of a layer share one OpenCLIP tensor, in that order along dimension 0; `text_projection` is
    transposed there.

    Raises:
        ModelError: a parameter that the OpenCLIP layout has no place for.
    """

    def place(key: str) -> str | None:
        if key in _OPENCLIP_ENDS:
            return _OPENCLIP_ENDS[key]
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None:
            return None
        base = f"transformer.resblocks.{match[1]}."
        if _QKV.fullmatch(key):
            return f"{base}attn.in_proj_{match[3]}"
        return f"{base}{_OPENCLIP_LAYER[match[2]]}.{match[3]}" if match[2] in _OPENCLIP_LAYER else None

    return _placed(keys, place, "text encoder")


def _placed(keys: Iterable[str], place: Callable[[str], str | None], what: str) -> dict[str, str]:
    found = {key: place(key) for key in keys}
    lost = [key for key, name in found.items() if name is None]
    if lost:
        raise ModelError(
            f"the {what} has {len(lost)} parameters that the LDM layout has no place for",
            where=lost[0],
            expected="a UNet, VAE or text encoder of Stable Diffusion",
        )
    return {key: name for key, name in found.items() if name is not None}


def qkv_third(key: str) -> int | None:
    """Which third of OpenCLIP's shared tensor a parameter is: 0 query, 1 key, 2 value; None where it has a tensor of
    its own.
    """
    match = _QKV.fullmatch(key)
    return None if match is None else "qkv".index(match[2])


def is_openclip(config: Any) -> bool:
    """Whether a text encoder comes from OpenCLIP (SD2, SDXL's second) and not from OpenAI (SD1, SDXL's first): they
    differ in the activation.
    """
    return bool(config.hidden_act == "gelu")


def text_prefixes(sdxl: bool, openclip: bool) -> tuple[str, str]:
    """Prefix of a text encoder's parameters in a file: (OpenAI layout or OpenCLIP layout, as `openclip` says), and of
    its `text_projection`.
    """
    if openclip:
        base = "conditioner.embedders.1.model." if sdxl else "cond_stage_model.model."
        return base, base
    base = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
    return f"{base}text_model.", base


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
    sdxl = getattr(parts, "text_encoder_2", None) is not None
    unet = parts.unet.state_dict()
    weights = {UNET + name: unet[key] for key, name in unet_keys(unet).items()}
    vae = parts.vae.state_dict()
    for key, name in vae_keys(vae).items():
        tensor = vae[key]
        weights[VAE + name] = tensor[:, :, None, None] if ".mid.attn_1." in name and tensor.ndim == 2 else tensor
    for encoder in (parts.text_encoder, getattr(parts, "text_encoder_2", None)):
        if encoder is not None:
            weights |= _text_state_dict(encoder, sdxl)
    scheduler = parts.scheduler.config
    flags = {
        V_PREDICTION: scheduler.get("prediction_type") == "v_prediction",
        ZERO_SNR: bool(scheduler.get("rescale_betas_zero_snr")),
    }
    return weights | {key: torch.empty(0) for key, flag in flags.items() if flag}


def _text_state_dict(encoder: Any, sdxl: bool) -> dict[str, torch.Tensor]:
    state = {
        key.removeprefix("text_model."): tensor
        for key, tensor in encoder.state_dict().items()
        if not key.endswith("position_ids")
    }
    openclip = is_openclip(encoder.config)
    prefix, projection_prefix = text_prefixes(sdxl, openclip)
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
    `load_teacher` take.

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
            os.replace(temporary, path)
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
    from sdcompress.single_file import shared_vocabulary
    from sdcompress.teacher import quiet

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
