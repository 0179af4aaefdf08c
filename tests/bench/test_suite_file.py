"""Suite files: the built-in ones are valid, and all errors of a file are reported at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from sdcompress_bench.build_suite import build_suite
from sdcompress_bench.dry_run import list_scenarios
from sdcompress_bench.fidelity import load
from sdcompress_bench.latency import case_of
from sdcompress_bench.models import prepare_model, random_folder
from sdcompress_bench.scenario import BackendSetup, Random
from sdcompress_bench.suite import list_inputs
from sdcompress_bench.suite_file import read_setup, read_suite, suite_names, suite_path
from sdcompress_bench.work import count_pipeline
from sdcompress_engines.errors import ArtifactError, ModelError, UsageError
from sdcompress_engines.manifest import write_manifest

from sdcompress.models import nano


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", suite_names())
def test_built_in_suites_are_valid_and_open_with_their_command(name: str) -> None:
    path = suite_path(name)
    assert path is not None
    suite = read_suite(path)
    assert suite.title
    assert path.read_text().startswith(f"# sdcompress bench {name}\n")
    for text in (
        *(suite.backends or ()),
        *(suite.gpu_backends or ()),
        *(gate.backend for gate in suite.gates if gate.backend),
    ):
        assert read_setup(text, "fp32").backend


def test_the_documented_suites_exist() -> None:
    assert {"nano", "sd15", "sdxl", "smoke"} <= set(suite_names())
    assert suite_path("nowhere") is None


def test_models_have_three_notations(tmp_path: Path) -> None:
    suite = read_suite(
        write(tmp_path, "models: [nano, small=./student, {name: x, random: sd1, plan: bk-tiny}]\nsize_px: 64\nbatch: 2")
    )
    assert [(m.name, m.path, m.random, m.plan) for m in suite.models] == [
        (None, "nano", None, None),
        ("small", "./student", None, None),
        ("x", None, "sd1", "bk-tiny"),
    ]
    assert (suite.size_px, suite.batch) == ((64,), (2,))


def test_a_small_decoder_is_measured_beside_the_models_own_vae(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoencoderTiny().save_pretrained(tmp_path / "decoder")
    suite, _ = build_suite({"models": ["nano", "small=nano-tiny"], "decoder": str(tmp_path / "decoder")})
    assert [model.name for model in suite.models] == ["nano", "small", "small with small decoder"]
    assert [model.decoder for model in suite.models] == [None, None, tmp_path / "decoder"]
    last = suite.models[-1]
    assert (last.path, last.sha256) == (suite.models[1].path, suite.models[1].sha256)
    case = case_of(list(suite.scenarios())[-1], suite, {(last.name, setup): {} for setup in suite.setups})
    pipeline = load(case["path"], "torch", decoder=case["decoder"])
    assert isinstance(pipeline.vae, AutoencoderTiny)
    assert tmp_path / "decoder" in list_inputs(suite)
    pipeline.save_pretrained(tmp_path / "saved")
    work = count_pipeline(tmp_path / "saved", 128, 1, False, "fp32")["vae_decoder"]
    assert work.weight_bytes == 4 * 1_222_531
    with pytest.raises(ModelError, match="holds no small decoder"):
        build_suite({"models": ["nano"], "decoder": str(tmp_path / "saved")})


def test_a_random_student_draws_with_a_random_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path))
    entry = {"random": "sd1", "plan": "bk-tiny", "steps": 4, "guidance_scale": 1}
    suite, _ = build_suite({"models": [entry | {"name": "own VAE"}, entry | {"decoder": "random"}]})
    assert [model.name for model in suite.models] == ["own VAE", "sd1 bk-tiny with small decoder"]
    first, last = suite.models
    rows = {row["model"]: row["memory_bytes"] for row in list_scenarios(suite)}
    assert rows[last.name] < rows[first.name], "a small decoder takes less memory"
    assert not list(tmp_path.iterdir()), "nothing is made before it is measured"

    folder = shutil.copytree(nano.pipeline_folder("nano-tiny"), random_folder(Random("sd1", "bk-tiny")))
    # a small model in the place of 1 GB of random weights
    write_manifest(folder, "random model", config={"family": "sd1", "plan": "bk-tiny"}, inputs={})
    plain, small_one = (prepare_model(model) for model in suite.models)
    assert (plain.decoder, plain.path) == (None, small_one.path)
    assert small_one.decoder is not None
    assert small_one.decoder_sha256 == prepare_model(last).decoder_sha256, "it is made once"
    decoder = AutoencoderTiny.from_pretrained(small_one.decoder).decoder
    assert sum(weight.numel() for weight in decoder.parameters()) == 1_222_531
    assert isinstance(load(small_one.path, "torch", decoder=small_one.decoder).vae, AutoencoderTiny)


def test_a_folder_that_is_no_random_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path))
    suite, _ = build_suite({"models": [{"random": "sd1"}]})
    random_folder(Random("sd1")).mkdir(parents=True)
    with pytest.raises(ArtifactError, match="has no manifest"):
        prepare_model(suite.models[0])


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    text = "models: [nano]\nbackend: [torch]\nsteps: 0\ngates: [{figure: fids, at_most: 3}, {figure: kid}]\nmodel_s: 1"
    with pytest.raises(UsageError) as caught:
        read_suite(write(tmp_path, text))
    for expected in (
        "mine.yaml",
        "backend: unknown setting, did you mean backends?",
        "steps: input should be greater than or equal to 1, got 0",
        "no figure 'fids'",
        "needs at_least or at_most",
        "model_s: unknown setting",
    ):
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("models: []", "models"),
        ("steps: 3", "models: field required"),
        ("models: [{name: x}]", "needs a path, or random with a family"),
        ("models: [{path: a, random: sd1}]", "needs a path, or random with a family"),
        ("models: [{path: a, plan: bk-tiny}]", "plan can be used only with random"),
        ("models: [{random: sd3}]", "random"),
        ("- a\n- b", "not a mapping"),
        ("models: [nano", "not YAML"),
        ("1: 2", "1: unknown setting"),
    ],
)
def test_other_files_than_suites_are_refused(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        read_suite(write(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such suite; expected a YAML file, or one of nano"):
        suite_path(str(tmp_path / "gone.yaml"))


def test_a_setup_is_a_backend_with_or_without_a_precision() -> None:
    assert read_setup("ort", "fp16") == BackendSetup("onnxruntime", "fp16")
    assert read_setup(" aot:bf16 ", "fp32") == BackendSetup("aot", "bf16")
    for text, fault in (
        ("tpu", "no backend 'tpu'"),
        ("torch:int3", "no precision 'int3'"),
        ("auto", "auto is no backend"),
    ):
        with pytest.raises(UsageError, match=fault):
            read_setup(text, "fp32")


def test_a_gate_on_a_backend_that_is_not_measured_is_left_out() -> None:
    gates = [{"figure": "speedup", "backend": name, "at_least": 1.0} for name in (None, "ort", "torch")]
    suite, _ = build_suite({"models": ["nano"], "backends": ["torch"], "gates": gates, "device": "cpu"})
    assert [gate.setup for gate in suite.gates] == [None, BackendSetup("torch")]


def test_a_gate_on_a_model_that_is_not_measured_is_refused() -> None:
    gates = [{"figure": "speedup", "model": "nano-tinny", "at_least": 1}]
    with pytest.raises(UsageError, match="a gate on a model 'nano-tinny'; expected one of nano, nano-tiny"):
        build_suite({"models": ["nano", "nano-tiny"], "backends": ["torch"], "gates": gates, "device": "cpu"})
