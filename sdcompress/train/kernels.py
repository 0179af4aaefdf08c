"""Faster kernels for a training step. The results stay the same up to rounding."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def use_plain_attention(network: Any) -> Iterator[None]:
    """Compute a network's attention by plain matrix products, inside the block.

    In bfloat16 on a CPU their backward pass is up to 5 times as fast as that of fused attention. The teacher, which has
    no backward pass, keeps fused attention: nano, batch 16, two threads of an AMD EPYC, 177 ms per step instead of 185.
    In float32 fused attention is faster for both: 422 ms against 467 ms on one thread.
    """
    from diffusers.models.attention_processor import AttnProcessor

    if not hasattr(network, "attn_processors"):
        yield
        return
    previous = dict(network.attn_processors)
    network.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        network.set_attn_processor(previous)


@contextmanager
def tune_convolutions() -> Iterator[None]:
    """Let cuDNN measure the convolutions of each shape once and use the fastest, inside the block.

    It pays off because a run has few shapes and many steps.
    """
    previous = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = previous


@contextmanager
def compile_blocks(network: nn.Module | None, hooked: Collection[str] = (), **options: Any) -> Iterator[int]:
    """Compile the resnets and transformers of a network inside the block; yield their number.

    They do nearly all of the work, and compile in a fraction of the time that the whole network takes in one piece.

    Args:
        network: a UNet, a VAE, or a module with some inside; None compiles nothing.
        hooked: names of modules with forward hooks. torch shares compiled code between modules of one class and ignores
            their hooks. So a block with such a module inside is not compiled as a whole, only its parts without hooks.
        options: keyword arguments of `torch.compile`.
    """
    blocks = [] if network is None else list(_find_blocks_without_hooks("", network, hooked))
    # All blocks of a class share one code object, and each width of each level is a compilation of its own. By default
    # torch gives up after eight.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: max(getattr(torch._dynamo.config, limit), 8 * len(blocks))}):
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=False, **options)
        try:
            yield len(blocks)
        finally:
            for block in blocks:
                del block.forward


def _find_blocks_without_hooks(name: str, module: nn.Module, hooked: Collection[str]) -> Iterator[nn.Module]:
    """Yield the outermost resnets and transformers that contain no hooked module."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    block_types = (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock, AutoencoderTinyBlock)
    if isinstance(module, block_types) and not any(each.startswith(f"{name}.") for each in hooked):
        yield module
        return
    for child_name, child in module.named_children():
        yield from _find_blocks_without_hooks(f"{name}.{child_name}" if name else child_name, child, hooked)
