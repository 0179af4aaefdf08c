"""Names of a UNet's parameters: diffusers' ↔ LDM's, which Stable Diffusion's checkpoints and the WebUIs use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

UNET_PREFIX = "model.diffusion_model."
"""The prefix of the UNet's parameters in an LDM checkpoint."""

UNET_MODULES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""diffusers' name → LDM's, of the modules outside the blocks."""

RESNET_MODULES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""diffusers' name → LDM's, of the modules of a resnet."""

_IN_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def ldm_unet_keys(keys: Iterable[str]) -> dict[str, str | None]:
    """Returns diffusers' parameter names of a UNet → LDM's, without `UNET_PREFIX`; None where LDM has no place.

    LDM numbers the input blocks of all levels in one sequence, and the output blocks in another. The first
    convolution, each resnet–attention pair and each downsampler are one block. An upsampler is the last module in the
    last pair of its level.

    Args:
        keys: the names of all of the UNet's parameters. The numbers follow from which blocks there are.
    """
    keys = list(keys)
    blocks = _BlockNumbers(keys)
    return {key: _ldm_key(key, blocks) for key in keys}


class _BlockNumbers:
    """LDM's block numbers of a UNet.

    Attributes:
        pairs: (`down` or `up`, level) → number of resnets there.
        first: (`down` or `up`, level) → LDM's number of the level's first pair.
        attended: the (`down` or `up`, level) with attention.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.pairs: dict[tuple[str, int], int] = {}
        self.attended: set[tuple[str, int]] = set()
        downsampled: set[tuple[str, int]] = set()
        for match in filter(None, map(_IN_BLOCK.fullmatch, keys)):
            side, kind, position = match[1], match[3], int(match[4])
            if side is None:
                continue
            level = side, int(match[2])
            if kind == "resnets":
                self.pairs[level] = max(self.pairs.get(level, 0), position + 1)
            elif kind == "attentions":
                self.attended.add(level)
            elif kind == "downsamplers":
                downsampled.add(level)
        self.first: dict[tuple[str, int], int] = {}
        for side, number in (("down", 1), ("up", 0)):
            for index in range(sum(each == side for each, _ in self.pairs)):
                self.first[side, index] = number
                number += self.pairs[side, index] + ((side, index) in downsampled)


def _ldm_key(key: str, blocks: _BlockNumbers) -> str | None:
    module, _, leaf = key.rpartition(".")
    if module in UNET_MODULES:
        return f"{UNET_MODULES[module]}.{leaf}"
    match = _IN_BLOCK.fullmatch(key)
    if match is None:
        return None
    side, index, kind, position, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{blocks.first[side, index] + blocks.pairs[side, index]}.0.op.{leaf}"
    if kind == "upsamplers":
        last = blocks.first[side, index] + blocks.pairs[side, index] - 1
        return f"output_blocks.{last}.{2 if (side, index) in blocks.attended else 1}.conv.{leaf}"
    if kind == "resnets":
        name = rest.rpartition(".")[0]
        if name not in RESNET_MODULES:
            return None
        rest = f"{RESNET_MODULES[name]}.{leaf}"
    if side is None:
        return f"middle_block.{2 * position + (kind == 'attentions')}.{rest}"
    name = "input_blocks" if side == "down" else "output_blocks"
    return f"{name}.{blocks.first[side, index] + position}.{int(kind == 'attentions')}.{rest}"
