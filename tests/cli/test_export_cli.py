"""`export` reports what cannot be built before it starts, and `generate` refuses what a graph folder cannot do."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.few_steps import read_exported_few_steps
from sdcompress_engines.flavour import TENSORRT_RTX
from sdcompress_engines.manifest import read_manifest, write_manifest

from .conftest import Cli, one_line

needs_rtx = pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")
DDIM = "DDIMScheduler"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "webui"], "--profile without --trt. Try: add --trt"),
        (["--batch", "1:2:8"], "--batch without --trt"),
        (["--refit", "any"], "--refit without --trt"),
        (["--optimization-level", "0"], "--optimization-level without --trt"),
        (["--workspace", "5"], "--workspace without --trt"),
        (["--trt", "--precision", "fp32"], "expected fp16, bf16, fp8 or int8"),
        (["--calibration-prompts", "p.txt"], "add --precision fp8 or int8"),
        (["--trt", "--profile", "webui", "--profile", "sd15-512", "--batch", "2"], "the sizes in each of them"),
        (["--trt", "--profile", "sd15"], "profile 'sd15'"),
        (["--trt", "--batch", "8:2:1"], "MIN:OPT:MAX with MIN ≤ OPT ≤ MAX"),
        (["--trt", "--height", "100"], "--height 128"),
        (["--trt", "--tokens", "100"], "expected multiples of 77"),
        (
            ["--signature", "webui", "--component", "vae_decoder"],
            "vae_decoder with the signature webui, which runs its own",
        ),
    ],
)
@needs_rtx
def test_options_that_do_not_fit_are_refused_in_one_line(
    cli: Cli, tmp_path: Path, options: list[str], message: str
) -> None:
    code, _, err = cli("export", "nano", "-o", tmp_path / "out", *options)
    assert code == 2
    assert message in one_line(err)
    assert list(tmp_path.iterdir()) == []


@needs_rtx
@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--compute-capability", "3.5"], 1, "builds for no compute capability 3.5"),
        (["--optimization-level", "5"], 2, "--optimization-level with tensorrt-rtx"),
        (["--hardware-compatible", "ampere_plus"], 2, "--hardware-compatible with tensorrt-rtx"),
        (["--precision", "fp8", "--compute-capability", "8.6"], 2, "fp8 needs compute capability 8.9"),
    ],
)
def test_what_the_library_does_not_build_is_refused_before_the_export(
    cli: Cli, tmp_path: Path, options: list[str], exit_code: int, message: str
) -> None:
    code, _, err = cli("export", "nano", "-o", tmp_path / "out", "--trt", "--flavour", "tensorrt-rtx", *options)
    assert code == exit_code
    assert message in one_line(err)
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_engines_come_from_the_store_the_second_time_and_are_listed(cli: Cli, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        code, out, err = cli(
            "export",
            "nano",
            "-o",
            tmp_path / folder,
            "--trt",
            "--flavour",
            "tensorrt-rtx",
            "--component",
            "text_encoder",
            "--batch",
            "2",
        )
        assert code == 0, err
        assert "text_encoder.engine" in out
    assert "from the store" in out
    assert "the store has this engine already" in err
    engines = [tmp_path / folder / "engine" / "text_encoder.engine" for folder in ("first", "second")]
    assert engines[0].read_bytes() == engines[1].read_bytes()
    code, out, err = cli("engines", "list", tmp_path / "second")
    assert code == 0, err
    assert "text_encoder" in out
    assert "tensorrt-rtx" in out


@needs_rtx
@pytest.mark.parametrize("engines", [[], ["--trt", "--flavour", "tensorrt-rtx"]], ids=["graphs", "engines"])
def test_an_exported_few_step_model_keeps_its_steps_and_says_what_to_choose(
    cli: Cli, tmp_path: Path, random_folder: Path, engines: list[str]
) -> None:
    model = shutil.copytree(random_folder, tmp_path / "few")
    scheduler = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    changes = {
        "model_index.json": {"_num_inference_steps": 4, "_guidance_scale": 1.0, "scheduler": ["diffusers", DDIM]},
        "scheduler/scheduler_config.json": {"_class_name": DDIM, **scheduler},
    }
    for name, values in changes.items():
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(content | values))
    code, out, err = cli("export", model, "-o", tmp_path / "out", "--component", "text_encoder", *engines)
    assert code == 0, err
    assert "sampling" in out
    assert "4 steps, CFG 1; AUTOMATIC1111 and Forge: Euler, Simple; ComfyUI: euler, simple" in " ".join(out.split())
    folder = tmp_path / "out/engine" if engines else tmp_path / "out"
    manifest = read_manifest(folder)
    assert manifest is not None
    sampling = read_exported_few_steps(folder, manifest)
    assert sampling is not None
    assert sampling.timesteps == [999, 749, 499, 249]


def test_a_checkpoint_in_ldm_layout_is_one_file_that_loads_again(cli: Cli, tmp_path: Path, random_folder: Path) -> None:
    target = tmp_path / "student.safetensors"
    code, out, err = cli("export", random_folder, "--ldm", "-o", target)
    assert code == 0, err
    assert "sdcompress inspect" in out
    assert [p.name for p in tmp_path.iterdir()] == ["student.safetensors"]
    code, out, err = cli("inspect", target)
    assert code == 0, err
    assert "sd1" in out
    code, _, err = cli("export", random_folder, "--ldm", "-o", target)
    assert code == 1
    assert "--force" in one_line(err)
    code, _, err = cli("export", random_folder, "--ldm", "--trt", "-o", tmp_path / "x.safetensors")
    assert code == 2
    assert "--ldm" in one_line(err)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--trt"], "--trt"),
        (["--component", "unet"], "--component"),
        (["--precision", "fp8"], "--precision fp8"),
        (["--opset", "20"], "--opset"),
        (["--signature", "webui"], "--signature"),
        (["--keep-failed"], "--keep-failed"),
        (["--optimization-level", "0"], "--optimization-level"),
    ],
)
def test_an_option_of_graphs_or_engines_is_refused_with_ldm(
    cli: Cli, tmp_path: Path, options: list[str], named: str
) -> None:
    code, _, err = cli("export", "nano", "--ldm", "-o", tmp_path / "x.safetensors", *options)
    assert code == 2
    assert f"sdcompress: {named} with --ldm; expected a checkpoint alone" in one_line(err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "torch"], "--backend ort"),
        (["--backend", "ort", "--fallback", "torch"], "no torch weights"),
        (["--backend", "nonsense"], "no backend 'nonsense'"),
    ],
)
def test_generate_refuses_options_that_a_graph_folder_cannot_take(
    cli: Cli, tmp_path: Path, fp16_small: Any, options: list[str], message: str
) -> None:
    code, _, err = cli("generate", fp16_small.folder, "a cat", "-o", tmp_path / "out.png", *options)
    assert code == 2
    assert message in one_line(err)


def test_generate_refuses_graphs_of_another_model(cli: Cli, tmp_path: Path, fp16_small: Any) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(fp16_small.folder, folder)
    write_manifest(folder, "onnx", config=fp16_small.manifest.config, inputs={"pipeline": "0" * 64})
    code, _, err = cli("generate", "nano", "a cat", "-o", tmp_path / "a.png", "--backend", "ort", "--artifacts", folder)
    assert code == 1
    assert "was made from another model (000000000000)" in one_line(err)


def test_generate_refuses_a_folder_without_a_graph_of_the_unet(cli: Cli, tmp_path: Path, fp16_small: Any) -> None:
    folder = fp16_small.folder
    code, _, err = cli("generate", "nano", "a cat", "-o", tmp_path / "a.png", "--backend", "ort", "--artifacts", folder)
    assert code == 1
    assert "has no graph of the unet" in one_line(err)


def test_generate_names_the_folders_inside_an_export_with_engines(cli: Cli, tmp_path: Path, fp16_small: Any) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(fp16_small.folder, folder / "onnx")
    code, _, err = cli("generate", "nano", "a cat", "-o", tmp_path / "a.png", "--backend", "ort", "--artifacts", folder)
    assert code == 1
    assert "holds no exported pipeline" in one_line(err)
    assert "DIR/onnx or DIR/engine" in one_line(err)


@pytest.mark.parametrize("option", ["--precision", "--artifacts"])
def test_auto_is_refused_with_what_it_chooses_itself(cli: Cli, tmp_path: Path, option: str) -> None:
    (tmp_path / "graphs").mkdir()
    value = "fp32" if option == "--precision" else tmp_path / "graphs"
    code, _, err = cli("generate", "nano", "a cat", "-o", tmp_path / "a.png", "--backend", "auto", option, value)
    assert code == 2
    assert "with the backend auto, which chooses both" in one_line(err)


def test_the_command_that_a_refusal_names_can_be_typed(cli: Cli, tmp_path: Path) -> None:
    model = tmp_path / "my model"
    _, _, err = cli("generate", model, "a cat", "-o", tmp_path / "a.png", "--artifacts", tmp_path / "c d")
    words = shlex.split(one_line(err).partition("Try: ")[2].partition(",")[0])
    assert words[:3] == ["sdcompress", "export", str(model)]
    assert str(tmp_path / "c d") in words
