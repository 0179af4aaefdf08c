"""The model card agrees with the manifest, and its code runs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from sdcompress_engines.errors import ArtifactError, ModelError, PlanError
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest, read_manifest, save_manifest, write_manifest

from sdcompress.data.build_cache import build_cache
from sdcompress.data.sources import open_source
from sdcompress.families.sampling_defaults import set_defaults
from sdcompress.models.load import load_pipeline
from sdcompress.prune.cost import count_parameters
from sdcompress.prune.presets import make_plan
from sdcompress.publish.finished_model import find_finished_model
from sdcompress.publish.model_card import model_card
from sdcompress.sampling import generate
from sdcompress.train.config import DistillConfig, FewStepConfig, FinetuneConfig, LoraConfig
from sdcompress.train.distill import distill
from sdcompress.train.few_step import few_step
from sdcompress.train.finetune import finetune
from sdcompress.train.lora import train_lora
from sdcompress.train.recipes import load_config

from ..conftest import BETAS
from ..hostile_text import TEXTS

PROMPT = "a flat icon of a wine glass"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, random_folder: Path, pictures: Path) -> dict[str, Path]:
    """The folders of one training step each of distill, finetune and lora train."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data"
    data.mkdir()
    for name in ("00.png", "00.txt", "01.png", "01.txt"):
        shutil.copyfile(pictures / name, data / name)
    teacher = load_pipeline(random_folder)
    cache = build_cache(open_source(str(data)), teacher, folder / "cache")
    options: dict[str, Any] = {"steps": 1, "batch_size": 2, "validation_prompts": (PROMPT,), "sample_every": 0}
    plan = make_plan(dict(teacher.pipeline.unet.config), "bk-tiny")
    distill(
        teacher,
        plan,
        cache,
        load_config(DistillConfig, None, options | {"output_kd_weight": 0.5, "ema_decay": 0.9}),
        folder / "student",
    )
    student = load_pipeline(folder / "student/pipeline")
    few_step(student, teacher, cache, load_config(FewStepConfig, None, options), folder / "fast")
    finetune(teacher, cache, load_config(FinetuneConfig, None, options), folder / "finetuned")
    train_lora(teacher, cache, load_config(LoraConfig, None, options | {"rank": 3}), folder / "style")
    adapted = load_config(FewStepConfig, None, options | {"lora_rank": 2})
    few_step(student, teacher, cache, adapted, folder / "fast-lora")
    return {
        "student": folder / "student/pipeline",
        "few-step": folder / "fast/pipeline",
        "finetuned": folder / "finetuned/pipeline",
        "lora": folder / "style/lora",
        "few-step-lora": folder / "fast-lora/lora",
    }


def make_card(folder: Path, *arguments: Any, **options: Any) -> str:
    return model_card(find_finished_model(folder), *arguments, **options)


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    values = yaml.safe_load(matter)
    assert isinstance(values, dict)
    return values


def test_the_card_of_a_student_names_the_removed_blocks_and_its_sources(
    trained: dict[str, Path], random_pipeline: Any
) -> None:
    from diffusers import UNet2DConditionModel

    folder = trained["student"]
    card = make_card(folder, "me/random-tiny")
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    before, after = (
        count_parameters(random_pipeline.unet),
        count_parameters(UNet2DConditionModel.from_pretrained(folder / "unet")),
    )
    assert f"| teacher | {before:,} |\n| this model | {after:,} |" in card
    assert "| level 0 (48 channels) | down pairs 1; up pairs 1 | down pairs 0; up pairs 0, 2 |" in card
    assert "| level 3 (96 channels) | all | nothing |" in card
    assert "| mid block | all | nothing |" in card
    assert manifest["inputs"]["teacher"] in card
    assert manifest["inputs"]["data"] in card
    assert "against the teacher's prediction | 0.5 |" in card
    assert "against the teacher's block outputs | 1 |" in card
    assert f"| last task_loss | {manifest['figures']['losses']['task_loss']:.4f} |" in card
    assert "| steps | 1 of 2 pictures (2 seen) |" in card
    assert "| moving average of the weights | 0.9 |" in card
    assert 'from_pretrained("me/random-tiny"' in card
    assert "sdcompress export me/random-tiny" in card


