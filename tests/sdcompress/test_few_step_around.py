"""Few-step training beside other things: autocast, a teacher on the hub, and a LoRA for another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from sdcompress_engines.errors import ModelError, UsageError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdcompress.cli import cli
from sdcompress.data.build_cache import build_cache
from sdcompress.data.sources import open_source
from sdcompress.lora.sampling import read_sampling
from sdcompress.models import locate
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.models.origin import find_teacher
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student
from sdcompress.train.few_step import check_pair, few_step
from sdcompress.train.objectives.consistency import Consistency
from sdcompress.train.pipelines import save_pipeline, with_unet
from sdcompress.train.trajectory import make_trajectory

from .test_few_step import SHORT, Predictor, compute_loss, make_batch, schedule


@pytest.fixture(scope="module")
def teacher(random_folder: Path) -> LoadedPipeline:
    return load_pipeline(random_folder)


@pytest.fixture(scope="module")
def student(teacher: LoadedPipeline, tmp_path_factory: pytest.TempPathFactory) -> LoadedPipeline:
    """A bk-tiny student of the teacher, without training."""
    pipeline: Any = teacher.pipeline
    unet = build_student(pipeline.unet, make_plan(pipeline.unet.config, "bk-tiny"))
    folder = tmp_path_factory.mktemp("student") / "pipeline"
    save_pipeline(with_unet(pipeline, unet.eval()), folder, "student")
    return load_pipeline(folder)


class Half(nn.Module):
    """Stand-in for a UNet of one layer, which autocast runs in bfloat16; it notes autocast's copies of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.casts: list[int] = []

    def forward(self, sample: torch.Tensor, *_: Any, **__: Any) -> Any:
        with Casts() as casts:
            drawn = self.layer(sample)
        self.casts.append(casts.count)
        return (drawn,)


class Casts(TorchDispatchMode):
    """Counts the tensors that are cast to bfloat16."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_the_trained_pass_casts_its_own_weights_where_the_target_is_its_own() -> None:
    trajectory = make_trajectory(schedule(), 4, 4, 40)
    objective = Consistency(Predictor(trajectory, torch.zeros(4, 3, 3)), trajectory, {}, 1.0, 0.001)
    trained, batch = Half(), make_batch(trajectory, torch.zeros(1, 4, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        compute_loss(objective, trained, batch).backward()
    of_target, of_trained = trained.casts
    assert of_target == of_trained == 3, "the sample, the weight and the bias, and none from a pass without gradients"
    assert trained.layer.weight.grad is not None


@pytest.mark.parametrize("kind", ["student", "few-step"])
def test_a_teacher_on_the_hub_is_taken_only_as_it_was(
    kind: str, student: LoadedPipeline, teacher: LoadedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model that draws in few steps has a teacher too; the teacher's folder stands for the hub's."""
    folder = tmp_path / "model"
    made = student if kind == "student" else teacher
    facts: dict[str, Any] = {"config": {"teacher_name": "some/teacher"}, "inputs": {"teacher": teacher.sha256}}
    save_pipeline(made.pipeline, folder, kind, **facts)
    monkeypatch.setattr(locate, "_download", lambda repository: teacher.folder)
    assert find_teacher(str(folder)) == "some/teacher"
    monkeypatch.setattr(locate, "_download", lambda repository: student.folder)
    with pytest.raises(UsageError, match="was distilled from some/teacher as it was") as caught:
        find_teacher(str(folder))
    assert caught.value.hint == "--teacher some/teacher, to learn from these"


def test_a_student_that_takes_the_guidance_scale_is_refused(student: LoadedPipeline, teacher: LoadedPipeline) -> None:
    other = load_pipeline(student.folder)
    unet: Any = other.pipeline.unet
    unet.register_to_config(time_cond_proj_dim=64)
    with pytest.raises(ModelError, match="takes the guidance scale as an input"):
        check_pair(other, teacher, SHORT)


def test_a_remapped_lora_still_says_how_it_draws(teacher: LoadedPipeline, pictures: Path, tmp_path: Path) -> None:
    cache = build_cache(open_source(pictures), teacher, tmp_path / "cache")
    config = SHORT.model_copy(update={"steps": 1, "lora_rank": 2, "ema_decay": 0.0})
    few_step(teacher, teacher, cache, config, tmp_path / "whole")
    lora, remapped = tmp_path / "whole/lora/lora.safetensors", tmp_path / "tiny.safetensors"
    arguments = ["lora", "remap", str(lora), "--teacher", str(teacher.folder), "--plan", "bk-tiny", "-o", str(remapped)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (before, _), (after, scheduler) = read_sampling(lora), read_sampling(remapped)  # type: ignore[misc]
    assert before == after == {"_num_inference_steps": 4, "_guidance_scale": 1.0}
    assert type(scheduler).__name__ == "DDIMScheduler"
