"""A pipeline calls its UNet alike on every backend, and a denoising loop on a GPU never waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sdcompress_engines.errors import BackendMissing, ModelError, UsageError
from sdcompress_engines.exactness import ieee_fp32, relative_l2, use_ieee_fp32
from sdcompress_engines.manifest import write_manifest

from sdcompress.backends.assemble import open_pipeline
from sdcompress.backends.torch_unet import PositionalUNet
from sdcompress.sampling import generate, keep_timesteps_on_host

SCHEDULERS = (
    "DDIMScheduler",
    "PNDMScheduler",
    "DDPMScheduler",
    "LCMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, with NumPy 2
@pytest.mark.parametrize("name", SCHEDULERS)
def test_timesteps_stay_on_the_host_and_pictures_are_the_same(random_folder: Path, name: str) -> None:
    import diffusers

    pictures = []
    for on_host in (False, True):
        pipeline = open_pipeline(random_folder, device="cpu")
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        if on_host:
            keep_timesteps_on_host(pipeline)
            pipeline.scheduler.set_timesteps(4, device="meta")
            assert pipeline.scheduler.timesteps.device == torch.device("cpu")
        pictures.append(np.asarray(generate(pipeline, ["a cat"], seeds=[1], steps=4, size_px=64)[0]))
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("size_px", [-64, 4, 100])
def test_a_size_that_the_vae_does_not_allow_is_refused(random_pipeline: Any, size_px: int) -> None:
    with pytest.raises(UsageError, match=f"size {size_px} px; expected a positive multiple of 8"):
        generate(random_pipeline, ["a cat"], seeds=[1], steps=1, size_px=size_px)


def test_a_picture_that_is_not_finite_is_refused(random_folder: Path) -> None:
    pipeline = open_pipeline(random_folder, device="cpu")
    pipeline.vae.post_quant_conv.bias.data[0] = torch.nan
    with pytest.raises(ModelError, match="not finite in float32, after 1 steps of the PNDMScheduler"):
        generate(pipeline, ["a cat"], seeds=[1], steps=1, size_px=64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_denoising_loop_never_waits_for_the_device(random_folder: Path, name: str) -> None:
    import diffusers

    pipeline = open_pipeline(random_folder, device="cuda")
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    keep_timesteps_on_host(pipeline)
    waits = []
    generate(pipeline, ["a cat"], seeds=[1], steps=4)
    for steps in (4, 8):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="called a synchronizing") as warned:
                generate(pipeline, ["a cat"], seeds=[1], steps=steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(len(warned))
    assert waits[0] == waits[1]


@pytest.mark.parametrize("folder", ["random_folder", "sdxl_folder"])
def test_a_unet_called_by_position_answers_as_it_does_by_keyword(folder: str, request: pytest.FixtureRequest) -> None:
    from sdcompress.export.components import random_inputs, signature_of

    unet: Any = open_pipeline(request.getfixturevalue(folder), device="cpu").unet
    signature = signature_of("unet", unet, "fp32")
    inputs = random_inputs(signature, unet.config, {"batch": 2, "height": 8, "width": 16, "tokens": 77}, timestep=501)
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    with torch.no_grad():
        (output,) = PositionalUNet(unet)(*inputs.values())
        expected = unet(
            inputs["sample"],
            inputs["timestep"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            added_cond_kwargs=added,
        ).sample
    assert len(inputs) == (5 if folder == "sdxl_folder" else 3)
    assert torch.equal(output, expected)


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 is on at the start of the test, and afterwards as before."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
def test_a_pipeline_in_fp32_computes_in_ieee_fp32(random_folder: Path) -> None:
    open_pipeline(random_folder, device="cpu", precision="bf16")
    assert torch.backends.cudnn.allow_tf32
    open_pipeline(random_folder, device="cpu", precision="fp32")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("tf32")
def test_exactness_for_a_block_leaves_the_settings_as_they_were() -> None:
    with ieee_fp32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    use_ieee_fp32()
    with ieee_fp32():
        pass
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
def test_convolutions_of_a_reference_are_exact_to_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 320, 64, 64, generator=generator), torch.randn(320, 320, 3, 3, generator=generator)
    exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    with ieee_fp32():
        output = torch.nn.functional.conv2d(x.cuda(), w.cuda(), padding=1).cpu().double()
    assert relative_l2(output, exact) < 1e-5


def test_a_precision_that_a_backend_does_not_compute_is_refused_before_an_export(small_folder: Path) -> None:
    with pytest.raises(BackendMissing, match="computes no bf16 on a CPU"):
        open_pipeline(small_folder, "ort", device="cpu", precision="bf16")


def test_an_export_folder_has_its_own_precision_and_files(tmp_path: Path) -> None:
    write_manifest(tmp_path, "onnx")
    each: tuple[dict[str, Any], ...] = ({"precision": "fp16"}, {"artifacts": tmp_path})
    for choices in each:
        with pytest.raises(UsageError, match="is an export folder, which has its own"):
            open_pipeline(tmp_path, "ort", device="cpu", **choices)
