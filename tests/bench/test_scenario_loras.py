"""A model of a suite draws with its LoRAs in every figure, and the time of a swap is one of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sdcompress_bench import faults as planted
from sdcompress_bench import outputs, suite
from sdcompress_bench.build_suite import build_suite
from sdcompress_bench.compare import compare, render
from sdcompress_bench.latency import LORA_SWAP
from sdcompress_bench.outputs import measure_sensitivity
from sdcompress_bench.report import render_html, render_markdown
from sdcompress_bench.results import Results, read_results
from sdcompress_bench.scenario import Gate, Sampling
from sdcompress_bench.suite_file import check_suite, read_suite
from sdcompress_engines.errors import SdCompressError
from sdcompress_engines.manifest import faults, read_manifest

from sdcompress.cli.bench import _speed_text
from sdcompress.lora.adapters import LowRank
from sdcompress.lora.files import write_lora
from sdcompress.models import nano
from sdcompress.models.load import load_pipeline
from sdcompress.models.locate import display_name

KEPT = Path(__file__).parents[2] / "bench/results/bench-nano.json"
SWAPS = ("set", "reset", "again")


@pytest.fixture(scope="module")
def lora(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the tiny pipeline that changes its UNet and its text encoder much."""
    pipeline: Any = load_pipeline(pipeline_folder).pipeline
    noise = torch.Generator().manual_seed(3)
    layers = {
        (component, name): LowRank(
            torch.randn(2, module.in_features, generator=noise), torch.randn(module.out_features, 2, generator=noise)
        )
        for component, ends in (("unet", ("to_q", "to_v")), ("text_encoder", ("q_proj",)))
        for name, module in getattr(pipeline, component).named_modules()
        if name.endswith(ends)
    }
    file = tmp_path_factory.mktemp("loras") / "style.safetensors"
    write_lora(layers, file, "kohya")
    return file


@pytest.fixture(scope="module")
def settings(pipeline_folder: Path, lora: Path) -> dict[str, Any]:
    model = {"path": str(pipeline_folder), "steps": 1, "guidance_scale": 1}
    return {
        "models": [model | {"name": "plain"}, model | {"name": "styled", "loras": [f"{lora}:0.5"]}],
        "backends": ["torch", "ort"],
        "device": "cpu",
        "rounds": 1,
        "samples": 4,
        "end_to_end_samples": 1,
        "stage_budget_s": 0.1,
        "pictures": 1,
        "quality_pictures": 0,
        "timesteps": [1, 501],
        "probes": 1,
        "threads": 1,
        "gates": [{"figure": "lora_swap_ms", "at_most": 1e6}],
    }


