"""The ComfyUI node: its pictures are diffusers', whatever ComfyUI's way of calling; what an engine cannot do is refused
in words.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import ArtifactError, EngineError, EngineMismatch, SdCompressError
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.flavour import platform_name
from sdcompress_engines.manifest import MANIFEST_NAME, read_manifest, write_manifest
from sdcompress_engines.engine_key import EngineKey

from sdcompress.checkpoints.ldm_keys import unet_keys
from sdcompress.families.configs import CONFIGS
from sdcompress.hosts.find import find_host
from sdcompress.hosts.install import install
from sdcompress.prune.plan import make_plan

from .comfyui_host import REAL, Harness, Real, SDXLModel, load_custom_node, unet_to_diffusers

PLUGIN = Path(__file__).parents[2] / "plugins/comfyui_sdcompress"
WIDTH = 96
SHAPE = (2, 4, 8, 16)
Q = "transformer_blocks_0_attn1_to_q"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning" if REAL else "error")


@pytest.fixture(scope="session")
def graph(export_unet: Callable[..., Path], student: Any) -> Path:
    """The student's UNet for ComfyUI."""
    return export_unet("comfyui", student, "tiny")


@pytest.fixture(params=[Harness, Real] if REAL else [Harness], ids=lambda kind: kind.__name__.lower())
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with request.param(tmp_path / "models").running() as running:
        yield running


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    with Harness(tmp_path / "models").running() as running:
        yield running


@pytest.fixture
def models(graph: Path, tmp_path: Path) -> Path:
    """`models/sdcompress` with one engine, `tiny`."""
    shutil.copytree(graph, tmp_path / "models/sdcompress/tiny")
    return tmp_path / "models/sdcompress"


@pytest.fixture(scope="session")
def node() -> Any:
    return load_custom_node(PLUGIN).NODE_CLASS_MAPPINGS["LoadSdcompressEngine"]


@pytest.fixture
def parts(node: Any) -> Any:
    """The plugin's modules, as they were imported with the node."""
    package = node.__module__.rpartition(".")[0]
    return SimpleNamespace(**{name: sys.modules[f"{package}.{name}"] for name in ("folders", "model", "node")})


def text(tokens: int, seed: int, width: int = WIDTH, **extras: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), extras


def change(folder: Path, **config: Any) -> None:
    """Another engine of the same graph: its manifest's config, and whole files by their path, as given."""
    made = read_manifest(folder)
    assert made
    files = {name: value for name, value in config.items() if "/" in name}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    write_manifest(
        folder,
        made.kind,
        config={**made.config, **{name: value for name, value in config.items() if name not in files}},
        inputs=made.inputs,
    )


def scheduler(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "pipeline/scheduler/scheduler_config.json").read_text())
    return content


