"""Few-step training: the trajectory, the loss, and that a finished model draws at the timesteps of its training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from sdcompress_engines.errors import ModelError, TrainingError, UsageError
from sdcompress_engines.manifest import read_manifest, write_manifest
from torch import nn

from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.sources import open_source
from sdcompress.export.pipeline_files import save_small_parts
from sdcompress.export.tensorrt import _choose_preset
from sdcompress.families.sampling_defaults import sampling_defaults
from sdcompress.lora.files import read_lora
from sdcompress.lora.fuse import fuse_lora
from sdcompress.lora.names import unet_modules
from sdcompress.lora.sampling import apply_sampling
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.models.origin import find_teacher
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student
from sdcompress.sampling import generate
from sdcompress.train.batches import NoisyBatch
from sdcompress.train.config import FewStepConfig
from sdcompress.train.few_step import check_pair, few_step, make_few_step_scheduler
from sdcompress.train.objectives.consistency import Consistency
from sdcompress.train.pipelines import save_pipeline, with_unet
from sdcompress.train.recipes import load_config
from sdcompress.train.trajectory import Trajectory, make_trajectory
from tests.conftest import BETAS

SHORT = FewStepConfig(
    steps=4, batch_size=4, learning_rate=1e-3, precision="fp32", checkpoint_every=2, log_every=1, ema_decay=0.9
)
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.fixture(scope="module")
def teacher(random_folder: Path) -> LoadedPipeline:
    return load_pipeline(random_folder)


@pytest.fixture(scope="module")
def cache(teacher: LoadedPipeline, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return build_cache(open_source(pictures), teacher, tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def student(teacher: LoadedPipeline, tmp_path_factory: pytest.TempPathFactory) -> LoadedPipeline:
    """A bk-tiny student of the teacher, without training, as `distill` saves it."""
    pipeline: Any = teacher.pipeline
    unet = build_student(pipeline.unet, make_plan(pipeline.unet.config, "bk-tiny"))
    folder = tmp_path_factory.mktemp("student") / "pipeline"
    facts = {"config": {"teacher_name": "elsewhere"}, "inputs": {"teacher": teacher.sha256}}
    save_pipeline(with_unet(pipeline, unet.eval()), folder, "student", **facts)
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def finished(
    student: LoadedPipeline, teacher: LoadedPipeline, cache: LatentCache, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    few_step(student, teacher, cache, SHORT, output)
    return output


def schedule(prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(**BETAS, prediction_type=prediction_type)


def known_prediction(trajectory: Trajectory, clean: torch.Tensor, noise: torch.Tensor, places: torch.Tensor) -> Any:
    """What a perfect network predicts where picture and noise are known."""
    alpha, sigma = (each.view(-1, 1, 1, 1) for each in mix(trajectory, places))
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}[
        trajectory.prediction_type
    ]


def mix(trajectory: Trajectory, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cumprod = trajectory.alphas_cumprod[places]
    return cumprod.sqrt(), (1 - cumprod).sqrt()


def noised(trajectory: Trajectory, clean: torch.Tensor, noise: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    alpha, sigma = (each.view(-1, 1, 1, 1) for each in mix(trajectory, places))
    return alpha * clean + sigma * noise


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_step_leads_to_the_same_mix_of_picture_and_noise(prediction_type: str) -> None:
    trajectory = make_trajectory(schedule(prediction_type), 4, 4, 40)
    clean, noise = torch.randn(2, 40, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    start = torch.arange(1, 41)
    for end in (start - 1, trajectory.find_phase_ends(start)):
        predicted = known_prediction(trajectory, clean, noise, start)
        stepped = trajectory.step(noised(trajectory, clean, noise, start), predicted, start, end)
        torch.testing.assert_close(stepped, noised(trajectory, clean, noise, end), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_reach_is_how_far_a_step_moves_with_the_prediction(prediction_type: str) -> None:
    trajectory = make_trajectory(schedule(prediction_type), 2, 2, 40)
    start = torch.arange(1, 41)
    end = trajectory.find_phase_ends(start)
    sample, predicted = torch.randn(2, 40, 4, 3, 3)
    moved = trajectory.step(sample, predicted + 1, start, end) - trajectory.step(sample, predicted, start, end)
    expected = trajectory.find_reach(start, end).expand_as(moved)
    torch.testing.assert_close(moved.abs(), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_jump_from_the_end_of_a_phase_stays_there(prediction_type: str) -> None:
    trajectory = make_trajectory(schedule(prediction_type), 4, 4, 40)
    places = torch.tensor([0, 10, 20, 30])
    sample, predicted = torch.randn(2, 4, 4, 3, 3)
    assert torch.equal(trajectory.jump(sample, predicted, places, places), sample)


def test_phases_end_at_the_timesteps_of_the_steps() -> None:
    trajectory = make_trajectory(schedule(), 4, 4, 40)
    ends = trajectory.find_phase_ends(torch.arange(1, 41))
    assert ends.tolist() == [0] * 10 + [10] * 10 + [20] * 10 + [30] * 10
    assert trajectory.to_timesteps(torch.tensor([10, 20, 30, 40])).tolist() == [249, 499, 749, 999]


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("one_phase", [False, True])
def test_a_finished_model_draws_at_timesteps_of_its_training(steps: int, one_phase: bool) -> None:
    config = FewStepConfig(num_inference_steps=steps, phases=1 if one_phase else None)
    scheduler = make_few_step_scheduler(schedule(), config)
    scheduler.set_timesteps(steps)
    expected = [1000 * k // steps - 1 for k in range(steps, 0, -1)]
    assert scheduler.timesteps.tolist() == expected
    trajectory = make_trajectory(schedule(), steps, config.count_phases(), config.solver_steps)
    assert set(expected) <= set(trajectory.timesteps.tolist())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_drawing_jumps_from_phase_to_phase(prediction_type: str) -> None:
    config = FewStepConfig(num_inference_steps=4)
    trajectory = make_trajectory(schedule(prediction_type), 4, 4, config.solver_steps)
    scheduler = make_few_step_scheduler(schedule(prediction_type), config)
    scheduler.set_timesteps(4)
    drawn = jumped = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    for i, timestep in enumerate(scheduler.timesteps):
        predicted = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(i))
        drawn = scheduler.step(predicted, timestep, drawn).prev_sample
        start = trajectory.find_places(timestep.view(1))
        jumped = trajectory.jump(jumped, predicted, start, trajectory.find_phase_ends(start))
    torch.testing.assert_close(drawn, jumped, atol=1e-3, rtol=1e-4)


class Predictor(nn.Module):
    """Stand-in for a UNet that is perfect for a data set of one picture: every jump of it ends in the same place."""

    def __init__(self, trajectory: Trajectory, clean: torch.Tensor, error: float = 0.0) -> None:
        super().__init__()
        self.trajectory, self.clean = trajectory, clean
        self.error = nn.Parameter(torch.tensor(error))
        self.seen: list[torch.Tensor] = []

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, **_: Any) -> Any:
        self.seen.append(text)
        alpha, sigma = (e.view(-1, 1, 1, 1) for e in mix(self.trajectory, self.trajectory.find_places(timesteps)))
        noise = (sample - alpha * self.clean) / sigma.clamp_min(1e-4)
        return (noise + self.error + text.mean((1, 2)).view(-1, 1, 1, 1),)


def make_batch(trajectory: Trajectory, clean: torch.Tensor, text: float = 0.0) -> NoisyBatch:
    places = torch.arange(1, 41)
    noise = torch.randn(40, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    return NoisyBatch(
        noised(trajectory, clean, noise, places),
        trajectory.to_timesteps(places),
        torch.full((40, 77, 2), text),
        noise,
        torch.ones(40),
    )


def compute_loss(objective: Consistency, trained: nn.Module, batch: NoisyBatch) -> torch.Tensor:
    with objective.attach_hooks(trained):
        return objective.compute_losses(trained, batch)["loss"]


@pytest.mark.parametrize("phases", [1, 4])
def test_a_perfect_network_has_no_loss_and_a_wrong_one_learns(phases: int) -> None:
    trajectory = make_trajectory(schedule(), 4, phases, 40)
    clean = torch.randn(1, 4, 3, 3)
    absent = {"text": torch.zeros(1, 77, 2)}
    objective = Consistency(Predictor(trajectory, clean), trajectory, absent, 3.0, 0.001)
    perfect, wrong = Predictor(trajectory, clean), Predictor(trajectory, clean, 0.1)
    batch = make_batch(trajectory, clean)
    assert compute_loss(objective, perfect, batch) < 1e-4
    loss = compute_loss(objective, wrong, batch)
    assert loss > 1e-2
    loss.backward()
    assert wrong.error.grad is not None
    assert wrong.error.grad > 0
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())


def test_targets_come_from_the_average_where_there_is_one() -> None:
    trajectory = make_trajectory(schedule(), 1, 1, 40)
    clean = torch.randn(1, 4, 3, 3)
    objective = Consistency(Predictor(trajectory, clean), trajectory, {"text": torch.zeros(1, 77, 2)}, 1.0, 0.001)
    trained, batch = Predictor(trajectory, clean), make_batch(trajectory, clean)
    objective.use_average({"error": torch.tensor(0.5)})
    assert compute_loss(objective, trained, batch) > 0.1
    objective.use_average({})
    assert compute_loss(objective, trained, batch) < 1e-4


def test_the_teacher_steps_with_guidance() -> None:
    trajectory = make_trajectory(schedule(), 4, 4, 40)
    clean = torch.randn(1, 4, 3, 3)
    teacher = Predictor(trajectory, clean)
    absent = {"text": torch.full((1, 77, 2), 0.25)}
    batch = make_batch(trajectory, clean, text=1.0)
    guided = Consistency(teacher, trajectory, absent, 3.0, 0.001)._predict_with_guidance(batch)
    assert torch.equal(teacher.seen[0][:40], batch.encoder_hidden_states)
    assert torch.equal(teacher.seen[0][40:], absent["text"].expand(40, -1, -1))
    plain = Consistency(teacher, trajectory, absent, 1.0, 0.001)._predict_with_guidance(batch)
    assert len(teacher.seen[1]) == 40
    torch.testing.assert_close(guided - plain, torch.full_like(plain, 2.0 * (1.0 - 0.25)), atol=1e-4, rtol=1e-4)


def test_the_finished_pipeline_draws_in_its_own_steps(finished: Path, student: LoadedPipeline) -> None:
    pipeline = load_pipeline(finished).pipeline
    defaults = sampling_defaults(pipeline)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.is_guidance_free) == (4, 1.0, True)
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda _, args: calls.append((len(args[0]), int(args[1]))))
    generate(pipeline, ["a cat"], seeds=[0])
    assert calls == [(1, 999), (1, 749), (1, 499), (1, 249)]
    with pytest.raises(UsageError, match="guidance is in its weights"):
        generate(pipeline, ["a cat"], seeds=[0], guidance_scale=7.0)
    with pytest.raises(UsageError, match="a negative prompt"):
        generate(pipeline, ["a cat"], seeds=[0], negative_prompt="a dog")
    assert not sampling_defaults(student.pipeline).is_few_step


def test_an_engine_without_guidance_is_built_for_one_picture(
    finished: Path, student: LoadedPipeline, tmp_path: Path
) -> None:
    for pipeline, preset in ((load_pipeline(finished).pipeline, "few-step"), (student.pipeline, "dynamic")):
        folder = tmp_path / preset
        folder.mkdir()
        save_small_parts(pipeline, folder / "pipeline")
        assert _choose_preset(folder, write_manifest(folder, "onnx", config={})) == preset


def test_plain_diffusers_draws_the_same_picture(finished: Path) -> None:
    ours = generate(load_pipeline(finished).pipeline, ["a cat"], seeds=[7])[0]
    plain = DiffusionPipeline.from_pretrained(finished / "pipeline", safety_checker=None)
    generator = torch.Generator().manual_seed(7)
    theirs = plain("a cat", num_inference_steps=4, guidance_scale=1.0, generator=generator).images[0]
    assert ours.tobytes() == theirs.tobytes()


def test_the_manifest_names_model_teacher_and_data(
    finished: Path, student: LoadedPipeline, teacher: LoadedPipeline, cache: LatentCache
) -> None:
    manifest = read_manifest(finished / "pipeline")
    assert manifest is not None
    assert manifest.kind == "few-step"
    assert manifest.inputs == {"model": student.sha256, "teacher": teacher.sha256, "data": cache.sha256}
    assert manifest.config["guidance_scale"] == sampling_defaults(teacher.pipeline).guidance_scale


def test_a_stopped_run_resumes_to_the_same_weights(
    student: LoadedPipeline,
    teacher: LoadedPipeline,
    cache: LatentCache,
    finished: Path,
    tmp_path: Path,
    stop_at_call: Callable[[type, int], None],
) -> None:
    stop_at_call(Consistency, 4)
    with pytest.raises(KeyboardInterrupt):
        few_step(student, teacher, cache, SHORT, tmp_path / "run")
    assert few_step(student, teacher, cache, SHORT, tmp_path / "run", resume=True).resumed_from == 2
    resumed, whole = (load_pipeline(run).pipeline.unet.state_dict() for run in (tmp_path / "run", finished))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    other = SHORT.model_copy(update={"num_inference_steps": 2})
    with pytest.raises(TrainingError, match="num_inference_steps"):
        few_step(student, teacher, cache, other, finished, resume=True)


def test_a_lora_makes_the_student_the_finished_model(
    student: LoadedPipeline, teacher: LoadedPipeline, cache: LatentCache, tmp_path: Path
) -> None:
    config = SHORT.model_copy(update={"steps": 2, "lora_rank": 2, "phases": 1})
    few_step(student, teacher, cache, config, tmp_path / "run")
    finished = load_pipeline(tmp_path / "run").pipeline.unet.state_dict()
    for name in ("lora.safetensors", "lora-kohya.safetensors"):
        pipeline = load_pipeline(student.folder).pipeline
        before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
        fuse_lora(pipeline, read_lora(tmp_path / "run/lora" / name, unet_modules(pipeline.unet)))
        fused = pipeline.unet.state_dict()
        assert any(not torch.equal(fused[key], before[key]) for key in before)
        for key, value in finished.items():
            torch.testing.assert_close(fused[key], value, atol=1e-6, rtol=1e-5)
        apply_sampling(pipeline, tmp_path / "run/lora" / name)
        assert sampling_defaults(pipeline) == sampling_defaults(load_pipeline(tmp_path / "run").pipeline)
        assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    assert type(load_pipeline(tmp_path / "run").pipeline.scheduler).__name__ == "LCMScheduler"


def test_sdxl_is_trained_with_its_added_conditions(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> None:
    model = load_pipeline(sdxl_folder)
    cache = build_cache(open_source(pictures), model, tmp_path / "cache", 64)
    config = SHORT.model_copy(update={"steps": 1, "guidance_scale": 3.0})
    result = few_step(model, model, cache, config, tmp_path / "run")
    assert 0 < result.losses["loss"] < 100
    assert sampling_defaults(load_pipeline(tmp_path / "run").pipeline).num_inference_steps == 4


@pytest.mark.parametrize(
    ("steps", "solver_steps", "expected"),
    [(4, 50, "solver_steps of 4, 8, 20, 40"), (8, 100, "8, 40, 200"), (3, 40, "1, 2, 4, 5, 8, 10 or 20")],
)
def test_steps_that_do_not_divide_are_refused(steps: int, solver_steps: int, expected: str) -> None:
    with pytest.raises(UsageError, match="steps do not divide 1000 timesteps") as refusal:
        make_trajectory(schedule(), steps, steps, solver_steps)
    assert expected in str(refusal.value)


def test_noise_prediction_from_pure_noise_is_refused() -> None:
    scheduler = DDPMScheduler(**BETAS, rescale_betas_zero_snr=True)
    with pytest.raises(ModelError, match="first timestep is pure noise"):
        make_trajectory(scheduler, 4, 4, 40)
    scheduler = DDPMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert make_trajectory(scheduler, 4, 4, 40).alphas_cumprod[-1] == 0


def test_a_lora_for_layers_that_are_not_there_is_refused(student: LoadedPipeline, teacher: LoadedPipeline) -> None:
    config = SHORT.model_copy(update={"lora_rank": 2, "lora_targets": ("nothing",)})
    with pytest.raises(UsageError, match="targets nothing match no layer"):
        check_pair(student, teacher, config)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(UsageError, match="phases 2 should be 1 or 4, the number of steps"):
        load_config(FewStepConfig, None, {"phases": 2})
    with pytest.raises(UsageError, match="snr_gamma has no effect"):
        load_config(FewStepConfig, None, {"snr_gamma": 5.0})


def test_a_teacher_that_does_not_fit_is_refused(
    student: LoadedPipeline, teacher: LoadedPipeline, sdxl_folder: Path, finished: Path
) -> None:
    with pytest.raises(ModelError, match=r"does not fit the teacher .*family sd1, not sdxl"):
        check_pair(student, load_pipeline(sdxl_folder), SHORT)
    with pytest.raises(ModelError, match="draws in few steps already"):
        check_pair(student, load_pipeline(finished), SHORT)
    other = load_pipeline(student.folder)
    other.pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ModelError, match="prediction type v_prediction, not epsilon"):
        check_pair(other, teacher, SHORT)
    other = load_pipeline(student.folder)
    other.pipeline.text_encoder.final_layer_norm.weight.data[0] += 1
    with pytest.raises(ModelError, match="another text_encoder"):
        check_pair(other, teacher, SHORT)


def test_the_teacher_is_what_the_manifest_says(
    student: LoadedPipeline, teacher: LoadedPipeline, tmp_path: Path
) -> None:
    assert find_teacher("nano-tiny") == "nano"
    assert find_teacher("nano") == "nano"
    assert find_teacher(str(teacher.folder)) == str(teacher.folder)
    with pytest.raises(UsageError, match=r"was distilled from elsewhere .*whose place is not recorded"):
        find_teacher(str(student.folder))
