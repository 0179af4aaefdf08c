"""A small decoder in TAESD's layout: the picture that ComfyUI and the WebUIs draw with it is diffusers'."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdcompress.checkpoints.taesd import write_taesd
from sdcompress.train.config import DecoderConfig
from sdcompress.train.decoder import build_decoder


class TaesdBlock(nn.Module):
    """A residual block, as ComfyUI and the WebUIs build it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.relu(self.conv(x) + x)
        return out


class TaesdClamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(x / 3)


def taesd_stack(side: str, width: int = 64) -> nn.Sequential:
    """The layers that ComfyUI (comfy/taesd/taesd.py) and the WebUIs (modules/sd_vae_taesd.py) build, by number."""

    def convolution(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, 3, padding=1, **options)

    layers: list[nn.Module] = []
    if side == "decoder":
        layers += [TaesdClamp(), convolution(4, width), nn.ReLU()]
        for _ in range(3):
            layers += [TaesdBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), convolution(width, width, bias=False)]
        return nn.Sequential(*layers, TaesdBlock(width), convolution(width, 3))
    layers += [convolution(3, width), TaesdBlock(width)]
    for _ in range(3):
        layers += [convolution(width, width, stride=2, bias=False), *(TaesdBlock(width) for _ in range(3))]
    return nn.Sequential(*layers, convolution(width, 4))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_comfyui_and_the_webuis_draw_the_same_picture(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_decoder(DecoderConfig(), 4).eval()
    assert write_taesd(network, tmp_path, is_xl=False) == [
        f"taesd_{side}{end}" for side in ("decoder", "encoder") for end in (".safetensors", ".pth")
    ]
    stacks = {side: taesd_stack(side) for side in ("decoder", "encoder")}
    for side, stack in stacks.items():
        file = tmp_path / f"taesd_{side}{suffix}"
        stack.load_state_dict(load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True))
    latents, pixels = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(stacks["decoder"](latents) * 2 - 1, network.decode(latents).sample, atol=1e-6)
        assert torch.allclose(stacks["encoder"](pixels), network.encode(pixels * 2 - 1).latents, atol=1e-6)


def test_the_check_of_pickles_in_the_webui_lets_the_file_pass(tmp_path: Path) -> None:
    write_taesd(build_decoder(DecoderConfig(), 4), tmp_path, is_xl=True)
    file = tmp_path / "taesdxl_decoder.pth"
    # modules/safe.py: members of a zip archive have listed names, which torch's new format does not keep to; an older
    # file is five pickles, of these globals.
    assert not zipfile.is_zipfile(file)
    allowed = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}
    with file.open("rb") as stream:
        for _ in range(5):
            named = {argument for code, argument, _ in pickletools.genops(stream) if code.name == "GLOBAL"}
            assert named <= allowed
