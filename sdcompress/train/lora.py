"""LoRA training, through peft: small matrices beside a frozen UNet's attention layers (arXiv 2106.09685)."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from sdcompress_engines.errors import ModelError, UsageError
from sdcompress_engines.manifest import staged, storage_errors, write_manifest
from sdcompress_engines.progress import SILENT, Reporter
from torch import nn

from sdcompress.data.cache import LatentCache
from sdcompress.lora.files import Layers, LoraLayer, write_lora
from sdcompress.train.batches import Batches
from sdcompress.train.config import LoraConfig
from sdcompress.train.distill import frozen_copy
from sdcompress.train.loop import TrainResult, train
from sdcompress.train.objectives.denoising import Denoising
from sdcompress.train.run_folder import recipe_text, run_folder, sampler, training_scheduler, with_unet, write_once

if TYPE_CHECKING:
    from sdcompress.models.load import LoadedPipeline

LORA = "lora"
FILE, KOHYA_FILE = "lora.safetensors", "lora-kohya.safetensors"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class WithTextEncoder(nn.Module):
    """UNet and text encoder trained together: takes token ids, (B, 77) int64, where the UNet alone takes embeddings."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor, **options: Any) -> Any:
        return self.unet(sample, timesteps, self.text_encoder(ids)[0], **options)

    def enable_gradient_checkpointing(self) -> None:
        enable: Any = self.text_encoder.gradient_checkpointing_enable
        enable()


def train_lora(
    model: LoadedPipeline,
    cache: LatentCache,
    config: LoraConfig,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    report: Reporter = SILENT,
) -> TrainResult:
    """Train a LoRA for `model`; `output/lora` gets `lora.safetensors` (diffusers) and `lora-kohya.safetensors`
    (WebUIs).

    Raises:
        ArtifactError: `output` is in the way (neither `resume` nor `force`), or in use. TrainingError: divergence, or a
            resume of another run.
        UsageError: targets that name no layer. ModelError: two text encoders (SDXL) with `text_encoder`.
    """
    pipeline: Any = model.pipeline
    if config.text_encoder and getattr(pipeline, "text_encoder_2", None) is not None:
        raise ModelError(
            "the two text encoders of SDXL are not trained", where=model.name, hint="--set text_encoder=false"
        )
    with run_folder(output, resume=resume, force=force), storage_errors(output):
        write_once(output / "recipe.json", recipe_text(config))
        torch.manual_seed(config.seed)
        unet = _adapted(frozen_copy(pipeline.unet, config.precision), config, config.targets)
        trained: nn.Module = unet
        if config.text_encoder:
            trained = WithTextEncoder(
                unet, _adapted(copy.deepcopy(pipeline.text_encoder).requires_grad_(False), config, TEXT_TARGETS)
            )
        batches = Batches(
            cache,
            training_scheduler(pipeline.scheduler),
            pipeline.vae.config.scaling_factor,
            config,
            tokens=config.text_encoder,
        )
        identity = {"model": model.sha256, "data": cache.sha256, "config": config.model_dump(mode="json")}
        draw = sampler(lambda network: _dressed(pipeline, network), config, output, cache.size_px)
        result = train(
            trained, Denoising(), batches, config, output, identity, sampler=draw, label="lora", report=report
        )
        if PartialState().is_main_process:
            layers = adapter_layers("unet", unet)
            if isinstance(trained, WithTextEncoder):
                layers |= adapter_layers("text_encoder", trained.text_encoder)
            with staged(output / LORA, force=True) as out:
                about = {
                    "ss_base_model": model.name,
                    "ss_network_dim": str(config.rank),
                    "ss_network_alpha": str(config.alpha or config.rank),
                }
                write_lora(layers, out / FILE, "diffusers", about)
                write_lora(layers, out / KOHYA_FILE, "kohya", about)
                write_manifest(
                    out,
                    "lora",
                    config={"train": identity["config"], "model_name": model.name, "data": cache.about()},
                    inputs={"model": model.sha256, "data": cache.sha256},
                    figures=asdict(result),
                    seed=config.seed,
                )
    return result


def _adapted(network: Any, config: LoraConfig, targets: tuple[str, ...]) -> Any:
    """`network`, frozen, with fresh adapters in float32 on the layers whose names end in one of `targets`.

    Raises:
        UsageError: no layer is named so.
    """
    from peft import LoraConfig as Adapter

    try:
        network.add_adapter(
            Adapter(
                r=config.rank,
                lora_alpha=config.alpha or config.rank,
                target_modules=list(targets),
                init_lora_weights="gaussian",
            )
        )
    except ValueError as error:
        raise UsageError(
            f"targets {', '.join(targets)} name no layer of the {type(network).__name__}",
            expected="such as to_q, to_k, to_v, to_out.0, proj_in, ff.net.2",
        ) from error
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network


def adapter_layers(component: str, network: Any) -> Layers:
    """The adapter of a network as LoRA layers, float32 on the CPU."""
    found: Layers = {}
    for name, module in network.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            down, up = (getattr(module, side)["default"].weight.detach().float().cpu() for side in ("lora_A", "lora_B"))
            full = name if component == "unet" or name.startswith("text_model.") else f"text_model.{name}"
            found[component, full] = LoraLayer(down, up, float(module.scaling["default"] * len(down)))
    return found


def _dressed(pipeline: Any, network: nn.Module) -> Any:
    if not isinstance(network, WithTextEncoder):
        return with_unet(pipeline, network)
    dressed = with_unet(pipeline, network.unet)
    dressed.register_modules(text_encoder=network.text_encoder)
    return dressed
