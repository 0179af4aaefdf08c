"""The WebUI extension in a host written from A1111's and Forge's contracts, on real graphs in ONNX Runtime, held
against diffusers.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import ArtifactError, EngineError, EngineMismatch, UsageError
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.flavour import TENSORRT_RTX, platform_name
from sdcompress_engines.manifest import MANIFEST_NAME, read_manifest, save_manifest, write_manifest
from sdcompress_engines.profiles import ShapeRanges, component_profile
from sdcompress_engines.engine_key import EngineKey
from sdcompress_webui.calls import Plan, plan_call
from sdcompress_webui.library import PREFIX, Artifact, Label, Model, Traits, Unreadable, find, is_whole, models
from sdcompress_webui.panel import build_command
from sdcompress_webui.torch_unet import TorchUNet
from sdcompress_webui.unet import HostedUNet, Settings
from sdcompress_webui.weights import find_weights, ldm_names, read_safetensors, read_unet

from sdcompress.checkpoints.ldm_keys import unet_keys
from sdcompress.prune.plan import make_plan

from .conftest import WEBUI_PLUGIN, change_manifest
from .webui_host import Guidance, Patcher, WebUI, Widget, euler, reference, running, schedule

ROUNDING = 2e-5
TITLE = f"{PREFIX}tiny (onnxruntime fp32)"


def words(seed: int, tokens: int = 77, width: int = 96) -> torch.Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


def noise(height: int = 16, width: int = 16, pictures: int = 1) -> torch.Tensor:
    return torch.randn(pictures, 4, height, width, generator=torch.Generator().manual_seed(3)) * schedule(4)[0]


@pytest.fixture(scope="module")
def tiny_graph(export_unet: Callable[..., Path], student: Any) -> Path:
    return export_unet("webui", student, "tiny")


@pytest.fixture(scope="module")
def whole_graph(export_unet: Callable[..., Path], random_pipeline: Any) -> Path:
    return export_unet("webui", random_pipeline, "teacher")


@pytest.fixture
def installed(tmp_path: Path, tiny_graph: Path) -> Path:
    """A WebUI's folder, its name with a space and letters beyond ASCII, with the student's graph in it and the
    student's weights beside.
    """
    root = tmp_path / "Web UI – größer"
    shutil.copytree(tiny_graph, root / "models" / "sdcompress" / "tiny")
    return root


def add_weights(folder: Path, unet: Any) -> None:
    from safetensors.torch import save_file

    save_file(
        {key: value.contiguous() for key, value in unet.state_dict().items()},
        folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors",
    )


@pytest.fixture
def webui(installed: Path, random_pipeline: Any) -> Iterator[WebUI]:
    """A1111 with the teacher as its checkpoint, and the extension loaded."""
    with running(WebUI(installed, random_pipeline.unet)) as host:
        host.load_extension(WEBUI_PLUGIN)
        yield host


def sample(
    webui: WebUI, *, cond: torch.Tensor, uncond: torch.Tensor, x: torch.Tensor | None = None, steps: int = 4, **how: Any
) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
    guidance = Guidance(webui.predict, **how)
    with webui.job() as job:
        x = noise() if x is None else x
        latents = euler(guidance, x, schedule(steps), cond.expand(len(x), -1, -1), uncond.expand(len(x), -1, -1))
    return latents, guidance.steps, job


def expected(
    unet: Any, *, cond: torch.Tensor, uncond: torch.Tensor, x: torch.Tensor | None = None, steps: int = 4, **how: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    guidance = Guidance(reference(unet), **how)
    x = noise() if x is None else x
    return (
        euler(guidance, x, schedule(steps), cond.expand(len(x), -1, -1), uncond.expand(len(x), -1, -1)),
        guidance.steps,
    )


# --- the pictures


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("cond_tokens", "uncond_tokens"), [(77, 77), (154, 154), (154, 77)])
def test_every_step_through_the_plugin_is_the_students_own(
    webui: WebUI, student_unet: Any, random_pipeline: Any, together: bool, cond_tokens: int, uncond_tokens: int
) -> None:
    asked = {"cond": words(1, cond_tokens), "uncond": words(2, uncond_tokens), "together": together}
    webui.opts.sd_unet = TITLE
    latents, steps, job = sample(webui, **asked)
    wanted, wanted_steps = expected(student_unet, **asked)
    assert len(steps) == 4
    assert max(relative_l2(step, other) for step, other in zip(steps, wanted_steps, strict=True)) < ROUNDING
    assert relative_l2(latents, wanted) < ROUNDING
    assert relative_l2(latents, expected(random_pipeline.unet, **asked)[0]) > 0.05  # not the checkpoint's
    assert job.extra_generation_params == {"sdcompress": TITLE}
    assert not webui.errors


def test_guidance_may_leave_the_negative_prompt_out(webui: WebUI, student_unet: Any) -> None:
    asked = {"cond": words(1), "uncond": words(2), "skip_uncond": lambda step: step % 2 == 1}
    webui.opts.sd_unet = TITLE
    assert relative_l2(sample(webui, **asked)[0], expected(student_unet, **asked)[0]) < ROUNDING


def test_hires_fix_goes_through_two_sizes(webui: WebUI, student_unet: Any) -> None:
    asked = {"cond": words(1), "uncond": words(2), "steps": 2}
    webui.opts.sd_unet = TITLE

    def enlarge(latents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latents, scale_factor=2.0) + noise(32, 32) * 0.3

    found = sample(webui, x=enlarge(sample(webui, **asked)[0]), **asked)[0]
    assert found.shape[-2:] == (32, 32)
    assert (
        relative_l2(found, expected(student_unet, x=enlarge(expected(student_unet, **asked)[0]), **asked)[0]) < ROUNDING
    )


def test_other_dtypes_come_back_as_they_came(webui: WebUI, student_unet: Any) -> None:
    webui.opts.sd_unet = TITLE
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 96)
    with webui.job():
        out = webui.predict(x.half(), torch.tensor([500.0, 3.5]).half(), context.half())
    assert out.dtype is torch.float16
    assert (
        relative_l2(
            out.float(), reference(student_unet)(x.half().float(), torch.tensor([500.0, 3.5]), context.half().float())
        )
        < 1e-3
    )


def test_none_is_the_checkpoints_own_unet_again(webui: WebUI, random_pipeline: Any) -> None:
    asked = {"cond": words(1), "uncond": words(2), "steps": 2}
    webui.opts.sd_unet = TITLE
    sample(webui, **asked)
    webui.opts.sd_unet = "None"
    assert torch.equal(sample(webui, **asked)[0], expected(random_pipeline.unet, **asked)[0])


def test_deactivating_closes_what_is_open(webui: WebUI) -> None:
    webui.opts.sd_unet = TITLE
    sample(webui, cond=words(1), uncond=words(2), steps=1)
    hosted = webui.sd_unet.current_unet.hosted
    runner = next(iter(hosted._runners.values()))
    webui.opts.sd_unet = "None"
    webui.apply_unet()
    assert not hosted._runners
    with pytest.raises(EngineError, match="not open"):
        runner.infer({})


def test_sdxl_takes_its_added_vector(tmp_path: Path, export_unet: Callable[..., Path], xl: Any) -> None:
    shutil.copytree(export_unet("webui", xl, "xl"), tmp_path / "models" / "sdcompress" / "xl")
    x, context, y, times = (
        torch.randn(2, 4, 16, 24),
        torch.randn(2, 77, 64),
        torch.randn(2, 80),
        torch.tensor([900.0, 10.0]),
    )
    with running(WebUI(tmp_path, xl.unet)) as host:
        host.load_extension(WEBUI_PLUGIN)
        host.opts.sd_unet = f"{PREFIX}xl (onnxruntime fp32)"
        with host.job():
            assert relative_l2(host.predict(x, times, context, y), reference(xl.unet)(x, times, context, y)) < ROUNDING
            with pytest.raises(EngineError, match="gives no y"):
                host.predict(x, times, context)


@pytest.fixture(scope="module")
def xl_unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(5)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=(2, 3, 4),
        use_linear_projection=True,
        norm_num_groups=16,
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    ).eval()


# --- several engines and profiles


class PlainHost:
    """A host without checkpoint, changes or page."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.said: list[str] = []
        self.asked: list[Any] = []
        self.loaded: tuple[Any, Traits] = (None, Traits())

    def checkpoint(self) -> tuple[Any, Traits]:
        return self.loaded

    def changes(self) -> list[Any]:
        return self.asked

    def warn(self, text: str) -> None:
        self.said.append(text)