def listened(patcher: Any) -> list[tuple[torch.Tensor, ...]]:
    """What the diffusion model is called with and answers, from now on."""
    calls: list[tuple[torch.Tensor, ...]] = []

    def hear(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        given = dict(zip(("x", "timesteps", "context"), args, strict=False)) | kwargs
        calls.append((given["x"].clone(), given["timesteps"].clone(), given["context"].clone(), output.clone()))

    patcher.model.diffusion_model.register_forward_hook(hear, with_kwargs=True)
    return calls


@torch.no_grad()
def by_diffusers(
    unet: Any,
    sigmas: torch.Tensor,
    noise: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
    cfg: float,
    prediction: str,
    table: torch.Tensor,
) -> torch.Tensor:
    """Euler over the same sigmas and noise with the UNet in diffusers; `table` has σ by timestep."""
    x = noise * (1 + sigmas[0] ** 2) ** 0.5
    for now, then in itertools.pairwise(sigmas):
        time = (now.log() - table.log()).abs().argmin().float().expand(len(x))
        outputs = [
            unet(x / (now**2 + 1) ** 0.5, time, cond.expand(len(x), -1, -1)).sample for cond in (positive, negative)
        ]
        good, bad = (
            x - now * out if prediction == "epsilon" else x / (now**2 + 1) - out * now / (now**2 + 1) ** 0.5
            for out in outputs
        )
        x = x + (x - (bad + cfg * (good - bad))) / now * (then - now)
    return x


@pytest.mark.parametrize(("first", "second"), [(77, 77), (154, 77), (154, 231)])
def test_every_step_and_the_final_latents_are_diffusers(
    first: int, second: int, host: Any, models: Path, node: Any, student: Any
) -> None:
    (patcher,) = node().load("tiny")
    calls = listened(patcher)
    positive, negative = text(first, 1), text(second, 2)
    latents = host.sample(patcher, positive, negative, SHAPE, steps=4, cfg=4.0, seed=5)
    assert [len(x) for x, *_ in calls] == [4] * 4  # cond and uncond of two pictures in one call
    with torch.no_grad():
        for x, times, context, output in calls:
            assert relative_l2(output, student.unet(x, times, context).sample) < 1e-5
    alphas = student.scheduler.alphas_cumprod
    wanted = by_diffusers(
        student.unet,
        host.sigmas(patcher, 4),
        host.noise(SHAPE, 5),
        positive[0],
        negative[0],
        4.0,
        "epsilon",
        ((1 - alphas) / alphas).sqrt(),
    )
    assert relative_l2(latents, wanted / student.vae.config.scaling_factor) < 1e-4


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_and_zero_terminal_snr_are_read_from_the_engine(
    zero_snr: bool, host: Any, models: Path, node: Any, student: Any
) -> None:
    from diffusers import DDIMScheduler

    given = scheduler(models / "tiny") | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    change(models / "tiny", **{"pipeline/scheduler/scheduler_config.json": given})
    (patcher,) = node().load("tiny")
    positive, negative = text(77, 1), text(77, 2)
    latents = host.sample(patcher, positive, negative, SHAPE, steps=3, cfg=2.0, seed=6)
    alphas = DDIMScheduler.from_config(given).alphas_cumprod.double()
    table = ((1 - alphas) / alphas).sqrt().float()
    table[-1] = patcher.model.model_sampling.sigmas[-1]  # infinite where the signal is gone; hosts take a large number
    assert torch.allclose(patcher.model.model_sampling.sigmas, table, rtol=2e-3)
    assert (float(table[-1]) > 1000) == zero_snr
    wanted = by_diffusers(
        student.unet,
        host.sigmas(patcher, 3),
        host.noise(SHAPE, 6),
        positive[0],
        negative[0],
        2.0,
        "v_prediction",
        patcher.model.model_sampling.sigmas,
    )
    assert relative_l2(latents, wanted / student.vae.config.scaling_factor) < 1e-4


def test_cond_and_uncond_apart_make_the_picture_they_make_together(harness: Harness, models: Path, node: Any) -> None:
    (patcher,) = node().load("tiny")
    together = harness.sample(patcher, text(77, 1), text(154, 2), SHAPE, 2, 4.0, 7)
    calls = listened(patcher)
    harness.free_memory = 0
    assert relative_l2(harness.sample(patcher, text(77, 1), text(154, 2), SHAPE, 2, 4.0, 7), together) < 1e-5
    assert [tuple(context.shape[:2]) for _, _, context, _ in calls] == [(2, 77), (2, 154)] * 2


def test_two_sizes_one_after_the_other_as_in_hires_fix(host: Any, models: Path, node: Any) -> None:
    (patcher,) = node().load("tiny")
    for shape in (SHAPE, (1, 4, 16, 24)):
        assert host.sample(patcher, text(77, 1), text(77, 2), shape, 1, 4.0, 7).shape == shape


def test_the_latents_scale_is_the_models_own(host: Any, models: Path, node: Any) -> None:
    vae = json.loads((models / "tiny/pipeline/vae/config.json").read_text())
    change(models / "tiny", **{"pipeline/vae/config.json": vae | {"scaling_factor": 0.5}})
    assert node().load("tiny")[0].model.latent_format.scale_factor == 0.5


def test_the_engine_is_loaded_on_use_counted_and_freed(host: Any, models: Path, node: Any) -> None:
    (patcher,) = node().load("tiny")
    engine = patcher.model.diffusion_model
    assert not engine.is_open
    assert patcher.model_size() == (models / "tiny/unet.onnx").stat().st_size
    first = host.sample(patcher, text(77, 1), text(77, 2), SHAPE, 1, 4.0, 7)
    assert engine.is_open
    assert patcher.model.model_loaded_weight_memory == patcher.model_size()
    host.unload()
    assert not engine.is_open
    assert patcher.model.model_loaded_weight_memory == 0
    assert torch.equal(host.sample(patcher, text(77, 1), text(77, 2), SHAPE, 1, 4.0, 7), first)


PROFILES = {
    "two at a time": ([2, 2], [8, 16], [77, 154]),
    "exactly four": ([4, 4], [8, 16], [77, 77]),
    "long prompts": ([1, 8], [8, 16], [154, 308]),
    "one window": ([1, 2], [8, 16], [77, 77]),
}


def profile(batch: list[int], size: list[int], tokens: list[int]) -> dict[str, list[list[int]]]:
    """As a manifest says it; opt is min."""
    ends = [(batch[at], size[at], tokens[at]) for at in (0, 0, 1)]
    return {
        "x": [[b, 4, s, s] for b, s, _ in ends],
        "timesteps": [[b] for b, _, _ in ends],
        "context": [[b, t, WIDTH] for b, _, t in ends],
    }


@pytest.mark.parametrize("limits", PROFILES)
@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_batch_the_profile_does_not_take_is_run_in_parts_with_the_same_answer(
    limits: str, count: int, models: Path, parts: Any, student: Any
) -> None:
    change(models / "tiny", profiles={"unet": [profile(*PROFILES[limits])]})
    model = parts.model.EngineModel(parts.folders.read_folder("tiny", models / "tiny"))
    x, times = torch.randn(count, 4, 8, 16), torch.arange(count) * 100.0
    shorts = torch.randn(count, 77, WIDTH)
    context = shorts.repeat(1, 4, 1)  # as ComfyUI has it where another prompt is longer
    with torch.no_grad():
        wanted = student.unet(x, times, shorts).sample
    shapes = []
    engine = model.open(x.device)
    real = engine.runner.infer

    def infer(feeds: Any) -> Any:
        shapes.append((len(feeds["x"]), feeds["context"].shape[1]))
        return real(feeds)

    engine.runner.infer = infer
    assert relative_l2(model(x, times, context), wanted) < 1e-5
    (least, most), _, (fewest, longest) = PROFILES[limits]
    assert all(least <= rows <= most and fewest <= tokens <= longest for rows, tokens in shapes)
    assert len(shapes) == -(-count // most)
    model.close()


@pytest.mark.parametrize("least", [1, 2, 4])
@pytest.mark.parametrize("most", [4, 5, 8])
def test_every_sample_is_run_once_in_as_few_calls_as_can_be(least: int, most: int, parts: Any) -> None:
    for count in range(1, 20):
        calls = parts.model.split(count, (least, most))
        assert [at for start, stop, _ in calls for at in range(start, stop)] == list(range(count))
        assert all(least <= rows <= most and rows >= stop - start for start, stop, rows in calls)
        assert len(calls) == -(-count // most)


def test_the_profile_with_the_fewest_calls_is_chosen_and_prompts_of_two_lengths_are_told_apart(parts: Any) -> None:
    Limits, Call, plan = parts.model.Limits, parts.model.Call, parts.model.plan_calls
    small, large = Limits((1, 2), (8, 16), (8, 16), (77, 77)), Limits((4, 8), (8, 8), (8, 8), (77, 231))
    context = torch.randn(6, 77, 8)
    assert plan([small, large], torch.Size((6, 4, 8, 8)), context) == [Call(0, 6, 6, 77)]
    assert [(call.start, call.stop) for call in plan([small, large], torch.Size((6, 4, 8, 16)), context)] == [
        (0, 2),
        (2, 4),
        (4, 6),
    ]
    assert plan([small, large], torch.Size((6, 4, 32, 32)), context) == [Call(0, 6, 6, 77)], (
        "the runner says what is wrong"
    )
    longer = torch.cat(
        [torch.randn(2, 154, 8).repeat(1, 3, 1), torch.randn(1, 231, 8).repeat(1, 2, 1)]
    )  # 154 and 231 tokens, at their common 462
    wide = Limits((1, 8), (8, 16), (8, 16), (77, 231))
    assert plan([wide], torch.Size((3, 4, 8, 8)), longer) == [Call(0, 2, 2, 154), Call(2, 3, 1, 231)]
    assert plan([wide], torch.Size((1, 4, 8, 8)), torch.randn(1, 308, 8)) == [Call(0, 1, 1, 308)], (
        "nothing repeats in it"
    )


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize(
    "layer", ["down_blocks_0_attentions_0", "up_blocks_2_attentions_1", "input_blocks_1_1", "output_blocks_5_1"]
)
def test_a_lora_is_refused_and_told_to_be_baked_in(
    layer: str, strength: float, host: Any, models: Path, node: Any
) -> None:
    (patcher,) = node().load("tiny")
    for model in (patcher, patcher.clone()):
        with pytest.raises(Exception, match=r"1 of the UNet's weights, which are built into the engine.*--lora"):
            host.lora(model, [f"lora_unet_{layer}_{Q}", f"lora_te_text_model_encoder_layers_0_{Q}"], strength)


def test_a_lora_of_the_text_encoder_alone_or_without_strength_changes_nothing(
    host: Any, models: Path, node: Any
) -> None:
    (patcher,) = node().load("tiny")
    before = host.sample(patcher, text(77, 1), text(77, 2), SHAPE, 1, 4.0, 7)
    for keys, strength in (
        ([f"lora_te_text_model_encoder_layers_0_{Q}"], 1.0),
        ([f"lora_unet_down_blocks_0_attentions_0_{Q}"], 0.0),
    ):
        assert torch.equal(
            host.sample(host.lora(patcher, keys, strength), text(77, 1), text(77, 2), SHAPE, 1, 4.0, 7), before
        )


def test_what_would_change_or_save_the_engines_weights_is_refused(host: Any, models: Path, node: Any) -> None:
    (patcher,) = node().load("tiny")
    key = next(key for key in patcher.model.state_dict() if key.startswith("diffusion_model."))
    with pytest.raises(Exception, match="merge"):
        patcher.add_patches({key: (torch.ones(1),)}, 0.5, 0.5)
    with pytest.raises(Exception, match="LoRA hook"):
        patcher.add_hook_patches(None, {(key, (0, 0, 1)): torch.ones(1)}, 0.5)
    for save in (lambda: patcher.get_key_patches("diffusion_model."), lambda: patcher.model.state_dict_for_saving()):
        with pytest.raises(Exception, match=r"no weights to save or to merge.*--ldm"):
            save()


@pytest.mark.parametrize(
    "options",
    [
        {"patches": {"output_block_patch": [max]}},
        {"patches_replace": {"attn2": {("input", 1): max}}},
        {"patches": {"middle_patch": [max]}},
    ],
)
def test_a_node_that_reaches_into_the_unet_is_refused(
    options: dict[str, Any], harness: Harness, models: Path, node: Any
) -> None:
    (patcher,) = node().load("tiny")
    patcher.model_options["transformer_options"].update(options)
    with pytest.raises(EngineError, match="a node changes layers inside the UNet"):
        harness.sample(patcher, text(77, 1), text(77, 2), SHAPE, 1, 4.0, 7)
    assert not patcher.model.diffusion_model.is_open, "refused before gigabytes are loaded"


def test_a_controlnet_is_refused_with_the_reason(models: Path, parts: Any) -> None:
    model = parts.model.EngineModel(parts.folders.read_folder("tiny", models / "tiny"))
    with pytest.raises(EngineError, match=r"ControlNet.*no inputs for that.*--ldm"):
        model(
            torch.zeros(SHAPE),
            torch.zeros(2),
            torch.zeros(2, 77, WIDTH),
            control={"input": [], "middle": [torch.zeros(1)], "output": []},
        )


def test_empty_patches_and_unknown_keywords_are_no_reason(models: Path, parts: Any) -> None:
    model = parts.model.EngineModel(parts.folders.read_folder("tiny", models / "tiny"))
    given = {
        "patches": {"attn1_patch": []},
        "patches_replace": {},
        "sigmas": torch.ones(1),
        "optimized_attention_override": max,
    }
    assert (
        model(
            torch.zeros(SHAPE),
            torch.zeros(2),
            torch.zeros(2, 77, WIDTH),
            transformer_options=given,
            crossattn_controlnet=torch.zeros(1),
        ).shape
        == SHAPE
    )
    model.close()


@pytest.mark.parametrize(
    ("shape", "width", "vector", "words"),
    [
        (SHAPE, 768, None, r"text embeddings 768 wide for an engine of SD1.x.*expected 96 wide.*CLIP"),
        (SHAPE, WIDTH, 2816, r"a vector 2816 wide beside the text for an engine of SD1.x"),
        ((2, 9, 8, 16), WIDTH, None, r"latents of shape \(2, 9, 8, 16\)"),
        ((2, 16, 8, 16), WIDTH, None, r"latents of shape"),
    ],
)
def test_inputs_of_another_family_are_refused_by_name(
    shape: tuple[int, ...], width: int, vector: int | None, words: str, models: Path, parts: Any
) -> None:
    model = parts.model.EngineModel(parts.folders.read_folder("tiny", models / "tiny"))
    with pytest.raises(EngineMismatch, match=words):
        model(
            torch.zeros(shape),
            torch.zeros(2),
            torch.zeros(2, 77, width),
            y=None if vector is None else torch.zeros(2, vector),
        )
    assert not model.is_open


def test_wrappers_of_other_nodes_go_around_the_engine(host: Any, models: Path, node: Any) -> None:
    (patcher,) = node().load("tiny")
    seen = []

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((executor.class_obj, args[-1]["cond_or_uncond"]))
        return executor(*args, **kwargs)

    host.sample(host.wrap(patcher, wrapper), text(77, 1), text(77, 2), SHAPE, 2, 4.0, 7)
    assert [found for found, _ in seen] == [patcher.model.diffusion_model] * 2
    assert sorted(seen[0][1]) == [0, 1]


def test_the_node_lists_engines_wherever_they_lie(host: Any, models: Path, node: Any, tmp_path: Path) -> None:
    (models / "no engine").mkdir()
    (models / ".hidden").mkdir()
    shutil.move(models / "tiny", tmp_path / "elsewhere")
    (models / "Ärger mit Leerzeichen").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", models / "a whole export/onnx")
    assert node.INPUT_TYPES()["required"]["engine"][0] == ["a whole export", "Ärger mit Leerzeichen"]
    assert node.VALIDATE_INPUTS("Ärger mit Leerzeichen") is True
    assert "no engine 'gone'" in node.VALIDATE_INPUTS("gone")
    (patcher,) = node().load("Ärger mit Leerzeichen")
    assert host.sample(patcher, text(77, 1), text(77, 2), SHAPE, 1, 4.0, 7).isfinite().all()


def test_another_engine_under_the_same_name_is_noticed(host: Any, models: Path, node: Any) -> None:
    before = node.IS_CHANGED("tiny")
    assert node.IS_CHANGED("tiny") == before
    change(models / "tiny", model_name="another")
    assert node.IS_CHANGED("tiny") != before


def damage(folder: Path, what: str) -> None:
    if what == "altered graph":
        content = bytearray((folder / "unet.onnx").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "unet.onnx").write_bytes(content)
    elif what == "cut graph":
        (folder / "unet.onnx").write_bytes((folder / "unet.onnx").read_bytes()[:1000])
    elif what == "no manifest":
        (folder / MANIFEST_NAME).unlink()
    elif what == "edited manifest":
        (folder / MANIFEST_NAME).write_text((folder / MANIFEST_NAME).read_text().replace('"fp32"', '"fp16"'))
    elif what == "no config":
        (folder / "pipeline/unet/config.json").unlink()
        change(folder)
    elif what == "signature":
        change(folder, signature="voltaml")
    elif what == "inpainting":
        change(
            folder,
            **{
                "pipeline/unet/config.json": (
                    json.loads((folder / "pipeline/unet/config.json").read_text()) | {"in_channels": 9}
                )
            },
        )
    elif what == "flow matching":
        change(
            folder,
            **{"pipeline/scheduler/scheduler_config.json": scheduler(folder) | {"prediction_type": "flow_prediction"}},
        )
    elif what == "schedule":
        change(folder, **{"pipeline/scheduler/scheduler_config.json": scheduler(folder) | {"beta_schedule": "exp"}})


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("cut graph", r"is damaged: unet.onnx has 1000 bytes"),
        ("no manifest", r"no folder of an engine"),
        ("edited manifest", r"this manifest was edited"),
        ("no config", r"config.json: is missing"),
        ("signature", r"the signature 'voltaml'"),
        ("inpainting", r"another kind of UNet"),
        ("flow matching", r"predicts 'flow_prediction'"),
        ("schedule", r"noise schedule 'exp'"),
    ],
)
def test_a_folder_that_cannot_serve_is_told_of_in_one_line(what: str, words: str, models: Path, parts: Any) -> None:
    damage(models / "tiny", what)
    with pytest.raises(SdCompressError, match=words) as raised:
        parts.folders.read_folder("tiny", models / "tiny")
    assert "\n" not in str(raised.value)


def test_a_graph_that_is_not_what_its_manifest_says_never_reaches_the_runtime(models: Path, parts: Any) -> None:
    damage(models / "tiny", "altered graph")
    model = parts.model.EngineModel(parts.folders.read_folder("tiny", models / "tiny"))
    with pytest.raises(ArtifactError, match="was altered: its sha256"):
        model(torch.zeros(SHAPE), torch.zeros(2), torch.zeros(2, 77, WIDTH))
    assert not model.is_open


def engine_folder(folder: Path, graph: Path, **changes: Any) -> Path:
    """An engine's folder as `export --trt --signature comfyui` writes it, its plan a few bytes."""
    folder.mkdir(parents=True)
    (folder / "unet.engine").write_bytes(b"a plan" * 100)
    shutil.copytree(graph / "pipeline", folder / "pipeline")
    shapes = {name: tuple(map(tuple, sizes)) for name, sizes in profile([1, 8], [8, 16], [77, 154]).items()}
    values: dict[str, Any] = {
        "flavour": "tensorrt-rtx",
        "version": "1.0.0",
        "compute_capabilities": ((8, 9),),
        "platform": platform_name(),
    } | changes
    key = EngineKey("0" * 64, "unet", "fp16", "comfyui", profiles=(shapes,), **values)  # type: ignore[arg-type]
    write_manifest(folder, "engine", config=key.config() | {"vae_scale": 8})
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"platform": "linux-s390x"}, "was built for linux-s390x"),
        ({"flavour": "tensorrt-next"}, "'tensorrt-next', which is not known here"),
        ({"flavour": "tensorrt-rtx", "version": "0.0.1"}, r"0\.0\.1|not usable"),
    ],
)
def test_an_engine_made_for_another_machine_is_refused_before_anything_runs(
    changes: dict[str, Any], words: str, host: Any, models: Path, node: Any, graph: Path
) -> None:
    engine_folder(models / "trt", graph, **changes)
    assert "trt" in node.INPUT_TYPES()["required"]["engine"][0]
    assert re.search(words, node.VALIDATE_INPUTS("trt"))