@pytest.mark.parametrize("kind", ["student", "few-step", "finetuned", "lora"])
def test_the_front_matter_has_the_entries_of_the_hub(trained: dict[str, Path], kind: str) -> None:
    matter = front_matter(make_card(trained[kind], "me/thing", "creativeml-openrail-m", base_model="org/teacher"))
    assert matter["license"] == "creativeml-openrail-m"
    assert matter["base_model"] == "org/teacher"
    assert matter["library_name"] == "diffusers"
    assert matter["pipeline_tag"] == "text-to-image"
    assert "sdcompress" in matter["tags"]
    assert ("lora" in matter["tags"]) == (kind == "lora")


def test_the_card_of_a_few_step_model_says_in_how_many_steps_it_draws(trained: dict[str, Path]) -> None:
    card = make_card(trained["few-step"], "me/fast")
    assert "`student`, trained by consistency distillation" in card
    assert "to draw in 4 steps, without guidance" in card
    assert re.search(r"\| guidance in the weights \| \d[\d.\\]* \|\n\| phases \| 4 \|", card)


def test_a_teacher_that_is_a_folder_is_no_base_model_on_the_hub(trained: dict[str, Path]) -> None:
    assert "base_model" not in front_matter(make_card(trained["student"], "me/thing"))


def test_a_license_that_was_not_given_has_to_be_checked(trained: dict[str, Path]) -> None:
    card = make_card(trained["student"], "me/thing")
    assert front_matter(card)["license"] == "other"
    assert "To be checked" in card
    assert "To be checked" not in make_card(trained["student"], "me/thing", "apache-2.0")


def test_a_lora_card_loads_it_by_its_file(trained: dict[str, Path]) -> None:
    card = make_card(trained["lora"], "me/style", base_model="org/teacher")
    assert 'from_pretrained("org/teacher"' in card
    assert 'load_lora_weights("me/style", weight_name="lora.safetensors")' in card
    assert (trained["lora"] / "lora.safetensors").is_file()
    assert (trained["lora"] / "lora-kohya.safetensors").is_file()
    assert "rank 3 (alpha 3) for the layers to_q" in card