def ranges(
    batch: tuple[int, int, int], px: tuple[int, int, int], tokens: tuple[int, int, int] = (77, 77, 77)
) -> dict[str, Any]:
    config = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 96, "block_out_channels": [1, 1, 1]}
    return dict(component_profile("unet", config, ShapeRanges(batch, px, px, tokens), 8, "webui").shapes)


def shapes(batch: int, px: int, tokens: int = 77) -> dict[str, tuple[int, ...]]:
    return {"sample": (batch, 4, px // 8, px // 8), "timesteps": (batch,), "encoder_hidden_states": (batch, tokens, 96)}


STATIC_512, WIDE, STATIC_1024 = (
    ranges((2, 2, 2), (512, 512, 512)),
    ranges((1, 2, 4), (256, 512, 768), (77, 77, 154)),
    ranges((1, 1, 1), (1024, 1024, 1024)),
)


@pytest.mark.parametrize(
    ("call", "plan"),
    [
        (shapes(2, 512), Plan(0, 2, 2)),  # the one tuned for it
        (shapes(2, 640), Plan(1, 2, 1)),
        (shapes(2, 1024), Plan(2, 1, 1)),  # cond and uncond apart
        (shapes(6, 640), Plan(1, 3, 1)),
        (shapes(2, 512, 154), Plan(1, 2, 1)),
        (shapes(2, 1088), None),
        (shapes(2, 512, 231), None),
    ],
)
def test_a_call_goes_to_the_profile_that_fits_it_best(call: dict[str, Any], plan: Plan | None) -> None:
    assert plan_call([STATIC_512, WIDE, STATIC_1024], call) == plan


def test_one_sample_fills_an_engine_that_is_built_for_two() -> None:
    plan = plan_call([STATIC_512], shapes(1, 512))
    assert plan == Plan(0, 1, 2)
    assert list(plan.parts(1)) == [(0, 1, 2)]
    three = plan_call([STATIC_512], shapes(3, 512))
    assert three is not None
    assert list(three.parts(3)) == [(0, 2, 2), (2, 3, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_covers_every_sample_once_within_its_profile(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def pick(*values: int) -> int:
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    profiles = []
    for _ in range(pick(1, 2, 3)):
        least = pick(1, 2)
        profiles.append(
            ranges(
                (least, least, least * pick(1, 2, 4)), (pick(256, 512), 512, pick(512, 1024)), (77, 77, 77 * pick(1, 2))
            )
        )
    call = shapes(pick(1, 2, 3, 5, 8), pick(256, 512, 768), 77 * pick(1, 2, 3))
    plan = plan_call(profiles, call)
    fits = [
        p
        for p in profiles
        if p["sample"][0][2] <= call["sample"][2] <= p["sample"][2][2]
        and any(
            p["encoder_hidden_states"][0][1] <= call["encoder_hidden_states"][1] * k <= p["encoder_hidden_states"][2][1]
            for k in (1, 2)
        )
    ]
    assert (plan is None) == (not fits)
    if plan is not None:
        parts = list(plan.parts(call["sample"][0]))
        assert [at for start, stop, _ in parts for at in range(start, stop)] == list(range(call["sample"][0]))
        least, most = profiles[plan.profile]["sample"][0][0], profiles[plan.profile]["sample"][2][0]
        assert all(least <= rows <= most and rows >= stop - start for start, stop, rows in parts)


def only(folder: Path, **changed: Any) -> Artifact:
    artifact = next(each for each in find(folder) if isinstance(each, Artifact))
    return replace(artifact, **changed)


def test_engines_of_one_model_share_calls_by_shape(installed: Path, student_unet: Any) -> None:
    root = installed / "models" / "sdcompress"
    shutil.copytree(root / "tiny", root / "tiny-large")
    small, large = (each for each in find(root) if isinstance(each, Artifact))
    small, large = (
        replace(small, profiles=(ranges((2, 2, 2), (128, 128, 128)),)),
        replace(large, profiles=(ranges((1, 1, 1), (256, 256, 256), (154, 154, 154)),)),
    )
    unet = HostedUNet(Model("both", (small, large)), PlainHost())
    unet.activate()
    assert not unet._runners  # each at its first call
    times = torch.tensor([700.0, 30.0])
    for px, tokens, opened in (
        (128, 77, [small.folder]),
        (256, 154, [small.folder, large.folder]),
        (256, 77, [small.folder, large.folder]),
    ):
        x, context = torch.randn(2, 4, px // 8, px // 8), torch.randn(2, tokens, 96)
        assert (
            relative_l2(unet.forward(x, times, context), reference(student_unet)(x, times, context)) < ROUNDING
        )  # apart, and with the context twice
        assert list(unet._runners) == opened
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 96)
    assert (
        relative_l2(unet.forward(x, times[:1], context), reference(student_unet)(x, times[:1], context)) < ROUNDING
    )  # filled up
    unet.deactivate()


def test_engines_of_one_model_are_one_entry(installed: Path, whole_graph: Path) -> None:
    root = installed / "models" / "sdcompress"
    shutil.copytree(root / "tiny", root / "tiny-2")
    shutil.copytree(whole_graph, root / "exported" / "onnx")  # the folder that export writes, as it is
    entries = models(find(root))
    assert [(entry.title, len(entry.usable)) for entry in entries] == [
        (f"{PREFIX}teacher (onnxruntime fp32)", 1),
        (TITLE, 2),
    ]


# --- what is refused


@pytest.fixture
def tiny(installed: Path) -> Artifact:
    return only(installed / "models" / "sdcompress")


def hosted(artifact: Artifact, fallback: str = "error", host: Any = None) -> HostedUNet:
    return HostedUNet(Model("tiny", (artifact,)), host or PlainHost(), lambda: Settings(fallback))


def call(unet: HostedUNet, *, px: int = 128, tokens: int = 77, batch: int = 2, **more: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return unet.forward(
        torch.randn(batch, 4, px // 8, px // 8, generator=draw),
        torch.full((batch,), 250.0),
        torch.randn(batch, tokens, 96, generator=draw),
        **more,
    )


def test_a_shape_without_engine_names_the_command_that_builds_one(tiny: Artifact) -> None:
    manifest = tiny.manifest
    config = {
        **manifest.config,
        "flavour": "tensorrt",
        "version": "10.14.1",
        "profiles": {"unet": [ranges((2, 2, 2), (128, 128, 128))]},
        "options": {"optimization_level": 4, "version_compatible": True},
    }
    built = replace(
        tiny,
        profiles=(ranges((2, 2, 2), (128, 128, 128)),),
        manifest=replace(
            manifest, kind="engine", config=config, inputs={**manifest.inputs, "lora style.safetensors:0.8": "0"}
        ),
    )
    unet = HostedUNet(Model("tiny", (replace(tiny, profiles=built.profiles),)), PlainHost())
    with pytest.raises(EngineMismatch, match=r"height 256 px.*tokens 154 is outside the engine's profile"):
        call(unet, px=256, tokens=154)
    assert (
        build_command(built.manifest, shapes(2, 256, 154))
        == "sdcompress export MODEL --trt --flavour tensorrt --profile"
        " batch=2,height=128:128:256,width=128:128:256,tokens=77:77:154 --optimization-level 4 --version-compatible"
        " --signature webui --precision fp32 --lora style.safetensors:0.8 -o DIR"
    )


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"tokens": 81}, "81 tokens"),
        ({"control": {"input": []}}, "ControlNet"),
        ({"transformer_options": {"patches_replace": {"attn2": {}}}}, "patches_replace"),
        ({"y": torch.zeros(2, 8)}, "gives also y"),
    ],
)
def test_what_an_engine_cannot_take_is_refused_whatever_the_settings(
    tiny: Artifact, more: dict[str, Any], named: str
) -> None:
    for fallback in ("error", "torch"):
        with pytest.raises(EngineError, match=named):
            call(hosted(tiny, fallback), **more)


def test_a_size_between_the_steps_names_its_neighbours(tiny: Artifact) -> None:
    with pytest.raises(EngineMismatch, match=r"height 136 px; expected a multiple of 32 px.*128 or 160"):
        hosted(tiny).forward(torch.randn(1, 4, 17, 16), torch.tensor([1.0]), torch.randn(1, 77, 96))


@pytest.mark.parametrize(
    ("loaded", "named"),
    [
        (Traits(768, 0, 4, "epsilon"), "width 96.*has 768.*SD1"),
        (Traits(96, 2816, 4, "epsilon"), "SDXL"),
        (Traits(96, 0, 9, "epsilon"), "channels: 4"),
        (Traits(96, 0, 4, "v_prediction"), "prediction type epsilon"),
    ],
)
def test_another_checkpoint_is_refused_when_the_engine_is_chosen_and_at_every_call(
    tiny: Artifact, loaded: Traits, named: str
) -> None:
    host = PlainHost()
    host.loaded = ("other", loaded)
    unet = hosted(tiny, "torch", host)
    for attempt in (unet.activate, lambda: call(unet)):
        with pytest.raises(EngineMismatch, match=named):
            attempt()
    host.loaded = ("fitting", replace(tiny.traits))
    call(unet)  # no restart is needed
    host.loaded = ("other", loaded)
    with pytest.raises(EngineMismatch, match=named):
        call(unet)


def test_a_checkpoint_kept_in_memory_is_checked_when_it_comes_back(webui: WebUI, xl_unet: Any) -> None:
    webui.opts.sd_unet = TITLE
    sample(webui, cond=words(1), uncond=words(2), steps=1)
    webui.load(xl_unet, name="xl")
    with pytest.raises(EngineMismatch, match="SDXL"), webui.job():
        webui.predict(torch.randn(2, 4, 16, 16), torch.ones(2), torch.randn(2, 77, 64), torch.randn(2, 80))


def break_graph(folder: Path) -> None:
    content = bytearray((folder / "unet.onnx").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / "unet.onnx").write_bytes(content)


def edit_manifest(folder: Path) -> None:
    text = (folder / MANIFEST_NAME).read_text()
    (folder / MANIFEST_NAME).write_text(text.replace('"fp32"', '"fp16"', 1))


def test_an_altered_graph_is_refused_before_a_runtime_sees_it(tiny: Artifact) -> None:
    break_graph(tiny.folder)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        hosted(tiny).activate()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "unet.onnx").unlink(), "unet.onnx is missing"),
        (lambda folder: (folder / "unet.onnx").write_bytes(b"cut"), "has 3 bytes"),
        (edit_manifest, "was edited"),
        (lambda folder: (folder / MANIFEST_NAME).write_text("{"), "broken manifest"),
        (lambda folder: (folder / MANIFEST_NAME).write_bytes(b"\xff\xfe"), "broken manifest|cannot be read"),
        (lambda folder: (folder / MANIFEST_NAME).unlink(), "nothing says what it was made for"),
        (lambda folder: change_manifest(folder, signature="diffusers"), "signature 'diffusers'; expected webui"),
        (lambda folder: change_manifest(folder, components=["vae_decoder"]), "holds no UNet"),
        (lambda folder: (folder / "pipeline/unet/config.json").unlink(), "config.json is missing"),
        (lambda folder: write_manifest(folder, "student"), "is a student"),
    ],
)
def test_a_folder_that_cannot_serve_is_listed_with_the_reason(
    installed: Path, whole_graph: Path, random_pipeline: Any, damage: Callable[[Path], Any], reason: str
) -> None:
    root = installed / "models" / "sdcompress"
    shutil.copytree(whole_graph, root / "sound")
    damage(root / "tiny")
    found = {each.folder.name: each for each in find(root)}
    assert isinstance(found["sound"], Artifact)
    assert isinstance(found["tiny"], Unreadable)
    with running(WebUI(installed, random_pipeline.unet)) as host:
        host.load_extension(WEBUI_PLUGIN)
        entry = next(label for label in host.list_unets() if " – cannot run: " in label)
        host.opts.sd_unet = str(entry)
        with pytest.raises(EngineMismatch, match=reason):
            host.apply_unet()
        with pytest.raises(EngineMismatch, match=reason), host.job():  # A1111 keeps a UNet whose activation failed
            host.predict(torch.randn(2, 4, 16, 16), torch.ones(2), torch.randn(2, 77, 96))
        assert escape(reason.split("|")[0].split(";")[0]) in host.tab() or "cannot be read" in host.tab()


