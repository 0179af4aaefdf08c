"""An export is checked, complete, and leaves the pipeline as it was and the disk clean when it fails."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from sdcompress_engines.errors import ArtifactError, BackendMissing, ExportError, GateFailed, UsageError
from sdcompress_engines.manifest import faults
from sdcompress_engines.runners import open_runner

from sdcompress import export
from sdcompress.cli import export as cli_export


@pytest.mark.parametrize("tokens", [77, 154])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_agrees_with_torch(random_pipeline: Any, fp32_export: Any, batch: int, size: tuple[int, int], tokens: int) -> None:
    torch.manual_seed(batch)
    sample, context = torch.randn(batch, 4, *size), torch.randn(batch, tokens, 96)
    times = torch.linspace(3, 990, batch)
    with torch.no_grad():
        truth = {"out_sample": random_pipeline.unet(sample, times, context).sample}
    with open_runner(fp32_export.folder / "unet.onnx") as runner:
        found = runner.infer({"sample": sample, "timestep": times, "encoder_hidden_states": context})
    assert export.relative_l2(found, truth) < 1e-4
    with torch.no_grad():
        truth = {"sample": random_pipeline.vae.decode(sample).sample}
    with open_runner(fp32_export.folder / "vae_decoder.onnx") as runner:
        assert export.relative_l2(runner.infer({"latent_sample": sample}), truth) < 1e-4


def test_the_folder_is_whole_and_says_how_near_it_is(fp32_export: Any) -> None:
    assert faults(fp32_export.folder, "onnx") == []
    manifest = fp32_export.manifest
    assert manifest.config.items() >= {"precision": "fp32", "opset": 23, "signature": "diffusers", "components": ["unet", "text_encoder", "vae_decoder"]}.items()
    assert manifest.inputs == {"pipeline": "0" * 64}
    assert all(0 < manifest.figures[component]["parity"]["relative_l2"] < 1e-4 for component in export.COMPONENTS)
    assert manifest.figures["unet"]["parity"]["cases"] == 8


def test_the_folder_alone_holds_what_a_pipeline_needs(fp32_export: Any, random_pipeline: Any) -> None:
    from diffusers import PNDMScheduler
    from transformers import CLIPTokenizer

    small = fp32_export.folder / "pipeline"
    assert CLIPTokenizer.from_pretrained(small / "tokenizer")("a cat").input_ids == random_pipeline.tokenizer("a cat").input_ids
    assert PNDMScheduler.from_pretrained(small / "scheduler").config.beta_end == 0.012
    assert {p.parent.name for p in small.rglob("config.json")} == {"unet", "vae", "text_encoder"}
    assert not list(small.rglob("*.safetensors"))
    assert str(Path.home()) not in (fp32_export.folder / "unet.onnx").read_bytes().decode("latin-1")


def test_graphs_keep_attention_and_group_normalization_whole(fp32_export: Any) -> None:
    operators = [node.op_type for node in onnx.load(fp32_export.folder / "unet.onnx").graph.node]
    assert operators.count("Attention") == 32
    assert operators.count("GroupNormalization") == 61


def test_fp16_graphs_are_fp16_and_within_twice_torch(fp16_small: Any) -> None:
    for component, parity in fp16_small.parity.items():
        assert parity.torch_relative_l2 > 1e-5, component
        assert parity.share_of_limit <= 1
    with open_runner(fp16_small.folder / "vae_decoder.onnx") as runner:
        assert runner.inputs[0].dtype == runner.outputs[0].dtype == torch.float16


def test_the_pipeline_is_unchanged(random_pipeline: Any, tmp_path: Path) -> None:
    text = random_pipeline.text_encoder
    before = copy.deepcopy(text.state_dict())
    text.train()
    try:
        export.export_onnx(random_pipeline, tmp_path / "out", precision="fp16", components=("text_encoder",))
        assert text.training
    finally:
        text.eval()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in text.parameters())
    assert all(torch.equal(value, before[name]) for name, value in text.state_dict().items())


def test_a_graph_too_far_from_torch_leaves_nothing(random_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = export._write_graph

    def spoiled(graph: Any, wanted: Any, path: Path, opset: int) -> None:
        with torch.no_grad():
            next(graph.part.parameters()).mul_(1.01)
        write(graph, wanted, path, opset)

    monkeypatch.setattr(export, "_write_graph", spoiled)
    with pytest.raises(GateFailed, match=r"text_encoder is off by \d"):
        export.export_onnx(random_pipeline, tmp_path / "out", components=("text_encoder",))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(random_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("no translation for aten::frobnicate")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(ExportError, match="frobnicate"):
        export.export_onnx(random_pipeline, tmp_path / "out", components=("text_encoder",))
    assert list(tmp_path.iterdir()) == []


def test_an_unchecked_export_says_so(random_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "onnxruntime_missing", lambda: "gone")
    result = export.export_onnx(random_pipeline, tmp_path / "out", components=("text_encoder",))
    assert result.parity == {"text_encoder": None}
    assert "skipped" in result.manifest.figures["text_encoder"]["parity"]


def test_wrong_asks_are_refused_at_once(random_pipeline: Any, tmp_path: Path, fp16_small: Any) -> None:
    with pytest.raises(UsageError, match="vae_encoder"):
        export.export_onnx(random_pipeline, tmp_path / "out", components=("vae_encoder",))
    with pytest.raises(UsageError, match="bf16"):
        export.export_onnx(random_pipeline, tmp_path / "out", precision="bf16")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="ONNX folder"):
        export.build_engines(tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="multiples of 64 px"):
        export.build_engines(fp16_small.folder, tmp_path / "out", size_px=(64, 100, 128), flavour="tensorrt-rtx")
    assert list(tmp_path.iterdir()) == []


def test_relative_l2_sees_a_scaled_output_and_nan() -> None:
    truth = {"a": torch.ones(4), "b": torch.ones(4)}
    assert export.relative_l2({"a": torch.ones(4), "b": torch.full((4,), 1.5)}, truth) == pytest.approx(0.5)
    assert export.relative_l2({"a": torch.full((4,), torch.nan), "b": torch.ones(4)}, truth) == float("inf")


def test_the_command_asks_for_tensorrt_before_it_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(cli_export.command, ["no-such-model", "-o", str(tmp_path / "out"), "--trt"])
    assert isinstance(result.exception, BackendMissing)
    assert "pip install" in str(result.exception)


def test_the_command_refuses_a_full_folder_before_it_loads(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    result = CliRunner().invoke(cli_export.command, ["no-such-model", "-o", str(tmp_path)])
    assert isinstance(result.exception, ArtifactError)
    assert (tmp_path / "kept").read_text() == "x"


def test_the_command_offers_every_component() -> None:
    assert cli_export.COMPONENTS == export.COMPONENTS


def test_the_command_ends_in_a_card(random_pipeline: Any, tmp_path: Path) -> None:
    random_pipeline.save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(cli_export.command, [str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--component", "text_encoder"])
    assert result.exception is None, result.exception
    assert "text_encoder.onnx" in result.output
    assert "relative L2" in result.output
    assert "next: sdcompress generate" in result.output


def test_a_students_equal_components_are_taken_over_and_its_own_are_not(random_pipeline: Any, fp16_small: Any, tmp_path: Path) -> None:
    vae = copy.deepcopy(random_pipeline.vae)
    with torch.no_grad():
        next(vae.decoder.parameters()).mul_(1.5)
    changed = type(random_pipeline)(**(random_pipeline.components | {"vae": vae, "requires_safety_checker": False}))
    result = export.export_onnx(changed, tmp_path / "out", precision="fp16", components=("text_encoder", "vae_decoder"), reuse=fp16_small.folder)
    same = {name: (tmp_path / "out" / f"{name}.onnx").read_bytes() == (fp16_small.folder / f"{name}.onnx").read_bytes() for name in ("text_encoder", "vae_decoder")}
    assert same == {"text_encoder": True, "vae_decoder": False}
    assert result.parity["text_encoder"] == fp16_small.parity["text_encoder"]
    assert faults(tmp_path / "out", "onnx") == []
