"""LoRA training, through peft: small matrices beside a frozen UNet's attention layers (arXiv 2106.09685)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from sdcompress_engines.errors import ModelError, UsageError, storage_errors
from sdcompress_engines.manifest import write_manifest
from sdcompress_engines.output_folders import staged
from sdcompress_engines.progress import SILENT, Reporter
from torch import nn

from sdcompress.data.cache import LatentCache
from sdcompress.lora.adapters import Layers, LowRank
from sdcompress.lora.files import write_lora
from sdcompress.lora.model_lora import unet_entry
from sdcompress.lora.names import unet_modules
from sdcompress.prune.student import meta_unet
from sdcompress.train.config import LoraConfig
from sdcompress.train.loop import Sampler, TrainResult, train
from sdcompress.train.objectives.denoising import Denoising
from sdcompress.train.pipelines import describe_training, make_batches, make_sampler, with_unet
from sdcompress.train.precision import DTYPES, copy_frozen, resolve_precision
from sdcompress.train.run_folder import run_folder, write_recipe

if TYPE_CHECKING:
    from sdcompress.models.load import LoadedPipeline

LORA = "lora"
FILE, KOHYA_FILE = "lora.safetensors", "lora-kohya.safetensors"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class UNetWithTextEncoder(nn.Module):
    """UNet and text encoder trained together. It takes token ids where the UNet alone takes text embeddings."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor, **options: Any) -> Any:
        """Returns the UNet's output.

        Args:
            sample: noisy latents, (B, C, h, w) float32.
            timesteps: (B,) int64.
            ids: token ids, (B, 77) int64.
            options: keyword arguments of the UNet.
        """
        return self.unet(sample, timesteps, self.text_encoder(ids)[0], **options)

    def enable_gradient_checkpointing(self) -> None:
        """Enable gradient checkpointing in the text encoder, whose method has another name.

        The loop calls the UNet's.
        """
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
    """Train a LoRA for `model`; it is saved in `output/lora`, for diffusers and in kohya's naming for the WebUIs.

    Args:
        model: the pipeline to adapt; it stays unchanged.
        cache: the data, encoded with the model's VAE and text encoder.
        config: rank, targets, steps and the rest.
        output: the training folder.
        resume: continue the run in `output`.
        force: replace what is in `output`.
        report: shows the progress.

    Raises:
        ArtifactError: `output` is not empty (with neither `resume` nor `force`), or in use.
        ModelError: the model has two text encoders (SDXL) and the configuration asks for `text_encoder`.
        TrainingError: divergence, or a resume of another run.
        UsageError: a target matches no layer, the batch does not divide over the processes, or an option does not fit
            them.
    """
    pipeline: Any = model.pipeline
    check_adaptable(model, config)
    inputs = [model.folder, cache.folder]
    with run_folder(output, resume=resume, force=force, inputs=inputs, result=LORA), storage_errors(output):
        write_recipe(config, output)
        torch.manual_seed(config.seed)
        trained = make_adapted_network(pipeline, config)
        result = train(
            trained,
            Denoising(),
            make_batches(pipeline, cache, config, tokens=config.text_encoder),
            config,
            output,
            {"model": model.sha256, "data": cache.sha256, "config": config.model_dump(mode="json")},
            sampler=make_lora_sampler(pipeline, config, output, cache.size_px),
            label="lora",
            report=report,
        )
        if PartialState().is_main_process:
            entry = unet_entry(pipeline.unet.config, model.plan)
            save_lora(trained, output / LORA, config, describe_training(model, cache, config, result), entry)
    return result


def check_adaptable(model: LoadedPipeline, config: LoraConfig) -> None:
    """Refuse what cannot be adapted, before any work.

    Raises:
        ModelError: the model has two text encoders (SDXL) and the configuration asks for `text_encoder`.
        UsageError: a target matches no layer.
    """
    pipeline: Any = model.pipeline
    if config.text_encoder and getattr(pipeline, "text_encoder_2", None) is not None:
        raise ModelError(
            "the two text encoders of SDXL cannot be trained", where=model.name, hint="--set text_encoder=false"
        )
    add_adapters(meta_unet(dict(pipeline.unet.config)), config, config.targets)