def make_engine(folder: Path, graph: Path, **differing: Any) -> Path:
    """A folder as `sdcompress export --trt` writes it, but for what is in the engine file."""
    shutil.copytree(graph / "pipeline", folder / "pipeline")
    (folder / "unet.engine").write_bytes(b"engine" * 100)
    made = read_manifest(graph)
    assert made is not None
    version = "1.0" if TENSORRT_RTX.missing() else TENSORRT_RTX.version
    key = EngineKey(
        "a" * 64,
        "unet",
        "fp32",
        "webui",
        "tensorrt-rtx",
        version,
        ((8, 9),),
        platform_name(),
        (ranges((1, 2, 4), (128, 128, 256), (77, 77, 154)),),
    )
    key = replace(key, **differing)
    write_manifest(folder, "engine", config={**key.config(), "model_name": "tiny", "vae_scale": 8}, inputs=made.inputs)
    return folder


@pytest.mark.parametrize(
    ("differing", "reason"),
    [
        ({"platform": "plan9-mips"}, "was built for plan9-mips"),
        ({"version": "0.1.0"}, "built with tensorrt-rtx 0.1.0|not usable"),
        pytest.param(
            {"compute_capabilities": ((1, 0),)},
            "NVIDIA GPU and there is none|compute capability 1.0|not usable",
            id="card",
        ),
    ],
)
def test_an_engine_of_elsewhere_is_listed_with_the_reason_and_the_command(
    tmp_path: Path, tiny_graph: Path, differing: dict[str, Any], reason: str
) -> None:
    make_engine(tmp_path / "built", tiny_graph, **differing)
    (entry,) = models(find(tmp_path))
    assert entry.title == f"{PREFIX}built" or entry.title == f"{PREFIX}tiny (tensorrt-rtx fp32)"
    with pytest.raises(EngineMismatch, match=reason):
        HostedUNet(entry, PlainHost()).activate()
    (artifact,) = find(tmp_path)
    assert (
        "--flavour tensorrt-rtx --profile batch=1:2:4,height=128:128:256,width=128:128:256,tokens=77:77:154 --signature"
        " webui" in build_command(artifact.manifest)
    )


