"""A UNet's weights beside its engine, under LDM's names, in which the WebUIs' LoRAs and `torch_unet` know the layers."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from sdcompress_engines.errors import ArtifactError

PREFIX = "model.diffusion_model."
PLACES = (
    "pipeline/unet/diffusion_pytorch_model.safetensors",
    "pipeline/unet/diffusion_pytorch_model.fp16.safetensors",
    "student.safetensors",
)
"""Where weights may lie in an engine's folder: as diffusers writes a UNet, or a whole LDM file as `sdcompress export
--ldm` does.
"""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ENDS = {
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
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def find_weights(folder: Path) -> Path | None:
    """The file with the UNet's weights, or None."""
    return next((folder / place for place in PLACES if (folder / place).is_file()), None)


def read_unet(path: Path) -> dict[str, torch.Tensor]:
    """LDM name, without its prefix → tensor, on the CPU in the file's dtype.

    Raises:
        ArtifactError: cut or damaged, or no UNet in it.
    """
    found = read_safetensors(path)
    if any(name.startswith(PREFIX) for name in found):
        return {name.removeprefix(PREFIX): value for name, value in found.items() if name.startswith(PREFIX)}
    if "input_blocks.0.0.weight" in found:
        return found
    names = ldm_names(found)
    if None in names.values() or "conv_in.weight" not in found:
        lost = next((name for name, given in names.items() if given is None), "conv_in.weight")
        raise ArtifactError(
            f"is no UNet's weights ({lost})", where=path, expected="a UNet as diffusers or LDM names it"
        )
    return {names[name] or name: value for name, value in found.items()}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Name → float tensor of a safetensors file: eight bytes that say how long the header is, a JSON header, and the
    tensors' bytes.

    Raises:
        ArtifactError: it is cut or damaged.
    """
    try:
        with path.open("rb") as file:
            content = mmap.mmap(
                file.fileno(), 0, access=mmap.ACCESS_COPY
            )  # only what is used is read; torch wants memory it could write to
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] not in _DTYPES:
                continue
            begin, end = entry["data_offsets"]
            values = (
                torch.frombuffer(
                    content,
                    dtype=_DTYPES[entry["dtype"]],
                    count=(end - begin) // _DTYPES[entry["dtype"]].itemsize,
                    offset=start + begin,
                )
                if end > begin
                else torch.empty(0)
            )
            tensors[name] = values.reshape(entry["shape"])
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"is no readable safetensors file ({type(error).__name__}: {str(error)[:120]})",
            where=path,
            hint="copy it again",
        ) from error


def ldm_names(keys: Iterable[str]) -> dict[str, str | None]:
    """diffusers' parameter names of a UNet → LDM's; None where LDM has no place for one.

    LDM numbers blocks through: the first convolution, then each resnet–attention pair and each downsampler is one; an
    upsampler comes last in its level's last pair.
    """
    keys = list(keys)
    parts = [match.groups() for key in keys if (match := _BLOCK.fullmatch(key))]
    pairs: dict[tuple[str, int], int] = {}
    for side, block, kind, position, _ in parts:
        if side and kind == "resnets":
            pairs[side, int(block)] = max(pairs.get((side, int(block)), 0), int(position) + 1)
    having = {(side, int(block), kind) for side, block, kind, _, _ in parts if side}
    first = {}
    for side, start in (("down", 1), ("up", 0)):
        for block in range(sum(at == side for at, _ in pairs)):
            first[side, block] = start
            start += pairs[side, block] + ((side, block, "downsamplers") in having)

    def place(key: str) -> str | None:
        module, _, leaf = key.rpartition(".")
        if module in _ENDS:
            return f"{_ENDS[module]}.{leaf}"
        match = _BLOCK.fullmatch(key)
        if match is None:
            return None
        side, block, kind, position, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks.{first[side, block] + pairs[side, block]}.0.op.{leaf}"
        if kind == "upsamplers":
            return f"output_blocks.{first[side, block] + pairs[side, block] - 1}.{2 if (side, block, 'attentions') in having else 1}.conv.{leaf}"
        if kind == "resnets":
            name = rest.rpartition(".")[0]
            if name not in _RESNET:
                return None
            rest = f"{_RESNET[name]}.{leaf}"
        if side is None:
            return f"middle_block.{2 * position + (kind == 'attentions')}.{rest}"
        return f"{'input' if side == 'down' else 'output'}_blocks.{first[side, block] + position}.{int(kind == 'attentions')}.{rest}"

    return {key: place(key) for key in keys}
