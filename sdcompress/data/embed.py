"""Captions → the text embeddings that the UNet is conditioned on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sdcompress.support.pipeline import TextToImagePipeline
from sdcompress.support.quiet import quiet

TEXT_BATCH = 128
"""Captions embedded at once."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@contextmanager
def text_encoders_on(pipeline: TextToImagePipeline, device: torch.device) -> Iterator[None]:
    """Move a pipeline's text encoders to a device for the block, and back afterwards."""
    encoders = [encoder for name in TEXT_ENCODERS if (encoder := getattr(pipeline, name, None)) is not None]
    devices = [next(encoder.parameters()).device for encoder in encoders]
    try:
        for encoder in encoders:
            encoder.to(device)
        yield
    finally:
        for encoder, original_device in zip(encoders, devices, strict=True):
            encoder.to(original_device)


@torch.no_grad()
def embed_captions(pipeline: TextToImagePipeline, captions: list[str]) -> dict[str, torch.Tensor]:
    """Returns the embeddings of captions, computed by the pipeline's own `encode_prompt`, on the CPU.

    Returns:
        `text`, (N, 77, D) float32. With SDXL also `pooled`, (N, P) float32; with other families `ids`, the tokens,
        (N, 77) int32.
    """
    device = pipeline.text_encoder.device
    with quiet():
        encoded = pipeline.encode_prompt(
            captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    if len(encoded) > 2:
        return {"text": encoded[0].float().cpu(), "pooled": encoded[2].float().cpu()}
    tokenizer = pipeline.tokenizer
    ids = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return {"text": encoded[0].float().cpu(), "ids": ids.int()}


def embed_absent_caption(pipeline: TextToImagePipeline) -> dict[str, torch.Tensor]:
    """Returns what guidance takes in place of a caption, as `embed_in_batches` does for one caption.

    It is the empty caption. SDXL's pipeline takes zeros instead where its `force_zeros_for_empty_prompt` says so.
    """
    embedded = embed_in_batches(pipeline, [""])
    if not pipeline.config.get("force_zeros_for_empty_prompt"):
        return embedded
    return {name: torch.zeros_like(tensor) for name, tensor in embedded.items()}


def embed_in_batches(pipeline: TextToImagePipeline, captions: list[str]) -> dict[str, torch.Tensor]:
    """Returns what `embed_captions` returns, for any number of captions and with floats in float16.

    For no captions it is an empty dict.
    """
    starts = range(0, len(captions), TEXT_BATCH)
    parts = [embed_captions(pipeline, captions[start : start + TEXT_BATCH]) for start in starts]
    joined = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in joined.items()}