def test_a_read_only_or_linked_folder_of_engines_is_read_all_the_same(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    os.symlink(installed / "models" / "sdcompress" / "tiny", tmp_path / "linked" / "tiny", target_is_directory=True)
    (tmp_path / "linked").chmod(0o555)
    assert call(hosted(only(tmp_path / "linked"))).shape == (2, 4, 16, 16)


def test_a_folder_that_is_none_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert find(tmp_path / "file") == []
    assert find(tmp_path / "nowhere") == []


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may list every folder")
def test_a_folder_without_permission_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    with pytest.raises(UsageError, match="cannot be listed"):
        find(tmp_path)


def test_a_damaged_folder_is_the_entry_it_was_and_leaves_a_sound_copy_to_serve(installed: Path) -> None:
    root = installed / "models" / "sdcompress"
    break_length = (root / "tiny" / "unet.onnx").write_bytes
    shutil.copytree(root / "tiny", root / "copy")
    break_length(b"cut")
    (entry,) = models(find(root), TITLE)
    assert (entry.title, [artifact.folder.name for artifact in entry.usable]) == (TITLE, ["copy"])
    shutil.rmtree(root / "copy")
    (entry,) = models(find(root), TITLE)
    assert entry.title == TITLE
    with pytest.raises(EngineMismatch, match="has 3 bytes"):
        HostedUNet(entry, PlainHost()).activate()


# --- the menu


def test_automatic_takes_an_engine_of_the_checkpoint_and_never_a_student(
    installed: Path, whole_graph: Path, tiny_graph: Path, random_pipeline: Any
) -> None:
    root = installed / "models" / "sdcompress"
    change_manifest(root / "tiny", model_name="teacher")  # a student that bears its teacher's name
    with running(WebUI(installed, random_pipeline.unet)) as host:
        host.load_extension(WEBUI_PLUGIN)
        host.apply_unet("Automatic")
        assert host.sd_unet.current_unet is None
        shutil.copytree(whole_graph, root / "teacher")
        host.list_unets()
        host.apply_unet("Automatic")
        assert host.sd_unet.current_unet.hosted.model.usable[0].folder.name == "teacher"
        manifest = read_manifest(root / "teacher")
        assert manifest is not None
        save_manifest(
            root / "teacher", replace(manifest, inputs={**manifest.inputs, "lora style.safetensors:0.8": "0"})
        )
        host.list_unets()
        host.apply_unet("Automatic")  # with a LoRA baked in it is another model
        assert host.sd_unet.current_unet is None


def test_looking_again_does_not_load_again(webui: WebUI) -> None:
    webui.apply_unet(TITLE)
    before = webui.sd_unet.current_unet
    webui.list_unets()
    webui.apply_unet(TITLE)
    assert webui.sd_unet.current_unet is before
    webui.apply_unet("None")


def test_a_label_is_found_by_what_the_settings_kept_of_it() -> None:
    fit, unfit = Label(TITLE), Label(f"{TITLE} – cannot run: no card")
    assert fit == unfit == TITLE
    assert hash(fit) == hash(unfit)
    assert fit != f"{TITLE}2"
    assert len({fit, unfit}) == 1


def test_an_engine_that_is_gone_is_an_error_and_not_the_checkpoints_unet(webui: WebUI, installed: Path) -> None:
    webui.opts.sd_unet = TITLE
    shutil.rmtree(installed / "models" / "sdcompress" / "tiny")
    webui.list_unets()
    with pytest.raises(EngineMismatch, match="no more"):
        webui.apply_unet()


def test_the_settings_say_where_engines_are(webui: WebUI, installed: Path, tmp_path: Path) -> None:
    assert set(webui.labels) == {"sdcompress_folder", "sdcompress_fallback", "sdcompress_cuda_graph"}
    shutil.move(installed / "models" / "sdcompress", tmp_path / "elsewhere")
    assert TITLE not in webui.list_unets()
    webui.opts.sdcompress_folder = str(tmp_path / "elsewhere")
    assert TITLE in webui.list_unets()


def test_the_tab_shows_engines_reasons_and_commands(webui: WebUI, installed: Path, tiny_graph: Path) -> None:
    root = installed / "models" / "sdcompress"
    make_engine(root / "far <away>", tiny_graph, platform="plan9-mips")
    text = webui.tab()
    assert "far &lt;away&gt;" in text
    assert "was built for plan9-mips" in text
    assert "sdcompress export MODEL --trt --flavour tensorrt-rtx" in text
    assert "<td>ready</td>" in text
    for named in ("LoRA", "ControlNet", "tiling"):
        assert named in text
    again = next(widget for widget in Widget.made if widget.clicked)
    shutil.rmtree(root)
    assert "There are none yet" in again.clicked()


# --- LoRA, ControlNet and their kin


def lora_of(unet: Any, layers: list[str], strength: float = 1.0) -> SimpleNamespace:
    """A network as A1111's LoRA extension holds it: matched to the checkpoint's layers, by their LDM names."""
    names = unet_keys(unet.state_dict())
    state, draw = unet.state_dict(), torch.Generator().manual_seed(9)
    found = {}
    for layer in layers:
        delta = 0.3 * torch.randn(state[f"{layer}.weight"].shape, generator=draw)
        key = f"diffusion_model_{names[f'{layer}.weight'].removesuffix('.weight').replace('.', '_')}"
        found[key] = SimpleNamespace(calc_updown=lambda weight, delta=delta: (strength * delta.to(weight), None))
    return SimpleNamespace(
        name="style",
        modules=found,
        unet_multiplier=strength,
        te_multiplier=1.0,
        dyn_dim=None,
        network_on_disk=SimpleNamespace(filename="/loras/style.safetensors"),
    )


LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"


def test_a_lora_is_refused_with_the_command_that_bakes_it_in(webui: WebUI, random_pipeline: Any) -> None:
    webui.opts.sd_unet = TITLE
    sys.modules["networks"].loaded_networks.append(lora_of(random_pipeline.unet, [LAYER], 0.8))
    with pytest.raises(EngineMismatch, match=r"LoRA style \(0.8\).*--lora /loras/style.safetensors:0.8"):
        sample(webui, cond=words(1), uncond=words(2))
    webui.opts.sdcompress_fallback = "torch"
    with pytest.raises(EngineError, match="torch cannot add it to a student"):
        sample(webui, cond=words(1), uncond=words(2))


def test_a_lora_of_the_text_encoder_alone_is_the_hosts_business(
    webui: WebUI, student_unet: Any, random_pipeline: Any
) -> None:
    asked = {"cond": words(1), "uncond": words(2), "steps": 1}
    webui.opts.sd_unet = TITLE
    text_only = lora_of(random_pipeline.unet, [])
    text_only.modules["transformer_text_model_encoder_layers_0_mlp_fc1"] = object()
    sys.modules["networks"].loaded_networks += [text_only, lora_of(random_pipeline.unet, [LAYER], 0.0)]
    assert relative_l2(sample(webui, **asked)[0], expected(student_unet, **asked)[0]) < ROUNDING


def test_torch_adds_a_lora_to_an_engine_of_the_whole_unet(
    installed: Path, whole_graph: Path, random_pipeline: Any
) -> None:
    import copy

    folder = installed / "models" / "sdcompress" / "teacher"
    shutil.copytree(whole_graph, folder)
    add_weights(folder, random_pipeline.unet)
    lora = lora_of(random_pipeline.unet, [LAYER, "mid_block.resnets.0.conv1"], 0.5)
    changed = copy.deepcopy(random_pipeline.unet)
    with torch.no_grad():
        for layer, network in zip((LAYER, "mid_block.resnets.0.conv1"), lora.modules.values(), strict=True):
            weight = changed.get_submodule(layer).weight
            weight += network.calc_updown(weight)[0]
    asked = {"cond": words(1), "uncond": words(2), "steps": 2}
    with running(WebUI(installed, random_pipeline.unet)) as host:
        host.load_extension(WEBUI_PLUGIN)
        host.opts.sd_unet, host.opts.sdcompress_fallback = f"{PREFIX}teacher (onnxruntime fp32)", "torch"
        loaded = sys.modules["networks"].loaded_networks
        loaded.append(lora)
        latents, _, job = sample(host, **asked)
        assert relative_l2(latents, expected(changed, **asked)[0]) < ROUNDING
        assert ["LoRA style" in line for line in job.comments] == [True]
        loaded.clear()
        assert relative_l2(sample(host, **asked)[0], expected(random_pipeline.unet, **asked)[0]) < ROUNDING


def test_an_extension_in_the_unets_way_is_an_error_and_not_its_picture(webui: WebUI, student_unet: Any) -> None:
    asked = {"cond": words(1), "uncond": words(2), "steps": 1}
    webui.opts.sd_unet = TITLE
    module = webui.sd_model.model.diffusion_model
    original, plain = module.forward, type(module).__mro__[1]

    def hooked(x: Any, timesteps: Any = None, context: Any = None, **kwargs: Any) -> Any:
        return plain.forward(module, x, timesteps, context, **kwargs)

    module.forward = hooked  # as ControlNet does
    with pytest.raises(EngineError, match="ControlNet"):
        sample(webui, **asked)
    module.forward = original  # and undoes it: the class's own, on the instance
    assert relative_l2(sample(webui, **asked)[0], expected(student_unet, **asked)[0]) < ROUNDING
    del module.forward
    patched = type(module).forward
    type(module).forward = plain.forward  # on the class
    with pytest.raises(EngineError, match="own UNet instead"):
        sample(webui, **asked)
    type(module).forward = patched


def test_hypernetworks_and_tiling_are_refused(webui: WebUI) -> None:
    webui.opts.sd_unet, webui.opts.sdcompress_fallback = TITLE, "torch"
    sys.modules["modules.shared"].loaded_hypernetworks.append(SimpleNamespace(name="inky"))
    with pytest.raises(EngineError, match="hypernetwork inky"):
        sample(webui, cond=words(1), uncond=words(2))
    sys.modules["modules.shared"].loaded_hypernetworks.clear()
    webui.hijack.circular_enabled = True
    with pytest.raises(EngineError, match="tiling"):
        sample(webui, cond=words(1), uncond=words(2))


def test_a_refiner_is_refused_and_not_passed_over(webui: WebUI, random_pipeline: Any) -> None:
    webui.opts.sd_unet, webui.opts.sdcompress_fallback = TITLE, "torch"
    x, times, context = torch.randn(2, 4, 16, 16), torch.ones(2), words(1).expand(2, -1, -1)
    with webui.job():
        webui.predict(x, times, context)
        webui.load(random_pipeline.unet, name="refiner")  # in the midst of a picture
        with pytest.raises(
            EngineError, match=r"checkpoint refiner in a picture that was begun with teacher: turn off the refiner"
        ):
            webui.predict(x, times, context)
    with webui.job():  # the next one is begun with it
        webui.predict(x, times, context)


# --- falling back


def test_torch_runs_the_students_own_weights_and_says_so_once(
    webui: WebUI, installed: Path, student_unet: Any, random_pipeline: Any
) -> None:
    add_weights(installed / "models" / "sdcompress" / "tiny", student_unet)
    webui.opts.sd_unet, webui.opts.sdcompress_fallback = TITLE, "torch"
    asked = {
        "cond": words(1),
        "uncond": words(2),
        "x": noise(17, 20),
    }  # no multiple of four latents, which torch takes as A1111's own UNet does
    latents, _, job = sample(webui, **asked)
    ldm = TorchUNet(
        {name: student_unet.state_dict()[key] for key, name in unet_keys(student_unet.state_dict()).items()},
        student_unet.config,
        "cpu",
        torch.float32,
    )
    assert (
        relative_l2(latents, euler(Guidance(ldm), noise(17, 20), schedule(4), asked["cond"], asked["uncond"]))
        < ROUNDING
    )
    assert len(job.comments) == 1
    assert "height 136 px" in job.comments[0]
    assert "same weights in torch" in job.comments[0]


def test_without_weights_there_is_nothing_to_fall_back_to(tiny: Artifact) -> None:
    unet = hosted(replace(tiny, profiles=(ranges((2, 2, 2), (128, 128, 128)),)), "torch")
    with pytest.raises(EngineError, match=r"no weights of this model.*checkpoint's own UNet is another model"):
        call(unet, px=256)


def test_weights_of_another_model_are_told_from_the_engines(
    tiny: Artifact, student_unet: Any, random_pipeline: Any
) -> None:
    import copy

    other = copy.deepcopy(student_unet)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * torch.randn_like(weight)
    narrow = replace(tiny, profiles=(ranges((2, 2, 2), (128, 128, 128)),))
    add_weights(tiny.folder, other)
    with pytest.raises(EngineError, match="these weights are not the engine's"):
        call(hosted(narrow, "torch"), px=256)
    add_weights(tiny.folder, student_unet)
    host = PlainHost()
    assert call(hosted(narrow, "torch", host), px=256).shape == (2, 4, 32, 32)
    assert len(host.said) == 1


def test_a_whole_ldm_file_serves_as_weights(tiny: Artifact, student_unet: Any, random_pipeline: Any) -> None:
    from sdcompress.checkpoints.write import write_ldm

    kept, random_pipeline.unet = random_pipeline.unet, student_unet
    try:
        write_ldm(random_pipeline, tiny.folder / "student.safetensors", torch.float32)
    finally:
        random_pipeline.unet = kept
    assert find_weights(tiny.folder) == tiny.folder / "student.safetensors"
    found, state = read_unet(tiny.folder / "student.safetensors"), student_unet.state_dict()
    assert dict.fromkeys(found, True) == {
        name: torch.equal(found[name], state[key]) for key, name in unet_keys(state).items()
    }


@pytest.mark.parametrize("plan", [None, "bk-base", "bk-small", "bk-tiny"])
def test_the_torch_unet_is_diffusers(random_pipeline: Any, plan: str | None) -> None:
    from diffusers import UNet2DConditionModel

    config = dict(random_pipeline.unet.config)
    unet = (
        random_pipeline.unet
        if plan is None
        else UNet2DConditionModel.from_config(make_plan(config, plan).student_config()).eval()
    )
    names = ldm_names(unet.state_dict())
    assert names == unet_keys(unet.state_dict())
    assert is_whole(dict(unet.config)) == (plan is None)
    module = TorchUNet(
        {names[key] or "": value for key, value in unet.state_dict().items()}, unet.config, "cpu", torch.float32
    )
    x, times, context = torch.randn(2, 4, 16, 24), torch.tensor([999.0, 20.5]), torch.randn(2, 154, 96)
    assert relative_l2(module(x, times, context), reference(unet)(x, times, context)) < ROUNDING


def test_the_torch_unet_is_diffusers_for_sdxl_too(xl_unet: Any) -> None:
    names = ldm_names(xl_unet.state_dict())
    assert names == unet_keys(xl_unet.state_dict())
    module = TorchUNet(
        {names[key] or "": value for key, value in xl_unet.state_dict().items()}, xl_unet.config, "cpu", torch.float32
    )
    x, times, context, y = (
        torch.randn(2, 4, 16, 24),
        torch.tensor([999.0, 20.5]),
        torch.randn(2, 77, 64),
        torch.randn(2, 80),
    )
    assert relative_l2(module(x, times, context, y), reference(xl_unet)(x, times, context, y)) < ROUNDING


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_a_cut_file_of_weights_is_an_error(tmp_path: Path, student_unet: Any, keep: int) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(4000)}, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="no readable safetensors"):
        read_safetensors(tmp_path / "w.safetensors")


