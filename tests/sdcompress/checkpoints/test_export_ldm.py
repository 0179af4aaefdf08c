"""`export_ldm`: one LDM file of a pipeline, which WebUIs load natively.

`test_read_and_write` checks that its tensors have the right keys.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from sdcompress_engines.errors import ArtifactError, ModelError, StorageError, UsageError

from sdcompress.checkpoints.ldm_keys import METADATA_KEY, UNET, unet_keys
from sdcompress.checkpoints.read import load_single_file
from sdcompress.checkpoints.write import export_ldm
from sdcompress.families.configs import CONFIGS
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student

PRESETS = [None, "bk-base", "bk-small", "bk-tiny"]
COMFYUI = os.environ.get("SDCOMPRESS_COMFYUI")


def prune(pipeline: Any, preset: str | None) -> Any:
    """Returns a pipeline with the student's UNet, or the pipeline itself without a preset."""
    if preset is None:
        return pipeline
    parts = {name: part for name, part in pipeline.components.items() if name != "unet"}
    return type(pipeline)(
        unet=build_student(pipeline.unet, make_plan(pipeline.unet.config, preset)),
        **parts,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_written_file_reads_back_as_the_same_model_in_half_precision(
    preset: str | None, random_pipeline: Any, tmp_path: Path
) -> None:
    pipeline = prune(random_pipeline, preset)
    file = export_ldm(pipeline, tmp_path / "student.safetensors")
    stored: Any = load_single_file(file)
    for name in ("unet", "vae", "text_encoder"):
        read = getattr(stored, name).state_dict()
        written = getattr(pipeline, name).state_dict()
        assert read.keys() == written.keys()
        for key, weight in written.items():
            assert torch.equal(read[key], weight.half().float()), key
    pipeline.save_pretrained(tmp_path / "folder")
    by_diffusers = (
        type(pipeline)
        .from_single_file(str(file), config=str(tmp_path / "folder"), local_files_only=True, torch_dtype=torch.float16)
        .to(torch.float32)
    )
    sample = torch.randn(1, 4, 16, 16), torch.tensor(500), torch.randn(1, 77, 96)
    with torch.no_grad():
        assert torch.equal(by_diffusers.unet(*sample).sample, stored.unet(*sample).sample)
        assert torch.equal(by_diffusers.vae.decode(sample[0]).sample, stored.vae.decode(sample[0]).sample)
        ids = torch.arange(77)[None]
        assert torch.equal(by_diffusers.text_encoder(ids)[0], stored.text_encoder(ids)[0])


def test_every_tensor_is_contiguous_and_has_the_requested_precision(random_pipeline: Any, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        with safe_open(
            export_ldm(
                random_pipeline,
                tmp_path / "a.safetensors",
                dtype,
                metadata={"modelspec.title": "sd-tiny", "sha256": "0" * 64},
                force=True,
            ),
            "pt",
        ) as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {dtype}  # noqa: SIM118
            assert all(file.get_tensor(key).is_contiguous() for key in file.keys())  # noqa: SIM118
            metadata = file.metadata()
        assert (metadata["modelspec.title"], metadata["sha256"], metadata["format"]) == ("sd-tiny", "0" * 64, "pt")
        assert json.loads(metadata[METADATA_KEY])["model_index.json"]


def test_the_same_model_gives_the_same_bytes(random_pipeline: Any, tmp_path: Path) -> None:
    files = {
        export_ldm(
            random_pipeline, tmp_path / f"{number}.safetensors", metadata={"title": 'é "x"\n', "b": "2", "a": "1"}
        ).read_bytes()
        for number in range(4)
    }
    assert len(files) == 1


def test_an_existing_file_is_replaced_only_by_force(random_pipeline: Any, tmp_path: Path) -> None:
    file = tmp_path / "größe 1.safetensors"
    file.write_text("another file")
    with pytest.raises(ArtifactError, match=r"größe 1\.safetensors: exists.*--force"):
        export_ldm(random_pipeline, file)
    assert file.read_text() == "another file"
    assert export_ldm(random_pipeline, file, force=True) == file
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("name", ["student", "student.ckpt", "folder.safetensors"])
def test_a_path_that_is_no_safetensors_file_is_refused(name: str, random_pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UsageError, match=r"a file that ends in \.safetensors"):
        export_ldm(random_pipeline, tmp_path / name)


@pytest.mark.parametrize("value", [1e6, float("inf"), float("nan")])
def test_weights_that_half_precision_cannot_hold_are_refused(
    value: float, random_pipeline: Any, tmp_path: Path
) -> None:
    weight = random_pipeline.vae.decoder.conv_out.bias
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0] = value
        with pytest.raises(
            ModelError,
            match=r"first_stage_model\.decoder\.conv_out\.bias: 1 weights do not fit into float16.*--precision fp32",
        ):
            export_ldm(random_pipeline, tmp_path / "a.safetensors")
        assert not list(tmp_path.iterdir())
        if value == 1e6:
            export_ldm(random_pipeline, tmp_path / "a.safetensors", torch.bfloat16)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_file_in_place_of_a_folder_is_refused(random_pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        export_ldm(random_pipeline, tmp_path / "file/a.safetensors")


@pytest.mark.skipif(not COMFYUI, reason="SDCOMPRESS_COMFYUI names no checkout of ComfyUI")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("family", "expected"), [("sd1", "SD15"), ("sd2", "SD20")])
@pytest.mark.parametrize(
    ("preset", "pairs"),
    [(None, [2, 2, 2, 2]), ("bk-base", [1, 1, 1, 1]), ("bk-small", [1, 1, 1, 1]), ("bk-tiny", [1, 1, 1])],
)
def test_comfyui_detects_teachers_and_students(
    preset: str | None, pairs: list[int], family: str, expected: str
) -> None:
    from diffusers import UNet2DConditionModel

    if COMFYUI not in sys.path:
        sys.path.insert(0, str(COMFYUI))
    from comfy.cli_args import args

    args.cpu = True
    import comfy.model_detection

    config = json.loads((CONFIGS / family / "unet/config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            config if preset is None else make_plan(config, preset).student_config()
        )
        state = unet.state_dict()
    weights = {UNET + ldm: state[name] for name, ldm in unet_keys(state).items()}
    assert comfy.model_detection.unet_prefix_from_state_dict(weights) == UNET
    detected = SimpleNamespace(**comfy.model_detection.detect_unet_config(weights, UNET))
    assert detected.num_res_blocks == pairs
    assert type(comfy.model_detection.model_config_from_unet(weights, UNET)).__name__ == expected
