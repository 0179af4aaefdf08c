"""Shared by the plugins' tests: a small Stable Diffusion, a student of it, a small SDXL, and their graphs for each
host.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from sdcompress_engines.manifest import read_manifest, save_manifest, write_manifest
from sdcompress_engines.signature import HOSTS

from sdcompress.export.onnx import export_onnx
from sdcompress.prune.plan import make_plan
from sdcompress.prune.student import build_student

from ..conftest import BETAS, make_tokenizer

PLUGINS = Path(__file__).parents[2] / "plugins"
WEBUI_PLUGIN = PLUGINS / "sd_webui_sdcompress"
sys.path.insert(0, str(WEBUI_PLUGIN))  # as its script does in the host


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Graphs as small as these lose more to threads that wait for one another than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def student(random_pipeline: Any) -> Any:
    """`random_pipeline` with a bk-tiny student in its UNet's place: three levels, one pair each, no middle.

    Its weights are shaken, so that it is another model than its teacher's remains.
    """
    torch.manual_seed(11)
    unet = (
        build_student(random_pipeline.unet, make_plan(dict(random_pipeline.unet.config), "bk-tiny"))
        .eval()
        .requires_grad_(False)
    )
    for weight in unet.parameters():
        weight.add_(0.02 * torch.randn_like(weight))
    return type(random_pipeline)(**(random_pipeline.components | {"unet": unet, "requires_safety_checker": False}))


@pytest.fixture(scope="session")
def student_unet(student: Any) -> Any:
    return student.unet


@pytest.fixture(scope="session")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SDXL's parts, each as small as it can be: two levels, two text encoders."""
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
    """(host, pipeline, name) → the `onnx` folder of its UNet in the host's signature, fp32.

    Tracing is what takes time, so each UNet is traced once a run; a second host, whose graph differs in names only, has
    them changed. `random_pipeline`'s is traced for other tests too. That an export names them so is held in
    `test_export`.
    """
    made: dict[tuple[str, int, str], Path] = {}

    def export(host: str, pipeline: Any, name: str) -> Path:
        traced = next((key for key in made if key[1] == id(pipeline)), None)
        key = host, id(pipeline), name
        if key in made:
            return made[key]
        source = {"pipeline": f"{id(pipeline):064x}"}
        if pipeline is random_pipeline:
            made[key] = renamed(
                request.getfixturevalue("fp32_export").folder,
                "diffusers",
                tmp_path_factory.mktemp("plugins") / name,
                host,
                name,
                source,
            )
        elif traced is not None:
            made[key] = renamed(made[traced], traced[0], tmp_path_factory.mktemp("plugins") / name, host, name, source)
        else:
            made[key] = export_onnx(
                pipeline, tmp_path_factory.mktemp("plugins") / name, host=host, source=source, name=name
            ).folder
        return made[key]

    return export


def renamed(graphs: Path, before: str, folder: Path, host: str, name: str, source: dict[str, str]) -> Path:
    """A folder of the UNet in `graphs`, which has the names of `before`, with those of `host`."""
    folder.mkdir()
    shutil.copytree(graphs / "pipeline", folder / "pipeline")
    model, manifest = onnx.load(graphs / "unet.onnx"), read_manifest(graphs)
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


def change_manifest(folder: Path, **config: Any) -> None:
    """Change entries of a manifest's config, and seal it again."""
    manifest = read_manifest(folder)
    assert manifest is not None
    manifest.config.update(config)
    save_manifest(folder, manifest)