# --- Forge


@pytest.fixture
def forge(installed: Path, random_pipeline: Any) -> Iterator[WebUI]:
    with running(WebUI(installed, random_pipeline.unet, forge=True)) as host:
        host.load_extension(WEBUI_PLUGIN)
        yield host


X, SIGMA, CONTEXT = (
    torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4)) * 5,
    torch.tensor([5.0, 5.0]),
    words(1).expand(2, -1, -1),
)


def denoised(unet: Any) -> torch.Tensor:
    from .webui_host import denoise

    return denoise(reference(unet), X, SIGMA, CONTEXT, None)


def test_forge_runs_the_engine_in_the_unets_place(forge: WebUI, student_unet: Any, random_pipeline: Any) -> None:
    assert "list_unets" not in forge.callbacks  # Forge has the menu, and never calls what it chooses
    choice = next(widget for widget in forge.controls[0] if TITLE in widget.args[0])
    assert choice.kwargs["value"] == "None"
    with forge.job(TITLE) as job:
        forge.before_sampling(job, TITLE)
        assert relative_l2(forge.forge_denoise(X, SIGMA, CONTEXT), denoised(student_unet)) < ROUNDING
        forge.before_sampling(job, TITLE)  # hires fix
        assert relative_l2(forge.forge_denoise(X, SIGMA, CONTEXT), denoised(student_unet)) < ROUNDING
    assert job.extra_generation_params == {"sdcompress": TITLE}
    with forge.job("None") as job:
        forge.before_sampling(job, "None")
        assert torch.equal(forge.forge_denoise(X, SIGMA, CONTEXT), denoised(random_pipeline.unet))
    assert not forge.errors


