"""LoRAs go into an open pipeline on every backend as if they were fused, and out again without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sdcompress_engines.errors import EngineError, ModelError, SdCompressError, UsageError
from sdcompress_engines.exactness import FP32_LIMIT, relative_l2
from sdcompress_engines.progress import Reporter

from sdcompress.backends.assemble import close_pipeline, open_pipeline
from sdcompress.lora import pipeline_loras
from sdcompress.lora.apply import apply_loras
from sdcompress.lora.fuse import shapes_of
from sdcompress.lora.model_lora import UNET_ENTRY, WHOLE, read_model_lora
from sdcompress.models.load import load_pipeline
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student

from .adapter_cases import Draw, dora, lokr_whole, lora

Q, CONV = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.1.resnets.2.conv1"
UP, MID = "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v", "mid_block.attentions.0.proj_in"
TEXT = "text_model.encoder.layers.1.mlp.fc1"


def write_file(
    path: Path, pipeline: Any, layers: Sequence[str], make: Any = lora, seed: int = 0, **entries: str
) -> Path:
    """Write an adapter of the given kind for these layers of a pipeline, in kohya's naming."""
    draw, tensors = Draw(seed), {}
    for layer in layers:
        is_text = layer.startswith("text_model")
        network = pipeline.text_encoder if is_text else pipeline.unet
        module = network.get_submodule(layer.removeprefix("text_model.") if is_text else layer)
        prefix = f"lora_{'te' if is_text else 'unet'}_{layer.replace('.', '_')}"
        case = make(tuple(module.weight.shape), draw)
        tensors |= {f"{prefix}.{end}": value.contiguous() for end, value in case.tensors.items()}
    save_file(tensors, path, metadata=entries)
    return path


def make_dora(shape: tuple[int, ...], draw: Draw) -> Any:
    return dora(lora(shape, draw), shape, draw)


@torch.no_grad()
def draw(pipeline: Any) -> torch.Tensor:
    """Returns the latents of a prompt after three steps, and so what text encoder and UNet compute."""
    latents: torch.Tensor = pipeline(
        "a red cup", num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0)
    ).images
    return latents


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def opened(request: pytest.FixtureRequest, random_folder: Path) -> Iterator[Any]:
    """Yields the random pipeline in torch, and as graphs in ONNX Runtime."""
    model = random_folder if request.param == "torch" else request.getfixturevalue("fp32_export").folder
    pipeline = open_pipeline(model, request.param, device="cpu")
    yield pipeline
    close_pipeline(pipeline)


@pytest.fixture
def pipeline(opened: Any) -> Any:
    """Returns an open pipeline without LoRAs, on each backend in turn."""
    opened.set_loras([])
    return opened


@pytest.fixture
def fused(random_pipeline: Any) -> Callable[..., torch.Tensor]:
    """Returns a function: LoRAs → what torch draws with them fused into the weights."""

    def draw_fused(*loras: tuple[Path, float]) -> torch.Tensor:
        parts = {name: copy.deepcopy(getattr(random_pipeline, name)) for name in ("unet", "text_encoder")}
        changed = type(random_pipeline)(**(random_pipeline.components | parts), requires_safety_checker=False)
        changed.set_progress_bar_config(disable=True)
        apply_loras(changed, loras)
        return draw(changed)

    return draw_fused


def test_a_lora_of_unet_and_text_encoder_computes_what_torch_does_with_it_fused(
    pipeline: Any, fused: Any, random_pipeline: Any, tmp_path: Path
) -> None:
    file = write_file(tmp_path / "style.safetensors", random_pipeline, [Q, CONV, TEXT])
    pipeline.set_loras([(file, 0.8)])
    assert relative_l2(draw(pipeline), fused((file, 0.8))) < FP32_LIMIT
    assert relative_l2(draw(pipeline), fused()) > 10 * FP32_LIMIT


def test_several_kinds_are_added_one_after_another(
    pipeline: Any, fused: Any, random_pipeline: Any, tmp_path: Path
) -> None:
    loras = [
        (write_file(tmp_path / "a.safetensors", random_pipeline, [Q, CONV], lora, 1), 0.7),
        (write_file(tmp_path / "b.safetensors", random_pipeline, [Q, UP], lokr_whole, 2), -0.5),
        (write_file(tmp_path / "c.safetensors", random_pipeline, [Q, CONV], make_dora, 3), 0.6),
    ]
    pipeline.set_loras(loras)
    assert relative_l2(draw(pipeline), fused(*loras)) < FP32_LIMIT
    pipeline.set_loras(loras[:1])
    assert relative_l2(draw(pipeline), fused(loras[0])) < FP32_LIMIT


