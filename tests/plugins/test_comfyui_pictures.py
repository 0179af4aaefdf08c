"""Pictures of the ComfyUI node equal diffusers', however ComfyUI calls it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import EngineMismatch
from sdcompress_engines.exactness import relative_l2

from .comfyui_cases import SCHEDULER, SHAPE, change, read_config, record_calls, text
from .comfyui_host import REAL, Harness
from .comfyui_model import SDXLModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning" if REAL else "error")


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
    """Returns the latents of Euler's method with diffusers for these sigmas and noise. `table` has σ by timestep."""
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
def test_every_step_and_the_final_latents_equal_diffusers(
    first: int, second: int, host: Any, models: Path, node: Any, student: Any
) -> None:
    (patcher,) = node().load("tiny")
    calls = record_calls(patcher)
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

    given = read_config(models / "tiny", SCHEDULER) | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": zero_snr,
    }
    change(models / "tiny", **{SCHEDULER: given})
    (patcher,) = node().load("tiny")
    positive, negative = text(77, 1), text(77, 2)
    latents = host.sample(patcher, positive, negative, SHAPE, steps=3, cfg=2.0, seed=6)
    alphas = DDIMScheduler.from_config(given).alphas_cumprod.double()
    table = ((1 - alphas) / alphas).sqrt().float()
    table[-1] = patcher.model.model_sampling.sigmas[-1]  # infinite without a signal: hosts take a large number
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


def test_cond_and_uncond_give_the_same_picture_apart_and_together(harness: Harness, models: Path, node: Any) -> None:
    (patcher,) = node().load("tiny")
    together = harness.sample(patcher, text(77, 1), text(154, 2), SHAPE, 2, 4.0, 7)
    calls = record_calls(patcher)
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
    files = [models / "tiny" / name for name in ("unet.onnx", "unet.onnx.safetensors")]
    assert patcher.model_size() == sum(file.stat().st_size for file in files)
    first = host.sample(patcher, text(77, 1), text(77, 2), SHAPE, 1, 4.0, 7)
    assert engine.is_open
    assert patcher.model.model_loaded_weight_memory == patcher.model_size()
    host.unload()
    assert not engine.is_open
    assert patcher.model.model_loaded_weight_memory == 0
    assert torch.equal(host.sample(patcher, text(77, 1), text(77, 2), SHAPE, 1, 4.0, 7), first)


def test_wrappers_of_other_nodes_go_around_the_engine(host: Any, models: Path, node: Any) -> None:
    (patcher,) = node().load("tiny")
    seen = []

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((executor.class_obj, args[-1]["cond_or_uncond"]))
        return executor(*args, **kwargs)

    host.sample(host.wrap(patcher, wrapper), text(77, 1), text(77, 2), SHAPE, 2, 4.0, 7)
    assert [found for found, _ in seen] == [patcher.model.diffusion_model] * 2
    assert sorted(seen[0][1]) == [0, 1]


@pytest.mark.slow
def test_sdxl_gets_its_vector_of_text_and_sizes(
    harness: Harness, node: Any, export_unet: Callable[..., Path], xl: Any, tmp_path: Path
) -> None:
    for name in ("xl", "diffusers"):
        shutil.copytree(export_unet("comfyui", xl, "xl"), tmp_path / "models/sdcompress" / name)
    change(tmp_path / "models/sdcompress/diffusers", signature="diffusers")
    (patcher,) = node().load("xl")
    assert isinstance(patcher.model, SDXLModel)
    calls = record_calls(patcher)
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