def test_an_engine_says_its_precision_size_and_limits_without_being_opened(
    models: Path, parts: Any, graph: Path
) -> None:
    folder = parts.folders.read_folder("trt", engine_folder(models / "trt", graph))
    assert (folder.dtype, folder.bytes, folder.family) == (torch.float16, 600, "sd1")
    assert parts.model.EngineModel(folder)._limits == [parts.model.Limits((1, 8), (8, 16), (8, 16), (77, 154))]


FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        (family, preset)
        for family in FAMILIES
        for preset in (None, "bk-base", "bk-small", "bk-tiny")
        if (family, preset) != ("sdxl", "bk-tiny")
    ],
)
def test_the_layers_that_comfyui_looks_for_a_lora_in_are_the_unets(family: str, preset: str | None, parts: Any) -> None:
    from diffusers import UNet2DConditionModel

    config = json.loads((CONFIGS / family / "unet/config.json").read_text())
    if preset is not None:
        config = make_plan(config, preset).student_config()
    with torch.device("meta"):
        names = UNet2DConditionModel.from_config(config).state_dict()
    queries = {theirs: ours for theirs, ours in unet_keys(names).items() if theirs.endswith("attn1.to_q.weight")}
    assert unet_to_diffusers(parts.folders.ldm_layout(config)) == queries


