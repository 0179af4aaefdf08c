"""Calls, samplings and engine folders for the tests of the WebUI extension."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.flavour import TENSORRT_RTX, platform_name
from sdcompress_engines.manifest import read_manifest, save_manifest, write_manifest
from sdcompress_engines.profiles import ShapeRanges, component_profile
from sdcompress_webui.engine_folders import Artifact, find_artifacts
from sdcompress_webui.host import Settings
from sdcompress_webui.menu import PREFIX, Model
from sdcompress_webui.traits import Traits
from sdcompress_webui.unet import HostedUNet

from sdcompress.checkpoints.ldm_keys import unet_keys

from .webui_host import WebUI
from .webui_sampling import Guidance, euler, reference, schedule

ROUNDING = 2e-5
"""Largest relative L2 between two computations of one picture in fp32."""
TITLE = f"{PREFIX}tiny (onnxruntime fp32)"


def words(seed: int, tokens: int = 77, width: int = 96) -> torch.Tensor:
    """Returns random text embeddings, (1, tokens, width)."""
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


def noise(height: int = 16, width: int = 16, pictures: int = 1) -> torch.Tensor:
    """Returns the latents that a sampling begins with, (pictures, 4, height, width)."""
    return torch.randn(pictures, 4, height, width, generator=torch.Generator().manual_seed(3)) * schedule(4)[0]


def sample(
    webui: WebUI, *, cond: torch.Tensor, uncond: torch.Tensor, x: torch.Tensor | None = None, steps: int = 4, **how: Any
) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
    """Returns the final latents, those of each step, and the job, sampled by a WebUI."""
    guidance = Guidance(webui.predict, **how)
    with webui.job() as job:
        x = noise() if x is None else x
        latents = euler(guidance, x, schedule(steps), cond.expand(len(x), -1, -1), uncond.expand(len(x), -1, -1))
    return latents, guidance.steps, job


def expected(
    unet: Any, *, cond: torch.Tensor, uncond: torch.Tensor, x: torch.Tensor | None = None, steps: int = 4, **how: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the final latents, and those of each step, sampled by diffusers."""
    guidance = Guidance(reference(unet), **how)
    x = noise() if x is None else x
    return (
        euler(guidance, x, schedule(steps), cond.expand(len(x), -1, -1), uncond.expand(len(x), -1, -1)),
        guidance.steps,
    )


def add_weights(folder: Path, unet: Any) -> None:
    """Put a UNet's weights beside its engine."""
    from safetensors.torch import save_file

    save_file(
        {key: value.contiguous() for key, value in unet.state_dict().items()},
        folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors",
    )