def test_without_loras_the_pipeline_is_as_before_bit_equal(pipeline: Any, random_pipeline: Any, tmp_path: Path) -> None:
    before = draw(pipeline)
    file = write_file(tmp_path / "style.safetensors", random_pipeline, [Q, CONV, TEXT])
    pipeline.set_loras([(file, 0.8)])
    pipeline.set_loras([])
    assert torch.equal(draw(pipeline), before)
    pipeline.set_loras([(file, 0.0)])
    assert torch.equal(draw(pipeline), before)


def test_a_file_that_was_replaced_is_read_again(
    pipeline: Any, fused: Any, random_pipeline: Any, tmp_path: Path
) -> None:
    file = write_file(tmp_path / "style.safetensors", random_pipeline, [Q, CONV], seed=1)
    pipeline.set_loras([(file, 1.0)])
    write_file(file, random_pipeline, [Q, CONV, UP], seed=2)
    pipeline.set_loras([(file, 1.0)])
    assert relative_l2(draw(pipeline), fused((file, 1.0))) < FP32_LIMIT


def test_a_lora_that_is_in_the_pipeline_already_is_not_computed_again(
    pipeline: Any, random_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_file(tmp_path / "style.safetensors", random_pipeline, [Q])
    pipeline.set_loras([(file, 1.0)])
    monkeypatch.setattr(pipeline_loras, "add_layers", lambda *_: pytest.fail("it was computed again"))
    monkeypatch.setattr(pipeline_loras, "read_model_lora", lambda *_: pytest.fail("it was read again"))
    pipeline.set_loras([(file, 1.0)])


def other_family(path: Path, pipeline: Any) -> Path:
    return write_file(path, pipeline, [Q], lambda shape, draw: lora((shape[0], shape[1] + 8), draw))


def half_a_pair(path: Path, pipeline: Any) -> Path:
    save_file({f"lora_unet_{Q.replace('.', '_')}.lora_up.weight": torch.ones(48, 4)}, path)
    return path


def not_finite(path: Path, pipeline: Any) -> Path:
    key = f"lora_unet_{Q.replace('.', '_')}"
    save_file(
        {f"{key}.lora_up.weight": torch.full((48, 4), torch.nan), f"{key}.lora_down.weight": torch.ones(4, 48)}, path
    )
    return path


def unknown_keys(path: Path, pipeline: Any) -> Path:
    save_file({f"lora_unet_nowhere_{number}.lora_up.weight": torch.ones(1) for number in range(10_000)}, path)
    return path


def pickle_file(path: Path, pipeline: Any) -> Path:
    path.write_bytes(b"\x80\x04\x95cposix\nsystem\n(S'true'\ntR.")
    return path


def absent(path: Path, pipeline: Any) -> Path:
    return path


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (other_family, ModelError, "fits a layer of"),
        (half_a_pair, ModelError, "1 of 1 layers that cannot be used"),
        (not_finite, ModelError, "not finite"),
        (unknown_keys, ModelError, "names of another kind|belong to no layer"),
        (pickle_file, ModelError, "pickle|safetensors|damaged|weights"),
        (absent, UsageError, "does not exist"),
    ],
)
def test_a_lora_that_cannot_be_used_is_one_line_and_the_pipeline_is_without_loras(
    pipeline: Any,
    random_pipeline: Any,
    tmp_path: Path,
    make: Callable[[Path, Any], Path],
    error: type[SdCompressError],
    named: str,
) -> None:
    before = draw(pipeline)
    good = write_file(tmp_path / "good.safetensors", random_pipeline, [CONV, TEXT])
    pipeline.set_loras([(good, 1.0)])
    bad = make(tmp_path / "bad.safetensors", random_pipeline)
    with pytest.raises(error, match=named) as caught:
        pipeline.set_loras([(good, 1.0), (bad, 1.0)])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert torch.equal(draw(pipeline), before)


