"""Fixtures of the plugins' tests: small pipelines, their graphs for each host, and the hosts themselves."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch
from sdcompress_engines.graph import weights_path
from sdcompress_engines.manifest import read_manifest, write_manifest
from sdcompress_engines.signature import HOSTS

from sdcompress.export.onnx import export_onnx
from sdcompress.prune.plan import BlockPlan
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student

from ..conftest import BETAS, make_tokenizer
from .comfyui_host import REAL, Harness, Real, load_custom_node
from .places import COMFYUI_PLUGIN, WEBUI_PLUGIN
from .webui_cases import read_only_artifact
from .webui_host import WebUI, running

if TYPE_CHECKING:
    from sdcompress_webui.engine_folders import Artifact


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: graphs as small as these lose more by waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def student_plan(random_pipeline: Any) -> BlockPlan:
    """Returns the plan from `random_pipeline` to `student`."""
    return make_plan(dict(random_pipeline.unet.config), "bk-tiny")


@pytest.fixture(scope="session")
def student(random_pipeline: Any, student_plan: BlockPlan) -> Any:
    """Returns `random_pipeline` with a bk-tiny student in its UNet's place: three levels, one pair each, no middle.

    Noise is added to its weights, so that it differs from its teacher.
    """
    torch.manual_seed(11)
    unet = build_student(random_pipeline.unet, student_plan).eval().requires_grad_(False)
    for weight in unet.parameters():
        weight.add_(0.02 * torch.randn_like(weight))
    return type(random_pipeline)(**(random_pipeline.components | {"unet": unet, "requires_safety_checker": False}))


@pytest.fixture(scope="session")
def student_unet(student: Any) -> Any:
    return student.unet


@pytest.fixture(scope="session")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns an SDXL pipeline whose parts are as small as possible: two levels, two text encoders."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2],
        attention_head_dim=[2, 4],
        norm_num_groups=8,
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("xl") / "tokenizer")
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "projection_dim": 32,
    }
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    texts = {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**sizes)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**sizes)),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
    }
    return StableDiffusionXLPipeline(
        vae=vae, unet=unet.eval(), scheduler=EulerDiscreteScheduler(**BETAS), add_watermarker=False, **texts
    )


@pytest.fixture(scope="session")
def export_unet(
    request: pytest.FixtureRequest, random_pipeline: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Returns a function (host, pipeline, name) → the `onnx` folder of its UNet in the host's signature, fp32.

    Tracing takes the time, so each UNet is traced once. The graph of a second host differs in names only, and these are
    changed. The one of `random_pipeline` is shared with other tests. `test_export` holds that an export uses these
    names.
    """
    made: dict[tuple[str, int, str], Path] = {}

    def export(host: str, pipeline: Any, name: str) -> Path:
        traced = next((key for key in made if key[1] == id(pipeline)), None)
        key = host, id(pipeline), name
        if key in made:
            return made[key]
        source = {"pipeline": f"{id(pipeline):064x}"}
        if pipeline is random_pipeline:
            made[key] = rename_graph(
                request.getfixturevalue("fp32_export").folder,
                "diffusers",
                tmp_path_factory.mktemp("plugins") / name,
                host,
                name,
                source,
            )
        elif traced is not None:
            made[key] = rename_graph(
                made[traced], traced[0], tmp_path_factory.mktemp("plugins") / name, host, name, source
            )
        else:
            is_student = pipeline.unet.config.mid_block_type is None
            plan = request.getfixturevalue("student_plan") if is_student else None
            made[key] = export_onnx(
                pipeline, tmp_path_factory.mktemp("plugins") / name, host=host, source=source, name=name, plan=plan
            ).folder
        return made[key]

    return export


def rename_graph(graphs: Path, before: str, folder: Path, host: str, name: str, source: dict[str, str]) -> Path:
    """Create a copy of the UNet's folder `graphs` with the names of `host` instead of `before`."""
    folder.mkdir()
    shutil.copytree(graphs / "pipeline", folder / "pipeline")
    model, manifest = onnx.load(graphs / "unet.onnx", load_external_data=False), read_manifest(graphs)
    shutil.copyfile(weights_path(graphs / "unet.onnx"), weights_path(folder / "unet.onnx"))
    assert manifest is not None
    names = {
        old: HOSTS[host]["unet"][side][canonical]
        for side in (0, 1)
        for canonical, old in HOSTS[before]["unet"][side].items()
        if canonical in HOSTS[host]["unet"][side]
    }
    for value in (*model.graph.input, *model.graph.output):
        value.name = names[value.name]
    for node in model.graph.node:
        node.input[:] = [names.get(each, each) for each in node.input]
        node.output[:] = [names.get(each, each) for each in node.output]
    onnx.save(model, folder / "unet.onnx")
    write_manifest(
        folder,
        "onnx",
        config=manifest.config
        | {
            "signature": host,
            "components": ["unet"],
            "precisions": {"unet": "fp32"},
            "model_name": name,
        },
        inputs=source,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_graph(export_unet: Callable[..., Path], student: Any) -> Path:
    return export_unet("webui", student, "tiny")


@pytest.fixture(scope="session")
def whole_graph(export_unet: Callable[..., Path], random_pipeline: Any) -> Path:
    return export_unet("webui", random_pipeline, "teacher")


@pytest.fixture
def installed(tmp_path: Path, tiny_graph: Path) -> Path:
    """Returns a WebUI's folder with the student's graph in it. Its name has a space and letters beyond ASCII."""
    root = tmp_path / "Web UI – größer"
    shutil.copytree(tiny_graph, root / "models" / "sdcompress" / "tiny")
    return root


@pytest.fixture
def webui(installed: Path, random_pipeline: Any) -> Iterator[WebUI]:
    """Yields A1111 with the teacher as its checkpoint, and the extension loaded."""
    with running(WebUI(installed, random_pipeline.unet)) as host:
        host.load_extension(WEBUI_PLUGIN)
        yield host


@pytest.fixture
def forge(installed: Path, random_pipeline: Any) -> Iterator[WebUI]:
    with running(WebUI(installed, random_pipeline.unet, forge=True)) as host:
        host.load_extension(WEBUI_PLUGIN)
        yield host


@pytest.fixture
def tiny(installed: Path) -> Artifact:
    return read_only_artifact(installed / "models" / "sdcompress")


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def graph(export_unet: Callable[..., Path], student: Any) -> Path:
    """Returns the student's UNet in ComfyUI's signature."""
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
    """Returns `models/sdcompress` with one engine, `tiny`."""
    shutil.copytree(graph, tmp_path / "models/sdcompress/tiny")
    return tmp_path / "models/sdcompress"


@pytest.fixture(scope="session")
def node() -> Any:
    return load_custom_node(COMFYUI_PLUGIN).NODE_CLASS_MAPPINGS["LoadSdcompressEngine"]


@pytest.fixture
def parts(node: Any) -> Any:
    """Returns the plugin's modules, as they were imported with the node."""
    package = node.__module__.rpartition(".")[0]
    return SimpleNamespace(
        **{
            name: sys.modules[f"{package}.{name}"]
            for name in ("calls", "folders", "layout", "loras", "model", "node", "whole_model")
        }
    )