@pytest.fixture(scope="module")
def measured(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("suite") / "report"
    return folder, suite.run_suite(build_suite(settings)[0], folder)


def test_a_swap_is_measured_in_each_direction_on_each_backend(measured: tuple[Path, Results]) -> None:
    results = measured[1]
    plain = [run for run in results.latency if run.model == "plain"]
    styled = {run.backend: run for run in results.latency if run.model == "styled"}
    assert [run.failed for run in results.latency] == [None] * 4
    assert [run.lora_swap_ms for run in plain] == [{}, {}]
    for run in styled.values():
        assert {direction: len(rounds) for direction, rounds in run.lora_swap_ms.items()} == dict.fromkeys(SWAPS, 1)
        assert {len(rounds[0]) for rounds in run.lora_swap_ms.values()} <= {3, 4}
        assert run.rounds(LORA_SWAP)[0][0] == run.lora_swap_ms["set"][0][0] + run.lora_swap_ms["reset"][0][0]
    new, again = (styled["onnxruntime"].swap_summary(direction) for direction in ("set", "again"))
    assert new is not None
    assert again is not None
    assert new.median > again.median, "a session with new weights is started, one that was kept is not"


def test_the_same_weights_are_compared_with_the_loras_on_both_sides(measured: tuple[Path, Results]) -> None:
    results = measured[1]
    gates = {entry["model"]: entry["gate"] for entry in results.backends}
    assert {name: gate["passed"] for name, gate in gates.items()} == {"plain": True, "styled": True}
    assert results.students["styled"]["relative_l2"] > 0.01, "the LoRA changes what the model predicts"
    assert results.failed_gates() == []


def test_the_pictures_have_the_loras(measured: tuple[Path, Results]) -> None:
    folder, results = measured
    files = {(p["model"], p["backend"]): (folder / p["files"][0]).read_bytes() for p in results.pictures}
    assert files["plain", "torch"] != files["styled", "torch"]
    assert files["plain", "onnxruntime"] != files["styled", "onnxruntime"]


def test_the_report_and_the_file_have_the_swap_and_name_the_lora(measured: tuple[Path, Results]) -> None:
    folder, results = measured
    assert faults(folder, "results") == []
    assert list(read_results(folder / "results.json").rows()) == list(results.rows())
    manifest = read_manifest(folder)
    assert manifest is not None
    assert "LoRA style.safetensors:0.5 of styled" in manifest.inputs
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text()
        assert "Swapping LoRAs in an open pipeline" in text
        assert "style.safetensors:0.5" in text.replace("\\", "")
    assert [(gate["model"], gate["passed"]) for gate in results.gates] == [("styled", True)] * 2
    lines = [_speed_text(results, row) for row in results.rows()]
    assert ["LoRAs in and out" in line for line in lines] == [False, False, True, True]


def test_results_without_loras_have_no_row_for_them(measured: tuple[Path, Results], tmp_path: Path) -> None:
    before = read_results(KEPT)
    assert "lora_swap_ms" not in json.loads(KEPT.read_text())["latency"][0]
    assert {row.lora_swap_ms for row in before.rows()} == {None}
    plain = dataclasses.replace(before, pictures=[])
    for text in (render_html(plain, tmp_path), render_markdown(plain)):
        assert "LoRA" not in text
    (judged,) = before.judge([Gate("lora_swap_ms", at_most=1)])
    assert (judged["value"], judged["passed"]) == (None, False)


def test_swaps_are_compared_and_other_loras_are_noted(measured: tuple[Path, Results]) -> None:
    results = measured[1]
    found = compare(results, results)
    assert [line.scenario.split(",")[0] for line in found.lines if line.stage == LORA_SWAP] == ["styled"] * 2
    assert "lora_swap" in render(found)
    assert found.notes == []
    plain = [{name: value for name, value in model.items() if name != "loras"} for model in results.models]
    (note,) = compare(results, dataclasses.replace(results, models=plain)).notes
    assert note.startswith("styled: other LoRAs (style.safetensors:0.5, ")
    assert note.endswith(" and none)")


def test_swaps_of_unequal_number_are_read_and_compared(measured: tuple[Path, Results], tmp_path: Path) -> None:
    raw = json.loads((measured[0] / "results.json").read_text())
    raw["pictures"] = []
    for run in raw["latency"]:
        if run["lora_swap_ms"]:
            run["lora_swap_ms"] |= {"reset": [[1.0], [2.0]]}
    (tmp_path / "results.json").write_text(json.dumps(raw))
    results = read_results(tmp_path / "results.json")
    assert [len(run.rounds(LORA_SWAP)) for run in results.latency] == [0, 0, 1, 1]


def test_faults_are_planted_in_the_model_with_its_loras(
    settings: dict[str, Any], lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}

    def keep(pipeline: Any, *rest: Any) -> planted.Sensitivity:
        found["weight"] = pipeline.unet.get_parameter(name).clone()
        raise KeyboardInterrupt

    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    path = settings["models"][0]["path"]
    monkeypatch.setattr(planted, "sensitivity", keep)
    monkeypatch.setattr(outputs, "read_probe", lambda path: None)
    case = {"path": path, "loras": [(str(lora), 0.5)], "device": "cpu", "probe": "", "threads": None}
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(case | {"limits": [], "floors": [], "count": 1, "seed": 0})
    assert not torch.equal(found["weight"], load_pipeline(path).pipeline.unet.get_parameter(name))


def test_a_models_own_loras_come_before_those_of_the_suite(settings: dict[str, Any], lora: Path) -> None:
    models = [{"path": settings["models"][0]["path"], "name": name} for name in ("a", "b", "c")]
    models[1] |= {"loras": []}
    models[2] |= {"loras": [str(lora), f"{lora}:-0.5"]}
    found, _ = build_suite(settings | {"models": models, "loras": [f"{lora}:2"], "gates": []})
    assert [[each.weight for each in model.loras] for model in found.models] == [[2.0], [], [1.0, -0.5]]
    assert lora in suite.list_inputs(found)
    facts = {"cpu": "x", "cores": 2, "gpu": [], "commit": "a"}
    other, _ = build_suite(settings | {"models": models, "loras": [f"{lora}:3"], "gates": []})
    assert suite.fingerprint(found, facts) != suite.fingerprint(other, facts)


def test_a_model_with_loras_is_named_after_them(settings: dict[str, Any], lora: Path) -> None:
    path = settings["models"][0]["path"]
    own = display_name(Path(path))
    models = [path, {"path": path, "loras": [str(lora)]}, {"path": path, "loras": [str(lora)] * 2}]
    found, _ = build_suite(settings | {"models": models, "gates": []})
    assert [model.name for model in found.models] == [f"{own}{end}" for end in ("", " with LoRA", " with 2 LoRAs")]


def test_a_few_step_lora_sets_how_its_model_draws() -> None:
    file = nano.ASSETS / "tiny-4step/lora.safetensors"
    few = {"path": "nano-tiny", "loras": [str(file)]}

    def sampling(**options: Any) -> list[Sampling]:
        found, _ = build_suite({"models": ["nano-tiny", few | options], "backends": ["torch"], "device": "cpu"})
        return [model.sampling for model in found.models]

    assert sampling() == [Sampling(25, 2.5), Sampling(4, 1.0)]
    assert sampling(steps=2) == [Sampling(25, 2.5), Sampling(2, 1.0)]
    assert sampling(loras=[f"{file}:0"]) == [Sampling(25, 2.5), Sampling(25, 2.5)]
    with pytest.raises(SdCompressError, match="which was trained for 4 steps without guidance"):
        sampling(guidance_scale=3)


def test_a_student_with_random_weights_takes_loras(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path))
    layers = {
        ("unet", "down_blocks.0.attentions.0.proj_in"): LowRank(torch.ones(1, 320, 1, 1), torch.ones(320, 1, 1, 1))
    }
    write_lora(layers, tmp_path / "sd1.safetensors", "diffusers")
    entry = {"random": "sd1", "plan": "bk-tiny", "steps": 4, "guidance_scale": 1}
    found, _ = build_suite({"models": [entry | {"loras": [str(tmp_path / "sd1.safetensors")]}]})
    assert [model.name for model in found.models] == ["sd1 bk-tiny with LoRA"]
    with pytest.raises(SdCompressError, match="fits a layer"):
        build_suite({"models": [entry | {"loras": [str(lora)]}]})


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, r"gone.safetensors: does not exist; expected a LoRA"),
        ("folder", r"gone.safetensors"),
        ("text", r"gone.safetensors"),
        ("weights", r"gone.safetensors: is not a LoRA: it holds a VAE alone"),
        ("other", r"the LoRA changes down_blocks.9.attentions.0.proj_in, which the unet does not have"),
    ],
)
def test_what_is_no_lora_of_the_model_is_one_line_before_anything_runs(
    settings: dict[str, Any], tmp_path: Path, content: str | None, fault: str
) -> None:
    file = tmp_path / "gone.safetensors"
    if content == "folder":
        file.mkdir()
    elif content == "text":
        file.write_text("no tensors")
    elif content == "weights":
        save_file({"decoder.conv_in.weight": torch.zeros(1)}, file)
    elif content == "other":
        place = ("unet", "down_blocks.9.attentions.0.proj_in")
        write_lora({place: LowRank(torch.ones(1, 16), torch.ones(16, 1))}, file, "diffusers")
    models = [settings["models"][0] | {"loras": [f"{file}:0.5"]}]
    with pytest.raises(SdCompressError, match=fault) as refusal:
        build_suite(settings | {"models": models})
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600


def test_all_wrong_loras_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "loras: [a.safetensors:1e9]\nmodels: [{path: nano, loras: [':1', 'b.safetensors:x', c.safetensors]}]"
    )
    with pytest.raises(SdCompressError) as refusal:
        read_suite(path)
    for expected in ("loras.0: 'a.safetensors:1e9'", "models.0.loras.0: ':1'", "models.0.loras.1: 'b.safetensors:x'"):
        assert expected in str(refusal.value)
    assert "FILE or FILE:WEIGHT" in str(refusal.value)
    assert check_suite({"models": ["nano"]}, "here").loras == ()