def test_sdxl_gets_its_vector_of_text_and_sizes(
    harness: Harness, node: Any, export_unet: Callable[..., Path], xl: Any, tmp_path: Path
) -> None:
    for name in ("xl", "diffusers"):
        shutil.copytree(export_unet("comfyui", xl, "xl"), tmp_path / "models/sdcompress" / name)
    change(tmp_path / "models/sdcompress/diffusers", signature="diffusers")
    (patcher,) = node().load("xl")
    assert isinstance(patcher.model, SDXLModel)
    calls = listened(patcher)
    pooled = torch.randn(1, 32)
    harness.sample(
        patcher, text(77, 1, 64, pooled_output=pooled), text(77, 2, 64, pooled_output=pooled), (1, 4, 8, 12), 1, 4.0, 7
    )
    x, times, context, output = calls[0]
    with torch.no_grad():
        added = {"text_embeds": pooled.expand(2, -1), "time_ids": torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)}
        assert relative_l2(output, xl.unet(x, times, context, added_cond_kwargs=added).sample) < 1e-5
    with pytest.raises(EngineMismatch, match="no pooled text for an engine of SDXL"):
        patcher.model.diffusion_model(x, times, context)
    assert "the signature 'diffusers', which ComfyUI does not call" in node.VALIDATE_INPUTS("diffusers")