class PlainHost:
    """A host without a page; tests set its checkpoint and changes."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.asked: list[Any] = []
        self.loaded: tuple[Any, Traits] = (None, Traits())

    def checkpoint(self) -> tuple[Any, Traits]:
        return self.loaded

    def changes(self) -> list[Any]:
        return self.asked

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def ranges(
    batch: tuple[int, int, int], px: tuple[int, int, int], tokens: tuple[int, int, int] = (77, 77, 77)
) -> dict[str, Any]:
    """Returns a profile of an SD1 UNet, each argument (min, opt, max)."""
    config = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 96, "block_out_channels": [1, 1, 1]}
    return dict(component_profile("unet", config, ShapeRanges(batch, px, px, tokens), 8, "webui").shapes)


def shapes(batch: int, px: int, tokens: int = 77) -> dict[str, tuple[int, ...]]:
    """Returns the input shapes of a call."""
    return {"sample": (batch, 4, px // 8, px // 8), "timesteps": (batch,), "encoder_hidden_states": (batch, tokens, 96)}


STATIC_512, WIDE, STATIC_1024 = (
    ranges((2, 2, 2), (512, 512, 512)),
    ranges((1, 2, 4), (256, 512, 768), (77, 77, 154)),
    ranges((1, 1, 1), (1024, 1024, 1024)),
)


def read_only_artifact(folder: Path, **changed: Any) -> Artifact:
    """Returns the one engine in a folder, with changed attributes."""
    artifact = next(each for each in find_artifacts(folder) if isinstance(each, Artifact))
    return replace(artifact, **changed)


def host_unet(artifact: Artifact, fallback: str = "error", host: Any = None) -> HostedUNet:
    """Returns a UNet with one engine, in a `PlainHost` by default."""
    return HostedUNet(Model("tiny", (artifact,)), host or PlainHost(), lambda: Settings(fallback))


def call_unet(unet: HostedUNet, *, px: int = 128, tokens: int = 77, batch: int = 2, **more: Any) -> torch.Tensor:
    """Returns the prediction for random inputs."""
    draw = torch.Generator().manual_seed(1)
    return unet.forward(
        torch.randn(batch, 4, px // 8, px // 8, generator=draw),
        torch.full((batch,), 250.0),
        torch.randn(batch, tokens, 96, generator=draw),
        **more,
    )


def break_graph(folder: Path) -> None:
    """Change one byte of an ONNX graph."""
    content = bytearray((folder / "unet.onnx").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / "unet.onnx").write_bytes(content)


NO_RUNTIME = "not usable" if TENSORRT_RTX.missing() else None
NO_GPU = None if torch.cuda.is_available() else "NVIDIA GPU and there is none"
"""Why no engine runs on this machine, or None."""


def make_engine(folder: Path, graph: Path, **differing: Any) -> Path:
    """Create a folder as `sdcompress export --trt` writes it. Its engine file holds no engine."""
    shutil.copytree(graph / "pipeline", folder / "pipeline")
    (folder / "unet.engine").write_bytes(b"engine" * 100)
    made = read_manifest(graph)
    assert made is not None
    version = "1.0" if NO_RUNTIME else TENSORRT_RTX.version
    key = EngineKey(
        "a" * 64,
        "unet",
        "fp32",
        "webui",
        "tensorrt-rtx",
        version,
        ((8, 9),),
        platform_name(),
        (ranges((1, 2, 4), (128, 128, 256), (77, 77, 154)),),
    )
    key = replace(key, **differing)
    write_manifest(folder, "engine", config={**key.config(), "model_name": "tiny", "vae_scale": 8}, inputs=made.inputs)
    return folder


LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"


def lora_of(unet: Any, layers: list[str], strength: float = 1.0, name: str = "style", seed: int = 9) -> SimpleNamespace:
    """Returns a network as A1111's LoRA extension holds it, by the LDM names of the checkpoint's layers.

    Its strength is that of the network when `calc_updown` is called.
    """
    names = unet_keys(unet.state_dict())
    network = SimpleNamespace(
        name=name,
        modules={},
        unet_multiplier=strength,
        te_multiplier=1.0,
        dyn_dim=None,
        mtime=0.0,
        network_on_disk=SimpleNamespace(filename=f"/loras/{name}.safetensors"),
    )
    for layer, delta in zip(layers, lora_deltas(unet, layers, seed), strict=True):
        key = f"diffusion_model_{names[f'{layer}.weight'].removesuffix('.weight').replace('.', '_')}"

        def calc_updown(weight: torch.Tensor, delta: torch.Tensor = delta) -> tuple[torch.Tensor, None]:
            return network.unet_multiplier * delta.to(weight), None

        module = unet.get_submodule(layer)
        network.modules[key] = SimpleNamespace(calc_updown=calc_updown, sd_module=module)
    return network


def lora_deltas(unet: Any, layers: list[str], seed: int = 9) -> list[torch.Tensor]:
    """Returns the changes of a LoRA of `lora_of`, one a layer."""
    draw = torch.Generator().manual_seed(seed)
    return [0.3 * torch.randn(unet.get_submodule(layer).weight.shape, generator=draw) for layer in layers]


def change_manifest(folder: Path, **config: Any) -> None:
    """Change entries of a manifest's config, and seal it again."""
    manifest = read_manifest(folder)
    assert manifest is not None
    manifest.config.update(config)
    save_manifest(folder, manifest)
