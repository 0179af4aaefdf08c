"""Single-file checkpoints without configs, as checkpoint sites offer them: every dialect loads with equal weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdcompress.checkpoints.ldm_keys import UNET
from sdcompress.checkpoints.read import load_single_file
from sdcompress.checkpoints.write import ldm_state_dict
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student

from .small_models import Dialect, assert_equal, unets, with_unet, write_bare

DIALECTS: dict[str, Dialect] = {
    "plain": lambda state: state,
    "nested": lambda state: {"state_dict": {"state_dict": state}, "global_step": 470000},
    "with an EMA copy and training's leftovers": lambda state: {
        "state_dict": (
            state
            | {
                "model_ema." + key.removeprefix("model.").replace(".", ""): torch.zeros_like(value)
                for key, value in unets(state).items()
            }
            | {"model_ema.decay": torch.tensor(0.9), "betas": torch.zeros(1000), "logvar": torch.zeros(1000)}
        )
    },
    "EMA alone": lambda state: {
        "model_ema." + key.removeprefix("model.").replace(".", "") if key.startswith(UNET) else key: value
        for key, value in state.items()
    },
    "a VAE under vae.": lambda state: {
        key.replace("first_stage_model.", "vae."): value for key, value in state.items()
    },
    "a text encoder of 2022": lambda state: {
        key.replace("transformer.text_model.", "transformer."): value for key, value in state.items()
    },
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_checkpoint_loads_in_every_dialect(dialect: str, suffix: str, sd1_like: Any, tmp_path: Path) -> None:
    content = DIALECTS[dialect]({key: value.detach() for key, value in ldm_state_dict(sd1_like).items()})
    file = tmp_path / f"a.{suffix}"
    if suffix == "ckpt":
        torch.save(content, file)
    else:
        while "state_dict" in content:
            content = content["state_dict"]
        save_file({key: value.clone(memory_format=torch.contiguous_format) for key, value in content.items()}, file)
    loaded: Any = load_single_file(file)
    for name in ("unet", "vae", "text_encoder"):
        loaded_state, original_state = getattr(loaded, name).state_dict(), getattr(sd1_like, name).state_dict()
        assert loaded_state.keys() == original_state.keys()
        assert all(torch.equal(loaded_state[key], original_state[key]) for key in original_state)
    assert loaded.scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("preset", ["bk-base", "bk-small", "bk-tiny"])
def test_a_student_without_configs_is_recognized_by_its_weights(preset: str, sd1_like: Any, tmp_path: Path) -> None:
    student = with_unet(sd1_like, build_student(sd1_like.unet, make_plan(sd1_like.unet.config, preset)))
    loaded: Any = load_single_file(write_bare(student, tmp_path / "a.safetensors"))
    student.unet.config["sample_size"] = loaded.unet.config.sample_size = 16
    assert_equal(student, loaded)


def test_a_pickle_of_before_2020_loads(sd1_like: Any, tmp_path: Path) -> None:
    torch.save(ldm_state_dict(sd1_like), tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    loaded: Any = load_single_file(tmp_path / "a.ckpt")
    assert torch.equal(loaded.unet.conv_in.weight, sd1_like.unet.conv_in.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_to_fp32(dtype: torch.dtype, sd1_like: Any, tmp_path: Path) -> None:
    loaded: Any = load_single_file(write_bare(sd1_like, tmp_path / "a.safetensors", dtype))
    for name in ("unet", "vae", "text_encoder"):
        parameters = dict(getattr(loaded, name).named_parameters())
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        assert all(
            torch.equal(parameters[key], p.to(dtype).float()) for key, p in getattr(sd1_like, name).named_parameters()
        )


def test_v_prediction_is_read_from_the_file_and_never_from_its_name(sd1_like: Any, tmp_path: Path) -> None:
    state = {key: value.clone(memory_format=torch.contiguous_format) for key, value in ldm_state_dict(sd1_like).items()}
    save_file(state | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "sd-v-prediction-768-v.safetensors")
    said: Any = load_single_file(tmp_path / "a.safetensors")
    assert said.scheduler.config.prediction_type == "v_prediction"
    assert said.scheduler.config.rescale_betas_zero_snr
    named: Any = load_single_file(tmp_path / "sd-v-prediction-768-v.safetensors")
    assert named.scheduler.config.prediction_type == "epsilon"