def test_forge_goes_through_another_extensions_wrapper(forge: WebUI, student_unet: Any) -> None:
    def halves(apply_model: Any, args: Any) -> torch.Tensor:  # as tiling extensions call the model in parts
        context = args["c"]["c_crossattn"]
        return torch.cat(
            [
                apply_model(x, t, **{**args["c"], "c_crossattn": c})
                for x, t, c in zip(args["input"].split(1), args["timestep"].split(1), context.split(1), strict=True)
            ]
        )

    forge.sd_model.after_lora.set_model_unet_function_wrapper(halves)
    with forge.job(TITLE) as job:
        forge.before_sampling(job, TITLE)
        forge.sd_model.forge_objects.unet = forge.sd_model.forge_objects.unet.clone()  # the script after it
        assert relative_l2(forge.forge_denoise(X, SIGMA, CONTEXT), denoised(student_unet)) < ROUNDING


def test_forge_says_when_the_engine_was_passed_over(forge: WebUI, capsys: pytest.CaptureFixture[str]) -> None:
    with forge.job(TITLE) as job:
        forge.before_sampling(job, TITLE)
        forge.sd_model.forge_objects.unet.set_model_unet_function_wrapper(
            lambda apply_model, args: apply_model(args["input"], args["timestep"], **args["c"])
        )
        forge.forge_denoise(X, SIGMA, CONTEXT)
    assert "has not made this picture" in str(job.comments)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda patcher: patcher.lora_patches.update({("style.safetensors", 1.0, 1.0, False): {}}),
            "LoRA style.safetensors",
        ),
        (lambda patcher: setattr(patcher, "controlnet_linked_list", object()), "ControlNet"),
        (
            lambda patcher: patcher.model_options["transformer_options"].update(patches={"output_block_patch": [min]}),
            "patches of the UNet's layers",
        ),
    ],
)
def test_forge_refuses_what_an_engine_cannot_take(forge: WebUI, change: Callable[[Patcher], Any], named: str) -> None:
    change(forge.sd_model.after_lora)
    with forge.job(TITLE) as job:
        forge.before_sampling(job, TITLE)
        with pytest.raises(EngineError, match=named):
            forge.forge_denoise(X, SIGMA, CONTEXT)