def closure(*names: str) -> set[str]:
    """These distributions and all they need here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", re.split(r"[ ;<>=!\[(~]", waiting.pop())[0]).lower()
        try:
            needs = metadata.requires(name) if name not in found else None
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [need for need in needs or [] if "extra ==" not in need]
    return found


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `site-packages` with torch, numpy, ONNX Runtime and what they need, by links, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    for name in closure("torch", "numpy", "onnxruntime"):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder


BARE = """
import sys
sys.path.append(sys.argv[1])
import importlib.util, types, torch
folder_paths = types.ModuleType("folder_paths")
folder_paths.models_dir, folder_paths.folder_names_and_paths = sys.argv[3], {}
folder_paths.add_model_folder_path = lambda name, path: folder_paths.folder_names_and_paths.setdefault(name, ([path], set()))
folder_paths.get_folder_paths = lambda name: folder_paths.folder_names_and_paths[name][0]
sys.modules["folder_paths"] = folder_paths
name = sys.argv[2].replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, sys.argv[2] + "/__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
node = module.NODE_CLASS_MAPPINGS["LoadSdcompressEngine"]
(engine,) = node.INPUT_TYPES()["required"]["engine"][0]
assert node.VALIDATE_INPUTS(engine) is True
folders, model = sys.modules[name + ".folders"], sys.modules[name + ".model"]
out = model.EngineModel(folders.read_folder(engine, node.load.__globals__["find_folder"](engine)))(torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 77, 96))
print(out.double().sum().item())
for stranger in ("diffusers", "transformers", "onnx", "pydantic", "safetensors", "sdcompress", "sdcompress_engines", "comfy"):
    assert stranger not in sys.modules and importlib.util.find_spec(stranger) is None, stranger
