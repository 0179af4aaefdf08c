"""Distillation: what a run changes and what it leaves unchanged, and that a stopped run resumes to the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from sdcompress_engines.errors import ArtifactError, DataError, PlanError, TrainingError, UsageError

from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.sources import open_source
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import attention_pairs, build_student
from sdcompress.train.batches import Batches, NoisyBatch, SampleOrder
from sdcompress.train.checkpoint import list_checkpoints
from sdcompress.train.config import DistillConfig
from sdcompress.train.distill import distill, make_objective
from sdcompress.train.objectives.block_distillation import BlockDistillation
from sdcompress.train.objectives.denoising import Denoising
from sdcompress.train.pipelines import make_training_scheduler
from sdcompress.train.recipes import load_config

SHORT = DistillConfig(
    steps=6, batch_size=4, learning_rate=1e-3, precision="fp32", checkpoint_every=2, log_every=1, ema_decay=0.9
)


@pytest.fixture(scope="module")
def teacher(random_folder: Path) -> LoadedPipeline:
    return load_pipeline(random_folder)


@pytest.fixture(scope="module")
def cache(teacher: LoadedPipeline, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return build_cache(open_source(pictures), teacher, tmp_path_factory.mktemp("cache") / "cache")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return DiffusionPipeline.from_pretrained(folder / "pipeline").unet.state_dict()


@pytest.fixture(scope="module")
def finished(teacher: LoadedPipeline, cache: LatentCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    distill(teacher, make_plan(teacher.pipeline.unet.config, "bk-tiny"), cache, SHORT, output)
    return output


def test_training_changes_the_student_and_not_the_teacher(
    teacher: LoadedPipeline, finished: Path, random_folder: Path
) -> None:
    fresh = load_pipeline(random_folder)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            teacher.pipeline.unet.state_dict().values(), fresh.pipeline.unet.state_dict().values(), strict=True
        )
    )
    untrained = build_student(fresh.pipeline.unet, make_plan(fresh.pipeline.unet.config, "bk-tiny")).state_dict()
    trained = weights(finished)
    assert trained.keys() == untrained.keys()
    assert sum(not torch.equal(trained[k], untrained[k]) for k in trained) > 0.9 * len(trained)
    assert not any(m._forward_hooks for m in teacher.pipeline.unet.modules())


def test_each_loss_is_logged_apart(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(
        line["loss"] == pytest.approx(line["task_loss"] + line["output_kd_loss"] + line["feature_kd_loss"], rel=1e-4)
        for line in lines
    )


def test_a_stopped_run_resumes_to_the_same_weights(
    teacher: LoadedPipeline,
    cache: LatentCache,
    finished: Path,
    tmp_path: Path,
    stop_at_call: Callable[[type, int], None],
) -> None:
    plan = make_plan(teacher.pipeline.unet.config, "bk-tiny")
    stop_at_call(BlockDistillation, 6)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, plan, cache, SHORT, tmp_path / "run")
    assert not (tmp_path / "run/pipeline").exists()
    newest = list_checkpoints(tmp_path / "run/checkpoints")[-1]
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:-100])  # cut: the one before is used
    result = distill(teacher, plan, cache, SHORT, tmp_path / "run", resume=True)
    assert result.resumed_from == 2
    resumed, whole = weights(tmp_path / "run"), weights(finished)
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_runs_of_another_precision_follow_each_other_in_one_process(
    teacher: LoadedPipeline, cache: LatentCache, tmp_path: Path
) -> None:
    plan = make_plan(teacher.pipeline.unet.config, "bk-tiny")
    for precision in ("bf16", "fp32", "bf16"):
        config = SHORT.model_copy(update={"steps": 1, "precision": precision})
        distill(teacher, plan, cache, config, tmp_path / "run", force=True)
    assert (tmp_path / "run/pipeline/model_index.json").is_file()


def test_resuming_another_run_is_refused_and_named(teacher: LoadedPipeline, cache: LatentCache, finished: Path) -> None:
    with pytest.raises(TrainingError, match="plan"):
        distill(teacher, make_plan(teacher.pipeline.unet.config, "bk-base"), cache, SHORT, finished, resume=True)
    assert json.loads((finished / "plan.json").read_text())["name"] == "bk-tiny"


def test_a_full_output_folder_is_refused(teacher: LoadedPipeline, cache: LatentCache, finished: Path) -> None:
    with pytest.raises(ArtifactError, match="not empty"):
        distill(teacher, make_plan(teacher.pipeline.unet.config, "bk-tiny"), cache, SHORT, finished)


def test_a_run_with_a_wrong_option_or_plan_leaves_no_folder(
    teacher: LoadedPipeline, cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(teacher.pipeline.unet.config, "bk-tiny")
    wider = make_plan(dict(teacher.pipeline.unet.config) | {"cross_attention_dim": 128}, "bk-tiny")
    indivisible = SHORT.model_copy(update={"gradient_accumulation": 3})
    with pytest.raises(UsageError, match="batch_size 4 does not divide"):
        distill(teacher, plan, cache, indivisible, tmp_path / "run")
    with pytest.raises(PlanError, match="the teacher has"):
        distill(teacher, wider, cache, SHORT, tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="DeepSpeed is not supported"):
        distill(teacher, plan, cache, SHORT, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_run_stops_and_says_so(teacher: LoadedPipeline, cache: LatentCache, tmp_path: Path) -> None:
    wild = SHORT.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(TrainingError, match="not finite"):
        distill(teacher, make_plan(teacher.pipeline.unet.config, "bk-tiny"), cache, wild, tmp_path / "run")
    assert not (tmp_path / "run/pipeline").exists()


def test_batches_do_not_depend_on_how_they_are_split(teacher: LoadedPipeline, cache: LatentCache) -> None:
    def at(positions: range) -> NoisyBatch:
        return Batches(cache, make_training_scheduler(teacher.pipeline.scheduler), 0.18, SHORT).make_batch(positions)

    whole, first, second = at(range(20, 28)), at(range(20, 24)), at(range(24, 28))
    for name in ("sample", "timesteps", "encoder_hidden_states", "target"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(first, name), getattr(second, name)]))


def test_another_seed_is_another_run(teacher: LoadedPipeline, cache: LatentCache) -> None:
    def at(seed: int) -> NoisyBatch:
        config = SHORT.model_copy(update={"seed": seed})
        return Batches(cache, make_training_scheduler(teacher.pipeline.scheduler), 0.18, config).make_batch(range(8))

    one, other = at(0), at(1)
    assert not torch.equal(one.timesteps, other.timesteps)
    assert not torch.equal(one.target, other.target)
    assert torch.equal(one.target, at(0).target)
    assert len({float(v) for v in one.target.flatten(1).sum(1)}) == 8


def test_the_losses_equal_an_independent_float64_computation(teacher: LoadedPipeline) -> None:
    """BK-SDM's equations 1 to 4, computed in float64 from the modules' outputs, with and without the teacher's norm."""
    import copy

    unet = copy.deepcopy(teacher.pipeline.unet).double()
    plan = make_plan(unet.config, "bk-base")
    student = build_student(unet, plan).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    sample, text, target = (
        torch.randn(shape, dtype=torch.float64) for shape in ((2, 4, 16, 16), (2, 77, 96), (2, 4, 16, 16))
    )
    batch = NoisyBatch(sample, torch.tensor([10, 900]), text, target, torch.ones(2))
    pairs, attentions = plan.feature_pairs(), attention_pairs(student, plan)
    seen: dict[tuple[str, str], torch.Tensor] = {}

    def see(side: str, name: str):  # type: ignore[no-untyped-def]
        return lambda module, arguments, output: seen.__setitem__(
            (side, name), output[0] if isinstance(output, tuple) else output
        )

    handles = [student.get_submodule(s).register_forward_hook(see("student", s)) for s, _ in pairs + attentions]
    handles += [unet.get_submodule(t).register_forward_hook(see("teacher", t)) for _, t in pairs + attentions]
    with torch.no_grad():
        predicted = student(sample, batch.timesteps, text).sample
        teacher_predicted = unet(sample, batch.timesteps, text).sample
    for handle in handles:
        handle.remove()
    expected = {
        "task_loss": ((predicted - target) ** 2).mean(),
        "output_kd_loss": ((predicted - teacher_predicted) ** 2).mean(),
    }
    weights = {"task_loss": 1.0, "output_kd_loss": 0.5, "feature_kd_loss": 0.25, "attention_kd_loss": 0.125}
    for norm in ("none", "teacher"):
        for name, named in (("feature_kd_loss", pairs), ("attention_kd_loss", attentions)):
            squares = [
                (((one - other) ** 2).mean() / (1 if norm == "none" else (other**2).mean())) / len(sample)
                for s, t in named
                for one, other in zip(seen["student", s], seen["teacher", t], strict=True)
            ]
            expected[name] = torch.stack(squares).sum()
        objective = BlockDistillation(unet, pairs, weights, norm, attentions)
        with torch.no_grad(), objective.attach_hooks(student):
            losses = objective.compute_losses(student, batch)
        for name, value in expected.items():
            assert float(losses[name]) == pytest.approx(float(value), rel=1e-6), (norm, name)
        assert float(losses["loss"]) == pytest.approx(float(sum(w * expected[k] for k, w in weights.items())), rel=1e-6)
    assert not any(m._forward_hooks for network in (unet, student) for m in network.modules())
    with torch.no_grad():
        assert float(Denoising().compute_losses(student, batch)["loss"]) == pytest.approx(
            float(expected["task_loss"]), rel=1e-6
        )