class Lines(Reporter):
    """Keeps the lines that it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def show_line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def student_folder(random_pipeline: Any, tmp_path: Path) -> Path:
    """A student of the random pipeline, with its plan beside its UNet."""
    plan = make_plan(dict(random_pipeline.unet.config), "bk-tiny")
    parts = {"unet": build_student(random_pipeline.unet, plan).eval(), "requires_safety_checker": False}
    folder = tmp_path / "student"
    type(random_pipeline)(**(random_pipeline.components | parts)).save_pretrained(folder)
    (folder / "unet" / "plan.json").write_text(plan.to_json())
    return folder


def test_a_lora_of_the_whole_model_goes_onto_its_student_and_that_is_said(
    student_folder: Path, random_pipeline: Any, tmp_path: Path
) -> None:
    file = write_file(tmp_path / "style.safetensors", random_pipeline, [Q, UP, MID])
    report = Lines()
    pipeline: Any = open_pipeline(student_folder, device="cpu", report=report)
    pipeline.set_loras([(file, 1.0)])
    assert ["2 of its 3 layers" in line and "of its change by norm" in line for line in report.lines] == [True]
    teacher = copy.deepcopy(random_pipeline)
    apply_loras(teacher, [(file, 1.0)])
    student = build_student(teacher.unet, make_plan(dict(teacher.unet.config), "bk-tiny"))
    for name, weight in student.named_parameters():
        torch.testing.assert_close(pipeline.unet.get_parameter(name), weight, msg=name)


@pytest.mark.parametrize("entries", [{}, {UNET_ENTRY: "bk-tiny"}])
def test_a_students_own_lora_stays_as_it_is(student_folder: Path, tmp_path: Path, entries: dict[str, str]) -> None:
    loaded = load_pipeline(student_folder)
    own = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v"
    file = write_file(tmp_path / "own.safetensors", loaded.pipeline, [own, "up_blocks.0.resnets.1.conv1"], **entries)
    found = read_model_lora(file, {"unet": shapes_of(loaded.pipeline.unet)}, loaded.plan)
    assert found.kept_norm is None
    assert {name for _, name in found.layers} == {own, "up_blocks.0.resnets.1.conv1"}


def test_the_header_decides_where_the_names_could_be_either(student_folder: Path, tmp_path: Path) -> None:
    loaded = load_pipeline(student_folder)
    file = write_file(tmp_path / "whole.safetensors", loaded.pipeline, [Q], **{UNET_ENTRY: WHOLE})
    assert read_model_lora(file, {"unet": shapes_of(loaded.pipeline.unet)}, loaded.plan).kept_norm == 1.0


def test_a_lora_of_removed_blocks_alone_is_refused(student_folder: Path, random_pipeline: Any, tmp_path: Path) -> None:
    file = write_file(tmp_path / "mid.safetensors", random_pipeline, [MID])
    pipeline: Any = open_pipeline(student_folder, device="cpu")
    with pytest.raises(ModelError, match="changes only blocks that bk-tiny removes"):
        pipeline.set_loras([(file, 1.0)])


def test_a_few_step_lora_sets_how_the_model_is_sampled_and_none_sets_it_back(
    random_folder: Path, random_pipeline: Any, tmp_path: Path
) -> None:
    from sdcompress.families.sampling_defaults import sampling_defaults, set_defaults
    from sdcompress.lora.sampling import describe_sampling

    few: Any = open_pipeline(random_folder, device="cpu")
    before = few.scheduler, sampling_defaults(few)
    trained: Any = copy.deepcopy(random_pipeline)
    set_defaults(trained, 4, 1.0)
    file = write_file(tmp_path / "few.safetensors", random_pipeline, [Q], **describe_sampling(trained))
    few.set_loras([(file, 1.0)])
    assert sampling_defaults(few).num_inference_steps == 4
    few.set_loras([])
    assert (few.scheduler, sampling_defaults(few)) == before


def test_a_size_that_the_engine_does_not_take_is_drawn_in_torch_with_the_lora(
    fp32_export: Any, random_pipeline: Any, tmp_path: Path, fused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdcompress_engines.errors import EngineMismatch
    from sdcompress_engines.runners import OnnxRuntimeRunner

    from sdcompress.backends.exported import open_exported

    pipeline: Any = open_exported(fp32_export.folder, "cpu", make_unet=lambda: copy.deepcopy(random_pipeline.unet))
    file = write_file(tmp_path / "style.safetensors", random_pipeline, [Q, CONV])
    pipeline.set_loras([(file, 1.0)])
    genuine = OnnxRuntimeRunner.infer

    def refuse(self: Any, feeds: Any) -> Any:
        if "sample" in feeds:
            raise EngineMismatch("no such shape")
        return genuine(self, feeds)

    monkeypatch.setattr(OnnxRuntimeRunner, "infer", refuse)
    assert relative_l2(draw(pipeline), fused((file, 1.0))) < FP32_LIMIT
    pipeline.set_loras([])
    assert relative_l2(draw(pipeline), fused()) < FP32_LIMIT
    monkeypatch.undo()
    close_pipeline(pipeline)


def test_graphs_with_fixed_weights_take_no_lora(
    fp32_export: Any, random_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdcompress_engines.runners import Runner

    monkeypatch.setattr(Runner, "_open_originals", lambda self: None)
    pipeline: Any = open_pipeline(fp32_export.folder, "onnxruntime", device="cpu")
    file = write_file(tmp_path / "style.safetensors", random_pipeline, [Q])
    with pytest.raises(EngineError, match="takes no LoRA"):
        pipeline.set_loras([(file, 1.0)])
    close_pipeline(pipeline)


def test_a_lora_of_another_student_is_refused(student_folder: Path, random_pipeline: Any, tmp_path: Path) -> None:
    file = write_file(tmp_path / "other.safetensors", random_pipeline, [Q, UP], **{UNET_ENTRY: "bk-base"})
    pipeline: Any = open_pipeline(student_folder, device="cpu")
    with pytest.raises(ModelError, match=r"was trained on a student of the plan bk-base.*or for bk-tiny"):
        pipeline.set_loras([(file, 1.0)])
