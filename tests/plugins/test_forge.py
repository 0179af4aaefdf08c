"""The extension in Forge: its wrapper runs the engine in the UNet's place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sdcompress_engines.errors import ArtifactError, EngineError, EngineMismatch, UsageError
from sdcompress_engines.exactness import relative_l2

from .webui_cases import (
    ROUNDING,
    TITLE,
    break_graph,
    words,
)
from .webui_forge import Patcher
from .webui_host import WebUI
from .webui_sampling import denoise, reference

X, SIGMA, CONTEXT = (
    torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4)) * 5,
    torch.tensor([5.0, 5.0]),
    words(1).expand(2, -1, -1),
)


def denoised(unet: Any) -> torch.Tensor:
    return denoise(reference(unet), X, SIGMA, CONTEXT, None)


def test_forge_runs_the_engine_in_the_unets_place(forge: WebUI, student_unet: Any, random_pipeline: Any) -> None:
    assert "list_unets" not in forge.callbacks  # Forge has the menu, but never calls the chosen entry
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
    def halves(apply_model: Any, args: Any) -> torch.Tensor:  # a tiling extension calls the model in parts
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
        forge.sd_model.forge_objects.unet = forge.sd_model.forge_objects.unet.clone()  # a later script does so
        assert relative_l2(forge.forge_denoise(X, SIGMA, CONTEXT), denoised(student_unet)) < ROUNDING


def test_forge_reports_that_the_engine_was_not_used(forge: WebUI, capsys: pytest.CaptureFixture[str]) -> None:
    with forge.job(TITLE) as job:
        forge.before_sampling(job, TITLE)
        forge.sd_model.forge_objects.unet.set_model_unet_function_wrapper(
            lambda apply_model, args: apply_model(args["input"], args["timestep"], **args["c"])
        )
        forge.forge_denoise(X, SIGMA, CONTEXT)
    assert "has not drawn this picture" in str(job.comments)


@pytest.mark.parametrize(
    ("change", "named"),
    [
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
        with pytest.raises(EngineError, match="checkpoint larger in a picture that was started with teacher"):
            forge.forge_denoise(X, SIGMA, CONTEXT)


def test_forge_refuses_an_unknown_choice(forge: WebUI) -> None:
    with forge.job("tiny") as job:
        forge.before_sampling(job, "tiny")  # as a user of the API may type it
        with pytest.raises(UsageError, match=r"no engine 'tiny'.*Refresh"):
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
        with pytest.raises(EngineMismatch, match="any more"):
            forge.forge_denoise(X, SIGMA, CONTEXT)