@pytest.mark.parametrize("norm", ["none", "teacher"])
def test_a_batch_in_passes_has_the_loss_and_the_gradient_of_the_whole(teacher: LoadedPipeline, norm: str) -> None:
    unet: Any = teacher.pipeline.unet
    plan = make_plan(unet.config, "bk-tiny")
    student = build_student(unet, plan)
    torch.manual_seed(1)
    sample = torch.randn(2, 4, 16, 16)
    sample[1] *= 5  # pictures whose features are not equally large
    batch = NoisyBatch(
        sample, torch.tensor([10, 900]), torch.randn(2, 77, 96), torch.randn(2, 4, 16, 16), torch.ones(2)
    )
    config = DistillConfig(feature_norm=norm, attention_kd_weight=1, precision="fp32")
    objective = make_objective(unet, student, plan, config)
    results = []
    with objective.attach_hooks(student):
        for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
            student.zero_grad()
            loss = 0.0
            for part in parts:
                losses = objective.compute_losses(student, batch.map_tensors(itemgetter(part)))
                (losses["loss"] / len(parts)).backward()
                loss += float(losses["loss"].detach()) / len(parts)
            results.append((loss, torch.cat([p.grad.flatten() for p in student.parameters()])))
    (whole, gradient), (loss, sum_of_parts) = results
    assert loss == pytest.approx(whole, rel=1e-5)
    assert float((gradient - sum_of_parts).norm() / gradient.norm()) < 1e-4


