"""An export is compared with torch and complete, leaves the pipeline unchanged, and leaves nothing when it fails."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from sdcompress_engines.errors import ArtifactError, BackendMissing, ExportError, GateFailed, ModelError, UsageError
from sdcompress_engines.exactness import largest_relative_l2, relative_l2
from sdcompress_engines.manifest import faults, read_manifest
from sdcompress_engines.runners import open_runner
from sdcompress_engines.signature import COMPONENTS

from sdcompress.cli import _export_options as export_options
from sdcompress.cli import export as cli_export
from sdcompress.export import onnx as onnx_export
from sdcompress.export import onnx_component
from sdcompress.export import tensorrt as engines
from sdcompress.export.onnx import ExportResult, export_onnx

from .conftest import Exports, with_parts


@pytest.fixture(scope="module")
def fp32_graphs(small_exports: Exports) -> ExportResult:
    return small_exports()


@pytest.fixture(scope="module")
def fp16_graphs(small_exports: Exports) -> ExportResult:
    return small_exports(precision="fp16")


@pytest.mark.parametrize("tokens", [77, 154])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_agrees_with_torch(
    small_pipeline: Any, fp32_graphs: ExportResult, batch: int, size: tuple[int, int], tokens: int
) -> None:
    torch.manual_seed(batch)
    sample, context = torch.randn(batch, 4, *size), torch.randn(batch, tokens, 96)
    times = torch.linspace(3, 990, batch)
    with torch.no_grad():
        expected = {"out_sample": small_pipeline.unet(sample, times, context).sample}
    with open_runner(fp32_graphs.folder / "unet.onnx") as runner:
        outputs = runner.infer({"sample": sample, "timestep": times, "encoder_hidden_states": context})
    assert largest_relative_l2(outputs, expected) < 1e-4
    with torch.no_grad():
        expected = {"sample": small_pipeline.vae.decode(sample).sample}
    with open_runner(fp32_graphs.folder / "vae_decoder.onnx") as runner:
        assert largest_relative_l2(runner.infer({"latent_sample": sample}), expected) < 1e-4


def test_the_folder_is_whole_and_its_manifest_has_the_parity(fp32_graphs: ExportResult) -> None:
    assert faults(fp32_graphs.folder, "onnx") == []
    manifest = fp32_graphs.manifest
    components = ["unet", "text_encoder", "vae_decoder"]
    assert (
        manifest.config.items()
        >= {
            "precision": "fp32",
            "opset": 23,
            "signature": "diffusers",
            "components": components,
            "precisions": dict.fromkeys(components, "fp32"),
        }.items()
    )
    assert manifest.inputs == {"pipeline": "0" * 64}
    assert all(0 < manifest.figures[component]["parity"]["relative_l2"] < 1e-4 for component in components)
    assert manifest.figures["unet"]["parity"]["cases"] == 5


def test_the_folder_alone_holds_what_a_pipeline_needs(fp32_graphs: ExportResult, small_pipeline: Any) -> None:
    from diffusers import PNDMScheduler
    from transformers import CLIPTokenizer

    small = fp32_graphs.folder / "pipeline"
    assert (
        CLIPTokenizer.from_pretrained(small / "tokenizer")("a cat").input_ids
        == small_pipeline.tokenizer("a cat").input_ids
    )
    assert PNDMScheduler.from_pretrained(small / "scheduler").config.beta_end == 0.012
    assert {p.parent.name for p in small.rglob("config.json")} == {"unet", "vae", "text_encoder"}
    assert not list(small.rglob("*.safetensors"))
    assert str(Path.home()) not in (fp32_graphs.folder / "unet.onnx").read_bytes().decode("latin-1")


def test_graphs_keep_attention_and_group_normalization_whole(fp32_graphs: ExportResult, small_pipeline: Any) -> None:
    operators = [node.op_type for node in onnx.load(fp32_graphs.folder / "unet.onnx").graph.node]
    modules = [type(module).__name__ for module in small_pipeline.unet.modules()]
    assert operators.count("Attention") == modules.count("Attention") > 0
    assert operators.count("GroupNormalization") == modules.count("GroupNorm") > 0


def test_fp16_graphs_are_fp16_and_within_twice_torch(fp16_graphs: ExportResult) -> None:
    for component, parity in fp16_graphs.parity.items():
        assert parity is not None
        assert (parity.torch_relative_l2 or 0) > 1e-5, component
        assert parity.share_of_limit <= 1
    with open_runner(fp16_graphs.folder / "vae_decoder.onnx") as runner:
        assert runner.inputs[0].dtype == runner.outputs[0].dtype == torch.float16


def test_the_pipeline_is_unchanged(small_pipeline: Any, tmp_path: Path) -> None:
    text = small_pipeline.text_encoder
    before = copy.deepcopy(text.state_dict())
    text.train()
    try:
        export_onnx(small_pipeline, tmp_path / "out", precision="fp16", components=("text_encoder",))
        assert text.training
    finally:
        text.eval()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in text.parameters())
    assert all(torch.equal(value, before[name]) for name, value in text.state_dict().items())


@pytest.fixture
def spoiled_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first weight of every exported component is 1% too large."""
    write = onnx_component.write_onnx

    def write_spoiled(graph: Any, *arguments: Any) -> None:
        weight = next(graph.part.parameters())
        weight.data = weight.data * 1.01  # a tensor of its own: the graph shares the pipeline's
        write(graph, *arguments)

    monkeypatch.setattr(onnx_component, "write_onnx", write_spoiled)


