"""Few-step training: from a model that draws in 25 steps with guidance to one that draws in 1 to 8 without."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from sdcompress_engines.errors import ModelError, UsageError, storage_errors
from sdcompress_engines.progress import SILENT, Reporter
from torch import nn

from sdcompress.data.cache import LatentCache
from sdcompress.data.embed import TEXT_ENCODERS
from sdcompress.families.registry import family_of
from sdcompress.families.sampling_defaults import sampling_defaults, set_defaults
from sdcompress.lora.fuse import fuse_lora
from sdcompress.lora.model_lora import unet_entry
from sdcompress.lora.sampling import describe_sampling
from sdcompress.prune.student import meta_unet
from sdcompress.support.pipeline import NOISE_OPTIONS
from sdcompress.train.config import FewStepConfig, LoraConfig
from sdcompress.train.loop import TrainResult, train
from sdcompress.train.lora import LORA, add_adapters, read_adapters, save_lora
from sdcompress.train.objectives.consistency import Consistency
from sdcompress.train.pipelines import (
    PIPELINE,
    check_trainable,
    describe_training,
    make_batches,
    make_sampler,
    make_training_scheduler,
    save_pipeline,
    with_unet,
)
from sdcompress.train.precision import copy_frozen
from sdcompress.train.run_folder import run_folder, write_recipe
from sdcompress.train.sharding import SHARDING, is_set
from sdcompress.train.trajectory import Trajectory, make_trajectory

if TYPE_CHECKING:
    from sdcompress.models.load import LoadedPipeline

_HALF_ROUNDING = 2e-3
"""Largest difference of a weight that was saved in fp16, over the largest weight of its tensor."""


def few_step(
    model: LoadedPipeline,
    teacher: LoadedPipeline,
    cache: LatentCache,
    config: FewStepConfig,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    report: Reporter = SILENT,
) -> TrainResult:
    """Train a copy of `model`'s UNet to draw in few steps along the guided trajectory of `teacher`.

    The finished pipeline is saved in `output/pipeline`, with its scheduler, its steps and no guidance as its defaults.
    With `lora_rank` the LoRA is saved in `output/lora` too; the pipeline has it fused.

    Args:
        model: the pipeline to start from; it stays unchanged.
        teacher: the pipeline whose trajectory is learned: that which `model` was distilled from, or `model` itself.
        cache: the data, encoded with the teacher's VAE and text encoder.
        config: steps, phases, guidance and the rest.
        output: the training folder.
        resume, force: continue the run in `output`, or replace what is in it.
        report: shows the progress.

    Raises:
        ArtifactError: `output` is not empty (with neither `resume` nor `force`), or in use.
        ModelError: as `check_pair`. TrainingError: divergence, or a resume of another run.
        UsageError: a LoRA's target matches no layer, or an option does not fit the processes.
    """
    _refuse_shards(config)
    trajectory = check_pair(model, teacher, config)
    pipeline: Any = model.pipeline
    inputs = [model.folder, teacher.folder, cache.folder]
    with run_folder(output, resume=resume, force=force, inputs=inputs, result=PIPELINE), storage_errors(output):
        write_recipe(config, output)
        torch.manual_seed(config.seed)
        trained = make_trained_network(pipeline, config)
        objective = make_objective(teacher.pipeline, trajectory, cache, config)
        identity = {"model": model.sha256, "teacher": teacher.sha256, "data": cache.sha256}
        result = train(
            trained,
            objective,
            make_batches(teacher.pipeline, cache, config, timesteps=trajectory.timesteps),
            config,
            output,
            identity | {"config": config.model_dump(mode="json")},
            frozen=objective.teacher,
            sampler=make_sampler(partial(make_few_step_pipeline, pipeline, config), config, output, cache.size_px),
            label="few steps",
            report=report,
        )
        if PartialState().is_main_process:
            manifest = describe_training(model, cache, config, result)
            manifest["config"] |= {"teacher_name": teacher.name, "guidance_scale": objective.guidance_scale}
            manifest["inputs"] |= {"teacher": teacher.sha256}
            entry = unet_entry(pipeline.unet.config, model.plan)
            save_few_step(pipeline, trained.cpu().eval(), config, output, manifest, entry)
    return result


def _refuse_shards(config: FewStepConfig) -> None:
    """Refuse weights in shards (FSDP) with an average, by which the whole network would have to run."""
    if config.ema_decay and is_set(SHARDING):
        raise UsageError(
            "few-step training with an average does not take weights in shards",
            where="accelerate launch",
            expected="--set ema_decay=0, or no --use_fsdp",
        )


def make_objective(teacher: Any, trajectory: Trajectory, cache: LatentCache, config: FewStepConfig) -> Consistency:
    """Returns the loss of a few-step training, with a frozen copy of the teacher's UNet.

    Args:
        teacher: its pipeline.
        trajectory: of the training.
        cache: gives the embeddings of the absent caption.
        config: guidance, loss and precision.
    """
    return Consistency(
        copy_frozen(teacher.unet, config.precision),
        trajectory,
        cache.read_absent_caption(),
        choose_guidance(teacher, config),
        config.huber_c,
        config.loss_unit,
    )


def choose_guidance(teacher: Any, config: FewStepConfig) -> float:
    """Returns the guidance scale that goes into the weights: the configuration's, else the teacher's own."""
    return config.guidance_scale or sampling_defaults(teacher).guidance_scale


def make_trained_network(pipeline: Any, config: FewStepConfig) -> nn.Module:
    """Returns the network to train: a copy of the UNet, or a frozen one with fresh adapters.

    Raises:
        UsageError: a LoRA's target matches no layer.
    """
    if config.lora_rank is None:
        unet: nn.Module = copy.deepcopy(pipeline.unet).float().requires_grad_(True)
        return unet
    adapters = _lora_config(config)
    adapted: nn.Module = add_adapters(copy_frozen(pipeline.unet, config.precision), adapters, adapters.targets)
    return adapted


def _lora_config(config: FewStepConfig) -> LoraConfig:
    return LoraConfig(rank=config.lora_rank or 1, targets=config.lora_targets)


def save_few_step(
    pipeline: Any,
    trained: nn.Module,
    config: FewStepConfig,
    output: Path,
    manifest: dict[str, Any],
    entries: Mapping[str, str],
) -> None:
    """Write the finished pipeline, and the LoRA where one was trained.

    Args:
        pipeline: the one that the training began with.
        trained: the network of `make_trained_network`, with the weights to keep, on the CPU.
        config: of the training.
        output: the training folder.
        manifest: entries of `write_manifest`.
        entries: further entries of the LoRA's header.
    """
    unet: Any = trained
    if config.lora_rank is not None:
        unet = copy.deepcopy(pipeline.unet).float()
        fuse_lora(with_unet(pipeline, unet), read_adapters("unet", trained))
    finished = make_few_step_pipeline(pipeline, config, unet)
    if config.lora_rank is not None:
        save_lora(trained, output / LORA, _lora_config(config), manifest, {**describe_sampling(finished), **entries})
    save_pipeline(finished, output / PIPELINE, "few-step", precision=config.save_precision, force=True, **manifest)


def make_few_step_pipeline(pipeline: Any, config: FewStepConfig, unet: nn.Module) -> Any:
    """Returns a pipeline around a few-step UNet, with the scheduler and the sampling defaults of its training."""
    few = with_unet(pipeline, unet)
    few.register_modules(scheduler=make_few_step_scheduler(pipeline.scheduler, config))
    set_defaults(few, config.num_inference_steps, 1.0)
    return few


def make_few_step_scheduler(scheduler: Any, config: FewStepConfig) -> Any:
    """Returns the scheduler that draws at the training's timesteps.

    It is DDIM for phases, without noise between the steps, and LCM for one phase.

    Args:
        scheduler: of the model before the training; it gives the noise schedule and the prediction type.
        config: steps and phases.
    """
    from diffusers import DDIMScheduler, LCMScheduler

    known = make_training_scheduler(scheduler).config
    options = {name: known[name] for name in NOISE_OPTIONS if name in known}
    if config.count_phases() > 1:
        return DDIMScheduler(**options, timestep_spacing="trailing", clip_sample=False, steps_offset=1)
    return LCMScheduler(**options, original_inference_steps=config.solver_steps, steps_offset=1)


def check_pair(model: LoadedPipeline, teacher: LoadedPipeline, config: FewStepConfig) -> Trajectory:
    """Returns the trajectory of the training, where model and teacher fit each other.

    Raises:
        ModelError: they differ in family, noise schedule, prediction type, VAE or text encoder, so that one would be
            trained on what the other means differently; or as `make_training_scheduler` and `make_trajectory`.
        UsageError: as `make_trajectory`, or a LoRA's target matches no layer.
    """
    student: Any = model.pipeline
    whole: Any = teacher.pipeline
    if sampling_defaults(whole).is_guidance_free:
        raise ModelError(
            "draws in few steps already, so that it has no trajectory to learn from",
            where=teacher.name,
            expected="the model before its few-step training",
            hint="--teacher TEACHER",
        )
    check_trainable(student)
    own, other = (make_training_scheduler(each.scheduler) for each in (student, whole))
    differing = [
        f"{what} {mine}, not {theirs}"
        for what, mine, theirs in (
            ("family", family_of(student.unet.config).layout, family_of(whole.unet.config).layout),
            ("prediction type", own.config.prediction_type, other.config.prediction_type),
            ("text width", student.unet.config.cross_attention_dim, whole.unet.config.cross_attention_dim),
            ("latent channels", student.vae.config.latent_channels, whole.vae.config.latent_channels),
            ("scale of the latents", student.vae.config.scaling_factor, whole.vae.config.scaling_factor),
        )
        if mine != theirs
    ]
    if not differing:
        differing += [] if torch.equal(own.alphas_cumprod, other.alphas_cumprod) else ["another noise schedule"]
        encoders = [name for name in TEXT_ENCODERS if getattr(whole, name, None) is not None]
        differing += [f"another {name}" for name in encoders if not _fit(getattr(student, name), getattr(whole, name))]
    if differing:
        raise ModelError(
            f"does not fit the teacher {teacher.name}: {', '.join(differing)}",
            where=model.name,
            expected="the model that it was distilled from, or one that it shares its text encoder and VAE with",
            hint="--teacher TEACHER",
        )
    if config.lora_rank is not None:
        add_adapters(meta_unet(dict(student.unet.config)), _lora_config(config), config.lora_targets)
    return make_trajectory(other, config.num_inference_steps, config.count_phases(), config.solver_steps)


def _fit(a: nn.Module, b: nn.Module) -> bool:
    """Returns whether two modules have equal weights, up to the rounding of a save in fp16."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == theirs[name].shape
        and bool((ours[name].float() - theirs[name].float()).abs().max() <= _HALF_ROUNDING * theirs[name].abs().max())
        for name in ours
    )
