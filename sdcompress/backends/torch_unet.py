"""The UNet compiled by PyTorch: at its first call (`compile`) or ahead of time (`aot`)."""

from __future__ import annotations

import torch
from sdcompress_engines.export_folder import check_export
from sdcompress_engines.runners import Runner, TorchRunner

from sdcompress.backends.backend import UNetRequest
from sdcompress.export.aot import PACKAGE, cached_package, open_package
from sdcompress.export.components import signature_of


class PositionalUNet(torch.nn.Module):
    """A UNet that takes its inputs in the order of its signature and returns a tuple.

    Every caller passes the same arguments in the same mode, so `torch.compile` compiles it once.

    Args:
        unet: in diffusers; its weights are shared.
    """

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Returns the prediction, shaped as `sample`.

        Args:
            sample: noisy latents, (B, 4, H/8, W/8).
            timestep: (B,), float32.
            encoder_hidden_states: (B, 77·k, C).
            text_embeds, time_ids: of SDXL, (B, E) and (B, 6).
        """
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        outputs: tuple[torch.Tensor, ...] = self.unet(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )
        return outputs


def open_compiled(request: UNetRequest) -> Runner:
    """Returns a runner that compiles the UNet at its first call; on CUDA it replays CUDA graphs."""
    unet = request.loaded.pipeline.unet
    signature = signature_of("unet", unet, request.precision)
    cuda_graph = request.device.startswith("cuda")
    module = PositionalUNet(unet)
    return TorchRunner(module, signature.inputs, signature.outputs, "compile", cuda_graph=cuda_graph, named=unet)


def open_packaged(request: UNetRequest) -> Runner:
    """Returns an open runner of the UNet's AOTInductor package, from the given folder or from the cache."""
    if request.artifacts is not None:
        check_export(request.artifacts, ["package"])
        return open_package(request.artifacts / PACKAGE, request.device)
    package = cached_package(
        request.loaded, request.device, request.precision, loras=request.loras, report=request.report
    )
    return open_package(package, request.device)