"""


def test_the_installed_plugin_runs_with_torch_numpy_and_one_runtime_and_nothing_else(
    bare: Path, graph: Path, student: Any, tmp_path: Path
) -> None:
    root = tmp_path / "Comfy UI.v2 é"
    for folder in ("custom_nodes", "models", "comfy"):
        (root / folder).mkdir(parents=True)
    (root / "comfy/sd.py").touch()
    host, root = find_host("comfyui", root)
    install(host, root, [graph], name="kleine Bilder")
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", BARE, bare, root / host.extension, root / "models"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    with torch.no_grad():
        wanted = student.unet(torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 77, 96)).sample.double().sum().item()
    assert float(ran.stdout) == pytest.approx(wanted, rel=1e-3)


def test_the_plugin_keeps_to_python_310_and_to_torch_and_the_engines() -> None:
    for path in PLUGIN.rglob("*.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        for statement in tree.body:
            names = (
                [alias.name for alias in statement.names]
                if isinstance(statement, ast.Import)
                else [statement.module or ""]
                if isinstance(statement, ast.ImportFrom) and not statement.level
                else []
            )
            for imported in names:
                assert imported.partition(".")[0] in {
                    "torch",
                    *sys.stdlib_module_names,
                }, f"{path}:{statement.lineno} imports {imported}"