def test_the_code_of_a_card_runs(trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = make_card(trained["student"], "me/thing").split("```python\n")[1].split("```")[0]
    code = code.replace("me/thing", str(trained["student"])).replace("num_inference_steps=25", "num_inference_steps=1")
    exec(compile(code, "card", "exec"), {})
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (128, 128)


def test_the_card_of_a_few_step_model_draws_in_its_steps_and_names_the_hosts_samplers(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "few"
    pipeline = load_pipeline(trained["student"]).pipeline
    pipeline.scheduler = few_step_scheduler()
    set_defaults(pipeline, 4, 1.0)
    pipeline.save_pretrained(folder)
    made = read_manifest(trained["student"])
    assert made is not None
    write_manifest(folder, made.kind, config=made.config, inputs=made.inputs, figures=made.figures)
    card = make_card(folder, "me/thing")
    drawn = 'pipeline("PROMPT", num_inference_steps=4, guidance_scale=1.0)'
    assert drawn in card
    assert "This model was trained for 4 steps, CFG 1: the guidance is in its weights" in card
    for row in ("| AUTOMATIC1111 | Euler | Simple |", "| Forge | Euler | Simple |", "| ComfyUI | euler | simple |"):
        assert row in card
    monkeypatch.chdir(tmp_path)
    code = card.split("```python\n")[1].split("```")[0].replace("me/thing", str(folder))
    exec(compile(code, "card", "exec"), {})
    assert (tmp_path / "picture.png").is_file()
    assert "Steps and sampler" not in make_card(trained["student"], "me/thing")


def few_step_scheduler() -> Any:
    """Returns the scheduler that few-step training saves."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False, steps_offset=1)


def test_the_newest_samples_are_shown_with_their_prompts(trained: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(trained["student"], tmp_path / "run/pipeline")
    folder = tmp_path / "run/pipeline"
    assert "samples.webp" not in make_card(folder, "me/thing")
    (tmp_path / "run/samples").mkdir()
    for step in (90, 180):
        Image.new("RGB", (8, 8)).save(tmp_path / f"run/samples/step-{step:06d}.webp")
    assert find_finished_model(folder).samples == tmp_path / "run/samples/step-000180.webp"
    card = make_card(folder, "me/thing")
    assert "![samples](samples.webp)" in card
    assert f"- {PROMPT}" in card


def test_the_card_of_a_few_step_lora_sets_its_scheduler(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = str(trained["student"])
    card = make_card(trained["few-step-lora"], "me/fast", base_model="org/tiny")
    assert "A LoRA for `org/tiny`, trained by consistency distillation" in card
    assert "rank 2 (alpha 2) for the layers to_q" in card
    assert "| ComfyUI | euler | simple |" in card
    assert "lora remap" not in card, "it is for this very student"
    code = card.split("```python\n")[1].split("```")[0].replace("org/tiny", base)
    names: dict[str, Any] = {}
    exec(compile(code.replace("me/fast", str(trained["few-step-lora"])), "card", "exec"), names)
    by_us = load_pipeline(trained["few-step-lora"].parent / "pipeline").pipeline
    ours = by_us.scheduler.config
    assert {name: names["pipeline"].scheduler.config[name] for name in ours} == dict(ours)
    drawn = generate(by_us, ["PROMPT"], seeds=[0])[0]
    again = names["pipeline"](
        "PROMPT", num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)
    ).images[0]
    difference = np.asarray(drawn, np.float64) - np.asarray(again, np.float64)
    assert np.abs(difference).mean() < 2


def test_a_model_without_a_manifest_gets_no_card(random_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no sdcompress\.json"):
        make_card(random_folder, "me/thing")


@pytest.mark.parametrize(
    ("change", "error"), [({"plan": {}}, PlanError), ({"train": None}, ArtifactError), ({"plan": None}, PlanError)]
)
def test_a_manifest_without_the_training_is_refused(
    trained: dict[str, Path], tmp_path: Path, change: dict[str, Any], error: type[Exception]
) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(trained["student"], folder)
    manifest = read_manifest(folder)
    assert manifest is not None
    save_manifest(folder, replace(manifest, config=manifest.config | change))
    with pytest.raises(error):
        make_card(folder, "me/thing")


def test_an_artifact_of_another_kind_is_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    manifest = read_manifest(trained["student"])
    assert manifest is not None
    save_manifest(tmp_path, replace(manifest, kind="engine"))
    with pytest.raises(ModelError, match="kind 'engine'"):
        make_card(tmp_path, "me/thing")


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS.filter(bool), kind=st.sampled_from(["student", "few-step", "finetuned", "lora"]))
def test_any_text_in_a_manifest_leaves_one_front_matter_and_no_markup(
    trained: dict[str, Path], text: str, kind: str
) -> None:
    parser = MarkdownIt("commonmark").enable("table")
    model = find_finished_model(trained[kind])
    model = replace(model, samples=trained[kind])
    cards = [model_card(replace(model, manifest=fill(model.manifest, words)), "me/thing") for words in (text, "x")]
    tokens, plain = (parser.parse(card.split("---\n", 2)[2]) for card in cards)
    assert front_matter(cards[0]) == front_matter(cards[1])
    assert {token.type for token in tokens} <= {token.type for token in plain}
    for block in ("heading_open", "table_open", "tr_open", "td_open", "fence", "code_block", "hr"):
        assert [t.type for t in tokens].count(block) == [t.type for t in plain].count(block)
    parts, known = ([part for token in each for part in token.children or ()] for each in (tokens, plain))
    assert {part.type for part in parts} <= {part.type for part in known}
    for name in ("href", "src"):
        assert [part.attrs[name] for part in parts if name in part.attrs] == [
            part.attrs[name] for part in known if name in part.attrs
        ]


def fill(manifest: Manifest, text: str) -> Manifest:
    """Returns a manifest with `text` in each place that holds a name, a caption or a version."""
    train = manifest.config["train"]
    changed = {name: text for name in ("optimizer", "lr_schedule", "precision") if name in train}
    changed |= {"validation_prompts": [text, text], "data": {text: text}, "targets": [text]}
    config = manifest.config | {"train": train | changed, "teacher_name": text, "model_name": text}
    if "plan" in config:
        config["plan"] = config["plan"] | {"name": text[:40] if text.isprintable() else "x"}  # others are refused
    return replace(
        manifest,
        config=config,
        inputs=dict.fromkeys(manifest.inputs, text),
        figures=manifest.figures | {"losses": {text: 0.5}},
        versions=dict.fromkeys(manifest.versions, text),
        created=text,
    )


@pytest.mark.parametrize(
    "change",
    [{"steps": "many"}, {"losses": {"loss": "low"}}, {"losses": [1]}, {"steps": None}],
)  # fmt: skip
def test_figures_of_other_types_are_our_error(trained: dict[str, Path], change: dict[str, Any]) -> None:
    model = find_finished_model(trained["student"])
    with pytest.raises(ModelError, match="unexpected value"):
        model_card(replace(model, manifest=replace(model.manifest, figures=model.manifest.figures | change)), "me/x")
