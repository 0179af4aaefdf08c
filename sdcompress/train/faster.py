"""What makes a training step faster without changing what it computes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def plain_attention(trained: Any) -> Iterator[None]:
    """Attention by plain matrix products for the block.

    In bfloat16 on a CPU their backward is up to 5 times as fast as the fused one's. The teacher, which has no backward,
    keeps the fused one: nano, batch 16, two threads of an AMD EPYC, 177 ms a step instead of 185.
    In float32 the fused one is faster for both: 422 against 467 ms on one thread.
    """
    from diffusers.models.attention_processor import AttnProcessor

    if not hasattr(trained, "attn_processors"):
        yield
        return
    before = dict(trained.attn_processors)
    trained.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        trained.set_attn_processor(before)


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Let cuDNN measure the convolutions of each shape once and use the quickest, for the block: a run has few shapes
    and many steps.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def compiled_blocks(network: nn.Module | None, hooked: Collection[str] = (), **options: Any) -> Iterator[int]:
    """Compile the resnets and transformers of a UNet for the block, and give how many there are.

    They hold nearly all of its work. Compared with the whole network in one piece, they compile in a fraction of the
    time.

    Args:
        hooked: names of modules with forward hooks. torch shares compiled code between modules of one kind without
            looking at hooks, so a block that has such a module inside is not compiled, only what is free of hooks
            within it.
        options: of `torch.compile`.
    """
    blocks = [] if network is None else list(_free_blocks("", network, hooked))
    # All blocks of a kind share one code object, and each width of each level is a compilation of its own: torch would
    # give up after eight.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: max(getattr(torch._dynamo.config, limit), 8 * len(blocks))}):
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=False, **options)
        try:
            yield len(blocks)
        finally:
            for block in blocks:
                del block.forward


def _free_blocks(name: str, module: nn.Module, hooked: Collection[str]) -> Iterator[nn.Module]:
    """The outermost resnets and transformers without a hook inside."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    kinds = (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock)
    if isinstance(module, kinds) and not any(each.startswith(f"{name}.") for each in hooked):
        yield module
        return
    for child_name, child in module.named_children():
        yield from _free_blocks(f"{name}.{child_name}" if name else child_name, child, hooked)