def make_adapted_network(pipeline: Any, config: LoraConfig) -> nn.Module:
    """Returns a frozen copy of the UNet with fresh adapters, with the text encoder beside it if so configured.

    Raises:
        UsageError: a target matches no layer.
    """
    unet: nn.Module = add_adapters(copy_frozen(pipeline.unet, config.precision), config, config.targets)
    if not config.text_encoder:
        return unet
    text_encoder = copy.deepcopy(pipeline.text_encoder).requires_grad_(False)
    return UNetWithTextEncoder(unet, add_adapters(text_encoder, config, TEXT_TARGETS))


def add_adapters(network: Any, config: LoraConfig, targets: tuple[str, ...]) -> Any:
    """Add fresh adapters in float32 to the layers of a frozen network; returns the network.

    Args:
        network: a diffusers or transformers model.
        config: rank and alpha.
        targets: the ends of the layers' names.

    Raises:
        UsageError: a target matches no layer.
    """
    from peft import LoraConfig as PeftConfig

    layers = [f".{name}" for name in unet_modules(network)]
    unmatched = [target for target in targets if not any(name.endswith(f".{target}") for name in layers)]
    fault = UsageError(
        f"targets {', '.join(unmatched or targets)} match no layer of the {type(network).__name__}",
        expected="such as to_q, to_k, to_v, to_out.0, proj_in, ff.net.2",
    )
    if unmatched:  # peft ignores a misspelled target beside a right one
        raise fault
    try:
        network.add_adapter(
            PeftConfig(
                r=config.rank,
                lora_alpha=config.alpha or config.rank,
                target_modules=list(targets),
                init_lora_weights="gaussian",
            )
        )
    except ValueError as error:
        raise fault from error
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network


def save_lora(
    trained: nn.Module,
    target: Path,
    config: LoraConfig,
    manifest: dict[str, Any],
    entries: Mapping[str, str] | None = None,
) -> None:
    """Write the trained adapters as a folder with both files and a manifest, by one rename.

    Args:
        trained: the network of `make_adapted_network`.
        target: the folder; replaced if it exists.
        config: rank and alpha, for the files' metadata.
        manifest: entries of `write_manifest`.
        entries: further entries of the files' headers.
    """
    if isinstance(trained, UNetWithTextEncoder):
        layers = read_adapters("unet", trained.unet) | read_adapters("text_encoder", trained.text_encoder)
    else:
        layers = read_adapters("unet", trained)
    metadata = {
        "ss_base_model": manifest["config"]["model_name"],
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(config.alpha or config.rank),
        **(entries or {}),
    }
    with staged(target, force=True) as out:
        write_lora(layers, out / FILE, "diffusers", metadata)
        write_lora(layers, out / KOHYA_FILE, "kohya", metadata)
        write_manifest(out, "lora", **manifest)


def read_adapters(component: str, network: Any) -> Layers:
    """Returns the adapters of a network as LoRA layers, float32 on the CPU.

    Args:
        component: unet or text_encoder.
        network: the network with the adapters.
    """
    layers: Layers = {}
    for name, module in network.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            down, up = (getattr(module, side)["default"].weight.detach().float().cpu() for side in ("lora_A", "lora_B"))
            full = name if component == "unet" or name.startswith("text_model.") else f"text_model.{name}"
            layers[component, full] = LowRank(down, up, float(module.scaling["default"] * len(down)))
    return layers


def make_lora_sampler(pipeline: Any, config: LoraConfig, output: Path, size_px: int) -> Sampler | None:
    """Returns what `make_sampler` returns, for the network of `make_adapted_network`.

    accelerate wraps only the outer network's `forward` in autocast. The pipeline calls the UNet and the text encoder
    inside a `UNetWithTextEncoder` directly, so these draw in an autocast of their own.
    """
    draw = make_sampler(lambda network: with_network(pipeline, network), config, output, size_px)
    if draw is None or not config.text_encoder:
        return draw

    def draw_in_autocast(network: nn.Module, step: int) -> None:
        device_type = next(network.parameters()).device.type
        precision = resolve_precision(config.precision, device_type)
        with torch.autocast(device_type, DTYPES[precision], enabled=precision != "fp32"):
            draw(network, step)

    return draw_in_autocast


def with_network(pipeline: Any, network: nn.Module) -> Any:
    """Returns a pipeline with an adapted network: the UNet, or the UNet and the text encoder."""
    if not isinstance(network, UNetWithTextEncoder):
        return with_unet(pipeline, network)
    adapted = with_unet(pipeline, network.unet)
    adapted.register_modules(text_encoder=network.text_encoder)
    return adapted