def test_batches_hold_one_shape_each_and_every_picture_of_it_once_an_epoch() -> None:
    buckets = torch.tensor([0] * 10 + [1] * 7 + [2] * 3)
    order = SampleOrder(buckets, 4, seed=5)
    assert order.length == 12
    assert order.never_drawn == 3
    batches = [[order[step * 4 + i] for i in range(4)] for step in range(30)]
    assert all(len({int(buckets[i]) for i in batch}) == 1 for batch in batches)
    for epoch in range(10):
        drawn = [i for batch in batches[epoch * 3 : epoch * 3 + 3] for i in batch]
        assert len(set(drawn)) == 12
    assert {i for batch in batches for i in batch} == set(range(17))  # the three of the last shape never fill a batch
    assert [SampleOrder(buckets, 4, seed=5)[i] for i in range(40)] == [i for batch in batches[:10] for i in batch]


def test_a_cache_of_another_teacher_is_refused(
    cache: LatentCache, teacher: LoadedPipeline, pictures: Path, tmp_path: Path
) -> None:
    build_cache(open_source(pictures), teacher, tmp_path / "cache")
    with pytest.raises(DataError, match="was made with the teacher"):
        LatentCache.open(tmp_path / "cache", "0" * 64)
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    assert len(LatentCache.open(tmp_path / "cache", teacher.sha256, open_source(data), 128)) == 24
    (data / "00.txt").write_text("something else")
    with pytest.raises(DataError, match="other data"):
        LatentCache.open(tmp_path / "cache", source=open_source(data))
    with pytest.raises(DataError, match="128 px"):
        LatentCache.open(tmp_path / "cache", size_px=64)


def test_cached_text_is_what_the_pipeline_encodes(teacher: LoadedPipeline, cache: LatentCache, pictures: Path) -> None:
    caption = (pictures / "00.txt").read_text()
    expected, empty = teacher.pipeline.encode_prompt(caption, "cpu", 1, True)
    assert torch.allclose(cache.sample(0, 0, 0.0).text, expected[0], atol=2e-3)
    assert torch.allclose(cache.sample(0, 0, 0.0, drop_caption=True).text, empty[0], atol=2e-3)


def test_recipes_load_and_all_errors_are_named_at_once(tmp_path: Path) -> None:
    assert load_config(DistillConfig, "nano", {"steps": 7}).steps == 7
    bad = tmp_path / "bad.yaml"
    bad.write_text("steps: many\nbatchsize: 3\n")
    with pytest.raises(Exception, match=r"batchsize.*|steps.*") as caught:
        load_config(DistillConfig, bad, {})
    assert "steps" in str(caught.value)
    assert "batchsize" in str(caught.value)
    with pytest.raises(UsageError, match="attention_kd_weight are all 0"):
        load_config(DistillConfig, None, {"task_weight": 0, "output_kd_weight": 0, "feature_kd_weight": 0})