def test_forge_refuses_another_checkpoint_for_hires_fix(forge: WebUI, random_pipeline: Any) -> None:
    with forge.job(TITLE) as job:
        forge.before_sampling(job, TITLE)
        forge.forge_denoise(X, SIGMA, CONTEXT)
        forge.load(random_pipeline.unet, name="larger")
        forge.before_sampling(job, TITLE)
        with pytest.raises(EngineError, match="checkpoint larger in a picture that was begun with teacher"):
            forge.forge_denoise(X, SIGMA, CONTEXT)


def test_forge_refuses_a_choice_there_is_not(forge: WebUI) -> None:
    with forge.job("tiny") as job:
        forge.before_sampling(job, "tiny")  # as somebody types it who calls the API
        with pytest.raises(UsageError, match=r"no engine 'tiny'.*Look again"):
            forge.forge_denoise(X, SIGMA, CONTEXT)


def test_forge_raises_from_the_sampling_what_its_scripts_would_swallow(forge: WebUI, installed: Path) -> None:
    break_graph(installed / "models" / "sdcompress" / "tiny")
    with forge.job(TITLE) as job:
        forge.before_sampling(job, TITLE)
        with pytest.raises(ArtifactError, match="sha256 differs"):
            forge.forge_denoise(X, SIGMA, CONTEXT)
    shutil.rmtree(installed / "models" / "sdcompress" / "tiny")
    with forge.job(TITLE) as job:
        forge.before_sampling(job, TITLE)
        with pytest.raises(EngineMismatch, match="no more"):
            forge.forge_denoise(X, SIGMA, CONTEXT)


# --- the extension's own files


def test_install_explains_and_installs_nothing(tmp_path: Path) -> None:
    import subprocess

    shutil.copytree(WEBUI_PLUGIN, tmp_path / "extension", ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", str(tmp_path / "extension" / "install.py")],
        capture_output=True,
        text=True,
        check=True,
    )  # -S: nothing is installed there
    assert "sdcompress install webui" in done.stdout
    assert "-m pip install tensorrt" in done.stdout
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_the_manifest_alone_says_what_is_there(tiny: Artifact) -> None:
    assert json.loads((tiny.folder / MANIFEST_NAME).read_text())["config"]["signature"] == "webui"
    assert (tiny.name, tiny.backend, tiny.whole, tiny.multiple) == ("tiny", "onnxruntime", False, 4)
    assert tiny.traits == Traits(96, 0, 4, "epsilon")
    assert math.prod(tiny.profiles[0]["sample"][1][1:]) == 4 * 64 * 64
