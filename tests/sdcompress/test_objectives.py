"""A loss is one class: what the training loop asks of it, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from sdcompress_engines.errors import ModelError
from torch import nn

from sdcompress.checkpoints.write import ldm_state_dict
from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.sources import open_source
from sdcompress.export.settings import choose_settings
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.train.batches import Batches, NoisyBatch
from sdcompress.train.config import TrainConfig
from sdcompress.train.features import collect_features
from sdcompress.train.loop import TrainResult, train
from sdcompress.train.objectives.objective import Objective
from sdcompress.train.pipelines import make_training_scheduler

CONFIG = TrainConfig(steps=2, batch_size=2, learning_rate=1e-3, precision="fp32", log_every=1)


class HuberLoss(Objective):
    """A loss without hooks: it defines `compute_losses` alone."""

    def compute_losses(self, trained: Any, batch: NoisyBatch) -> dict[str, torch.Tensor]:
        arguments, options = batch.unet_arguments()
        return {"loss": nn.functional.huber_loss(trained(*arguments, **options)[0], batch.target)}


class QuietMidBlock(Objective):
    """A loss that reads a module's output: the diffusion loss and the size of the mid block's features."""

    hooked_modules = (["mid_block"], [])

    @contextmanager
    def attach_hooks(self, trained: nn.Module) -> Iterator[None]:
        with collect_features(trained, self.hooked_modules[0]) as self.features:
            yield

    def compute_losses(self, trained: Any, batch: NoisyBatch) -> dict[str, torch.Tensor]:
        arguments, options = batch.unet_arguments()
        task = nn.functional.mse_loss(trained(*arguments, **options)[0], batch.target)
        size = self.features["mid_block"].square().mean()
        return {"loss": task + size, "task_loss": task, "size_loss": size}


@pytest.fixture(scope="module")
def teacher(random_folder: Path) -> LoadedPipeline:
    return load_pipeline(random_folder)


@pytest.fixture(scope="module")
def cache(teacher: LoadedPipeline, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return build_cache(open_source(pictures), teacher, tmp_path_factory.mktemp("cache") / "cache")


def train_two_steps(objective: Objective, teacher: LoadedPipeline, cache: LatentCache, output: Path) -> TrainResult:
    """Train the conv_in of a fresh UNet; everything else of it stays frozen."""
    pipeline: Any = load_pipeline(teacher.folder).pipeline
    unet = pipeline.unet.requires_grad_(False)
    unet.conv_in.requires_grad_(True)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    output.mkdir()
    batches = Batches(cache, make_training_scheduler(pipeline.scheduler), 0.18, CONFIG)
    result = train(unet, objective, batches, CONFIG, output, {})
    changed = {name for name, weight in unet.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"conv_in.weight", "conv_in.bias"}
    assert not any(module._forward_hooks for module in unet.modules())
    return result


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pipeline: pipeline.register_modules(scheduler=diffusers.EDMEulerScheduler()), "the noise of EDM"),
        (lambda pipeline: pipeline.scheduler.register_to_config(prediction_type="sample"), "prediction type sample"),
        (lambda pipeline: pipeline.scheduler.register_to_config(beta_end=0.02), "a noise schedule of its own"),
        (lambda pipeline: pipeline.vae.register_to_config(latents_mean=[0.1] * 4), "a mean of its latents"),
    ],
)
def test_a_model_with_another_kind_of_noise_or_latents_is_not_written_for_a_webui(
    change: Callable[[Any], Any], words: str, random_folder: Path
) -> None:
    pipeline = load_pipeline(random_folder).pipeline
    change(pipeline)
    with pytest.raises(ModelError, match=words):
        ldm_state_dict(pipeline)
    with pytest.raises(ModelError, match=f"{words}, which a graph with the signature webui"):
        choose_settings(pipeline, host="webui")
    assert choose_settings(pipeline).host == "diffusers"


def test_comfyui_takes_the_noise_schedule_of_the_model(random_folder: Path) -> None:
    pipeline = load_pipeline(random_folder).pipeline
    pipeline.scheduler.register_to_config(beta_end=0.02)
    assert choose_settings(pipeline, host="comfyui").host == "comfyui"


def test_a_loss_with_compute_losses_alone_trains(teacher: LoadedPipeline, cache: LatentCache, tmp_path: Path) -> None:
    result = train_two_steps(HuberLoss(), teacher, cache, tmp_path / "run")
    assert result.steps == 2
    assert set(result.losses) == {"loss"}
    assert result.losses["loss"] > 0


def test_the_parts_of_a_loss_with_hooks_are_logged(teacher: LoadedPipeline, cache: LatentCache, tmp_path: Path) -> None:
    train_two_steps(QuietMidBlock(), teacher, cache, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["loss"] == pytest.approx(line["task_loss"] + line["size_loss"], rel=1e-4)
        assert line["size_loss"] > 0
