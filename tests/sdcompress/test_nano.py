"""Nano: its data, its topology and its student; and every stored result is of the teacher that ships."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from sdcompress_bench.quality import to_pixels
from sdcompress_engines.manifest import sha256_tree

from sdcompress.data.nano_prompts import shown_prompts
from sdcompress.data.sources import open_source
from sdcompress.families.sampling_defaults import SamplingDefaults, sampling_defaults
from sdcompress.models import nano
from sdcompress.models.load import load_pipeline
from sdcompress.prune.cost import count_parameters
from sdcompress.prune.plan import BlockPlan
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student
from sdcompress.sampling import generate
from sdcompress.train.decoder import count_decoder

RESULTS = Path(__file__).parents[2] / "bench/results"


@pytest.fixture(scope="module")
def records() -> dict[str, list]:
    return {split: [(r.caption, r.meta) for r in open_source(nano.shards(split))] for split in ("train", "heldout")}


def test_held_out_pairs_are_new_but_their_concepts_and_styles_are_in_training(records: dict[str, list]) -> None:
    pairs = {split: {(meta["style"], meta["concept"]) for _, meta in rows} for split, rows in records.items()}
    assert len(records["train"]) >= 1150
    assert len(pairs["heldout"]) >= 150
    assert not pairs["train"] & pairs["heldout"]
    assert {c for _, c in pairs["heldout"]} <= {c for _, c in pairs["train"]}
    assert {s for s, _ in pairs["heldout"]} == {s for s, _ in pairs["train"]} == set(nano.styles())


def test_every_picture_names_its_source_and_an_open_license(records: dict[str, list]) -> None:
    metas = [meta for rows in records.values() for _, meta in rows]
    assert {meta["licence"] for meta in metas} == {"MIT", "Apache-2.0"}
    notice = (nano.data_folder() / "NOTICE").read_text()
    assert all(source in notice for source in {meta["source"] for meta in metas})


def test_captions_are_the_style_and_the_concept(records: dict[str, list]) -> None:
    phrases = nano.styles()
    assert all(
        caption.startswith(phrases[meta["style"]]) and caption.endswith(meta["concept"])
        for rows in records.values()
        for caption, meta in rows
    )


def test_a_concept_is_held_out_in_one_style_at_most(records: dict[str, list]) -> None:
    concepts = [meta["concept"] for _, meta in records["heldout"]]
    assert len(concepts) == len(set(concepts))
    assert set(nano.concepts()) == {meta["concept"] for rows in records.values() for _, meta in rows}


def test_pictures_are_whole_and_of_the_stated_size() -> None:
    sizes = {record.picture().size for record in open_source(nano.shards("heldout"))}
    assert sizes == {(128, 128)}


def test_the_teacher_has_sd1s_topology() -> None:
    pipeline = load_pipeline("nano").pipeline
    config = pipeline.unet.config
    assert list(config.down_block_types) == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert list(config.up_block_types) == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert (config.layers_per_block, config.in_channels, config.out_channels) == (2, 4, 4)
    assert 6e6 <= count_parameters(pipeline.unet) <= 9e6
    assert pipeline.vae.config.latent_channels == 4
    assert len(pipeline.vae.config.block_out_channels) == 4
    assert (pipeline.scheduler.config.beta_schedule, pipeline.scheduler.config.prediction_type) == (
        "scaled_linear",
        "epsilon",
    )
    assert pipeline.tokenizer.model_max_length == 77


def test_nano_tiny_is_a_trained_bk_tiny_of_nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path))
    teacher, student = load_pipeline("nano").pipeline, load_pipeline("nano-tiny").pipeline
    plan = make_plan(teacher.unet.config, "bk-tiny")
    assert BlockPlan.from_json((nano.ASSETS / "tiny/plan.json").read_text()).levels == plan.levels
    untrained = build_student(teacher.unet, plan).state_dict()
    trained = student.unet.state_dict()
    assert trained.keys() == untrained.keys()
    changed = [k for k in trained if not torch.equal(trained[k], untrained[k])]
    assert len(changed) > 0.9 * len(trained)


def test_nano_tiny_in_four_steps_draws_what_nano_tiny_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path))
    captions = [prompt.caption for prompt in shown_prompts()[:4]]
    drawn = {}
    for name in ("nano-tiny", "nano-tiny-4step"):
        pipeline = load_pipeline(name).pipeline
        pictures = generate(pipeline, captions, seeds=range(4))
        drawn[name] = torch.stack([to_pixels(picture) for picture in pictures])
    assert sampling_defaults(pipeline) == SamplingDefaults(4, 1.0, is_few_step=True)
    whole, few = drawn.values()
    same = (few - whole).square().mean((1, 2, 3))
    other = (few - whole.roll(1, 0)).square().mean((1, 2, 3))
    assert (same < other / 3).all()


def test_the_metric_model_shares_no_weights_with_the_text_encoder() -> None:
    from sdcompress_bench.resnet_clip import load_clip

    judge = load_clip(nano.metric_folder()).text_model.state_dict()
    conditioning = load_pipeline("nano").pipeline.text_encoder.state_dict()
    assert judge.keys() == conditioning.keys()
    assert not any(torch.equal(judge[k].float(), conditioning[k].float()) for k in judge if judge[k].ndim > 1)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("nano-teacher.json", "sha256"),
        ("distillation-nano.json", "teacher_sha256"),
        ("adapting-nano.json", "teacher_sha256"),
        ("few-step-nano.json", "teacher_sha256"),
        ("lora-remap-nano.json", "teacher_sha256"),
    ],
)
def test_results_are_of_the_teacher_that_ships(name: str, key: str) -> None:
    assert json.loads((RESULTS / name).read_text())[key] == sha256_tree(nano.teacher_folder())


def test_four_steps_keep_what_25_draw() -> None:
    found = json.loads((RESULTS / "few-step-nano.json").read_text())
    assert found["student_sha256"] == sha256_tree(nano.pipeline_folder("nano-tiny"))
    rows = found["rows"]

    def top5(arm: str, steps: int) -> list[float]:
        return [row["retrieval_top5"] for row in rows if (row["arm"], row["steps"]) == (arm, steps)]

    (whole,) = top5("untrained, its own solver", 25)
    few = top5("phases", 4)
    assert len(few) == 3
    assert min(few) >= 0.9 * whole
    for solver in ("DPM++ 2M", "UniPC"):
        assert statistics.fmean(few) > top5(f"untrained, {solver}, no guidance", 4)[0], "for the same calls of the UNet"


def test_the_small_decoder_draws_what_the_vae_draws() -> None:
    found = json.loads((RESULTS / "decoder-nano.json").read_text())
    assert found["lpips_alex"][0] <= 0.1
    assert found["sd1_parameters"]["small"] <= 0.03 * found["sd1_parameters"]["vae"]
    for figures in zip(*(found["judged"][decoder].items() for decoder in ("vae", "small")), strict=True):
        (name, (own, low, high)), (_, (small, *_)) = figures
        assert low <= small <= high, (name, own, small)
    vae = load_pipeline("nano").pipeline.vae
    small = load_pipeline("nano-tiny", decoder=nano.DECODER_NAME)
    assert not small.note, "it is of the VAE that ships"
    assert count_decoder(small.pipeline.vae) == found["parameters"]["small"]
    assert count_decoder(vae) == found["parameters"]["vae"]


def test_distillation_beats_no_training_and_the_task_loss_alone() -> None:
    rows = json.loads((RESULTS / "distillation-nano.json").read_text())["rows"]

    def mean(arm: str, name: str) -> float:
        return statistics.fmean(row[name] for row in rows if row["arm"] == arm)

    for other in ("untrained", "task loss alone"):
        assert mean("distilled", "style_accuracy") > mean(other, "style_accuracy")
        assert mean("distilled", "retrieval_top5") > mean(other, "retrieval_top5")
        assert mean("distilled", "output_relative_l2") < mean(other, "output_relative_l2")
    assert len({row["seed"] for row in rows if row["arm"] == "distilled"}) >= 3


def test_the_judge_can_judge_and_what_nano_draws_is_recognized() -> None:
    found = json.loads((RESULTS / "nano-teacher.json").read_text())
    assert found["vae_psnr_db"] >= 28
    real = found["heldout_real_pictures"]
    assert real["style"]["share"] >= 0.9
    assert real["top5"]["share"] >= 0.95
    assert found["seen"]["top5"]["share"] >= 0.95
    assert found["seen"]["top1"]["share"] >= 0.75
    assert found["heldout"]["top5"]["share"] >= 0.85


def test_a_short_distillation_keeps_nine_tenths_of_what_the_teacher_shows() -> None:
    rows = json.loads((RESULTS / "distillation-nano.json").read_text())["rows"]
    shares = {
        arm: statistics.fmean(row["retrieval_top5"] for row in rows if row["arm"] == arm)
        for arm in ("teacher", "distilled")
    }
    assert shares["distilled"] >= 0.9 * shares["teacher"]