@pytest.mark.usefixtures("spoiled_export")
def test_a_graph_too_far_from_torch_leaves_nothing_and_its_first_wrong_layer_is_named(
    small_pipeline: Any, tmp_path: Path
) -> None:
    first = r"first at Gather node_embedding \(relative L2 1\.0e-02\)"
    with pytest.raises(GateFailed, match=rf"text_encoder is off by \d.*, {first}"):
        export_onnx(small_pipeline, tmp_path / "out", components=("text_encoder",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("spoiled_export")
def test_a_failed_graph_is_kept_on_request_even_if_the_search_for_its_layer_fails(
    small_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("polygraphy is broken")

    monkeypatch.setattr(onnx_export, "find_first_layer", fail)
    with pytest.raises(GateFailed, match=r"text_encoder is off by [\d.e-]+; expected .*kept in .*out\.failed"):
        export_onnx(small_pipeline, tmp_path / "out", components=("text_encoder",), keep_failed=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]
    assert faults(tmp_path / "out.failed", "onnx") == []


def test_a_failed_export_leaves_nothing(small_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("no translation for aten::frobnicate")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(ExportError, match="frobnicate"):
        export_onnx(small_pipeline, tmp_path / "out", components=("text_encoder",))
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_of_an_unchecked_export_has_the_reason(
    small_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_component, "onnxruntime_missing", lambda: "gone")
    result = export_onnx(small_pipeline, tmp_path / "out", components=("text_encoder",))
    assert result.parity == {"text_encoder": None}
    assert "skipped" in result.manifest.figures["text_encoder"]["parity"]


def test_wrong_requests_are_refused_at_once(small_pipeline: Any, tmp_path: Path, fp16_graphs: ExportResult) -> None:
    with pytest.raises(UsageError, match="no component vae_something"):
        export_onnx(small_pipeline, tmp_path / "out", components=("vae_something",))
    with pytest.raises(UsageError, match="text_encoder with the signature webui, which runs its own"):
        export_onnx(small_pipeline, tmp_path / "out", components=("text_encoder",), host="webui")
    with pytest.raises(UsageError, match="no signature 'forge'"):
        export_onnx(small_pipeline, tmp_path / "out", components=("unet",), host="forge")
    with pytest.raises(UsageError, match="fp12"):
        export_onnx(small_pipeline, tmp_path / "out", precision="fp12")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no text_encoder_2"):
        export_onnx(small_pipeline, tmp_path / "out", components=("text_encoder_2",))
    with pytest.raises(ArtifactError, match="has no sdcompress"):
        engines.build_engines(tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="multiples of 4"):
        engines.build_engines(
            fp16_graphs.folder, tmp_path / "out", profiles=("height=64:98:128",), flavour="tensorrt-rtx"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_graph_is_refused_before_a_build(fp16_graphs: ExportResult, tmp_path: Path) -> None:
    shutil.copytree(fp16_graphs.folder, tmp_path / "onnx")
    with (tmp_path / "onnx" / "text_encoder.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    with pytest.raises(ArtifactError, match=r"text_encoder\.onnx is not what the manifest says"):
        engines.build_engines(tmp_path / "onnx", tmp_path / "out", flavour="tensorrt-rtx")
    assert not (tmp_path / "out").exists()


def test_relative_l2_sees_a_scaled_output_and_nan() -> None:
    truth = {"a": torch.ones(4), "b": torch.ones(4)}
    assert largest_relative_l2({"a": torch.ones(4), "b": torch.full((4,), 1.5)}, truth) == pytest.approx(0.5)
    assert largest_relative_l2({"a": torch.full((4,), torch.nan), "b": torch.ones(4)}, truth) == float("inf")


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
    assert export_options.COMPONENTS == COMPONENTS


def test_the_command_ends_in_a_card(small_folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli_export.command, [str(small_folder), "-o", str(tmp_path / "out"), "--component", "text_encoder"]
    )
    assert result.exception is None, result.exception
    assert "text_encoder.onnx" in result.output
    assert "relative L2" in result.output
    assert "next: sdcompress inspect" in result.output  # no pipeline draws with one component


def test_a_students_equal_components_are_taken_over_and_its_own_are_not(
    small_pipeline: Any, fp16_graphs: ExportResult, tmp_path: Path
) -> None:
    vae = copy.deepcopy(small_pipeline.vae)
    with torch.no_grad():
        next(vae.decoder.parameters()).mul_(1.5)
    student = with_parts(small_pipeline, vae=vae)
    components = ("text_encoder", "vae_decoder")
    result = export_onnx(student, tmp_path / "out", precision="fp16", components=components, reuse=fp16_graphs.folder)
    same = {
        name: (tmp_path / "out" / f"{name}.onnx").read_bytes() == (fp16_graphs.folder / f"{name}.onnx").read_bytes()
        for name in components
    }
    assert same == {"text_encoder": True, "vae_decoder": False}
    assert result.parity["text_encoder"] == fp16_graphs.parity["text_encoder"]
    assert faults(tmp_path / "out", "onnx") == []


@pytest.mark.parametrize("component", ["text_encoder", "vae_encoder"])
def test_bfloat16_graphs_are_bfloat16_and_within_twice_torch(small_exports: Exports, component: str) -> None:
    result = small_exports(precision="bf16", components=(component,))
    parity = result.parity[component]
    assert parity is not None
    assert 1e-3 < parity.relative_l2 <= 2 * (parity.torch_relative_l2 or 0)
    graph = onnx.load(result.folder / f"{component}.onnx").graph
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    weights = [] if component.startswith("vae") else [f"{component}.onnx.safetensors"]
    assert {path.name for path in result.folder.iterdir()} == {
        f"{component}.onnx",
        *weights,
        "pipeline",
        "sdcompress.json",
    }


@pytest.mark.parametrize(
    ("host", "inputs", "output"),
    [
        ("webui", ["sample", "timesteps", "encoder_hidden_states"], "latent"),
        ("comfyui", ["x", "timesteps", "context"], "h"),
    ],
)
def test_a_unet_has_its_hosts_names_in_order_and_answers_as_torch(
    small_pipeline: Any, small_exports: Exports, host: str, inputs: list[str], output: str
) -> None:
    result = small_exports(host=host)
    assert list(result.parity) == ["unet"]
    feeds = [torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.5]), torch.randn(2, 77, 96)]
    with open_runner(result.folder / "unet.onnx") as runner:
        assert [spec.name for spec in runner.inputs] == inputs
        assert [spec.name for spec in runner.outputs] == [output]
        assert [spec.dtype for spec in runner.inputs] == [torch.float32] * 3
        prediction = runner.infer(dict(zip(inputs, feeds, strict=True)))[output]
    with torch.no_grad():
        expected = small_pipeline.unet(*feeds).sample
    assert relative_l2(prediction, expected) < 1e-4


def test_in_half_precision_the_time_embedding_stays_exact(fp16_graphs: ExportResult) -> None:
    """999 and 999.25 are one number in fp16; the graph distinguishes them."""
    parity = fp16_graphs.parity["unet"]
    assert parity is not None
    assert parity.relative_l2 < (parity.torch_relative_l2 or 0)
    sample, context = torch.randn(1, 4, 16, 16).half(), torch.randn(1, 77, 96).half()
    with open_runner(fp16_graphs.folder / "unet.onnx") as runner:
        assert [spec.dtype for spec in runner.inputs] == [torch.float16, torch.float32, torch.float16]
        predictions = [
            runner.infer({"sample": sample, "timestep": torch.tensor([t]), "encoder_hidden_states": context})
            for t in (999.0, 999.25)
        ]
    assert not torch.equal(*(each["out_sample"] for each in predictions))


def test_a_lora_is_baked_into_the_graph(small_pipeline: Any, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    from sdcompress.lora.adapters import LowRank
    from sdcompress.lora.files import write_lora

    torch.manual_seed(3)
    plain_unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=96,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()
    with_parts(small_pipeline, unet=plain_unet).save_pretrained(tmp_path / "model")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = plain_unet.get_submodule(name)
    down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    file = tmp_path / "style.safetensors"
    write_lora({("unet", name): LowRank(down, up, 2.0)}, file, "kohya")
    arguments = [str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--component", "unet", "--lora", f"{file}:0.5"]
    result = CliRunner().invoke(cli_export.command, arguments)
    assert result.exception is None, result.exception
    feeds = [torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 77, 96)]
    styled = copy.deepcopy(plain_unet)
    with torch.no_grad():
        styled.get_submodule(name).weight += 0.5 * up @ down
        expected, plain = (unet(*feeds).sample for unet in (styled, plain_unet))
    with open_runner(tmp_path / "out" / "unet.onnx") as runner:
        prediction = runner.infer(dict(zip(("sample", "timestep", "encoder_hidden_states"), feeds, strict=True)))
    assert relative_l2(prediction["out_sample"], expected) < 1e-4
    assert relative_l2(plain, expected) > 1e-3
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert "lora style.safetensors:0.5" in manifest.inputs
