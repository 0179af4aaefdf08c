"""Planted faults: their places, that they leave no trace, that the gate detects them, and the least one it detects."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sdcompress_bench import faults, fidelity
from sdcompress_bench.faults import KINDS, Place, candidates, places, plant, sensitivity, spread, thin
from sdcompress_bench.fidelity import Probe
from sdcompress_engines.errors import ModelError
from sdcompress_engines.exactness import relative_l2


@pytest.fixture(scope="module")
def unet() -> Any:
    """A UNet of two levels with every kind of layer; all weights are random, so that each has an effect."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


@pytest.fixture(scope="module")
def probe() -> Probe:
    noise = torch.Generator().manual_seed(0)
    return Probe(torch.randn(3, 1, 4, 8, 8, generator=noise), (1, 501, 901), torch.randn(1, 77, 16, generator=noise))


def predict(unet: Any, probe: Probe) -> torch.Tensor:
    return fidelity.predict(SimpleNamespace(unet=unet), probe)


def worst(unet: Any, probe: Probe, reference: torch.Tensor) -> float:
    errors = [relative_l2(output, expected) for output, expected in zip(predict(unet, probe), reference, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_spread_over_families_and_depth(unet: Any, kind: Any) -> None:
    chosen = places(unet, kind, 10, seed=1)
    assert len(set(chosen)) == 10
    assert {place.family for place in chosen} == {place.family for place in candidates(unet, kind)}
    assert {"down_blocks", "up_blocks"} <= {place.layer.split(".")[0] for place in chosen}
    assert chosen == places(unet, kind, 10, seed=1)
    assert chosen != places(unet, kind, 10, seed=2)


def test_every_layer_and_every_head_is_a_place(unet: Any) -> None:
    layers = {name for name, module in unet.named_modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))}
    assert {place.layer for place in candidates(unet, "scaled")} == layers
    heads = candidates(unet, "head")
    assert len(heads) == sum(module.heads for module in unet.modules() if hasattr(module, "to_out"))
    assert {(place.family, "attn2" in place.layer) for place in heads} == {
        ("self-attention", False),
        ("cross-attention", True),
    }
    assert set(spread(heads, len(heads))) == set(heads)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_changes_the_output_and_leaves_no_trace(unet: Any, probe: Probe, kind: Any) -> None:
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    reference = predict(unet, probe)
    for place in places(unet, kind, 4):
        with plant(unet, kind, place):
            assert not torch.equal(predict(unet, probe), reference)
        with pytest.raises(KeyboardInterrupt), plant(unet, kind, place):
            raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert torch.equal(predict(unet, probe), reference)


def test_a_scaled_weight_is_the_only_one_that_changes(unet: Any) -> None:
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    (place,) = places(unet, "scaled", 1)
    with plant(unet, "scaled", place):
        changed = {name for name, tensor in unet.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {f"{place.layer}.weight"}
        assert torch.equal(unet.get_submodule(place.layer).weight, before[f"{place.layer}.weight"] * 1.02)


def test_a_zeroed_head_is_the_head_whose_values_are_gone(unet: Any, probe: Probe) -> None:
    for place in places(unet, "head", 4):
        other = copy.deepcopy(unet)
        attention = other.get_submodule(place.layer.removesuffix(".to_out.0"))
        width = attention.to_v.out_features // attention.heads
        assert place.head is not None
        with torch.no_grad():
            attention.to_v.weight[place.head * width : (place.head + 1) * width] = 0
        with plant(unet, "head", place):
            torch.testing.assert_close(predict(unet, probe), predict(other, probe))


def test_overflow_takes_the_largest_values_of_a_layer_and_saturating_clamps_them() -> None:
    layer = torch.nn.Linear(8, 500)
    given = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    clean = layer(given)
    holder = torch.nn.ModuleDict({"layer": layer})
    place = Place("layer", "linear")
    with plant(holder, "overflow", place):
        infinite = layer(given)
    with plant(holder, "saturated", place):
        clamped = layer(given)
    over = infinite.isinf()
    assert over.sum() == round(faults.OVERFLOW_SHARE * clean.numel()) == 20
    assert clean[over].abs().min() > clean[~over].abs().max()
    assert torch.equal(infinite[~over], clean[~over])
    assert torch.equal(infinite[over].sign(), clean[over].sign())
    assert torch.equal(clamped[~over], clean[~over])
    assert torch.equal(clamped[over], clean[over].sign() * clean[~over].abs().max())
    with plant(holder, "overflow", place):
        assert layer(given[:1].repeat(3, 1)).isinf().any(dim=1).all(), (
            "equal rows, as a time embedding has, overflow together"
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("timestep", [0, 1, 2])
@pytest.mark.parametrize("floor", [None, 1e-3])
def test_a_value_that_is_not_finite_never_passes_the_gate(
    probe: Probe, bad: float, timestep: int, floor: float | None
) -> None:
    output = probe.latents.clone()
    output[timestep, 0, 0, 0, 0] = bad
    error = relative_l2(output, probe.latents)
    assert not fidelity.gate(error, floor)["passed"]


def test_an_overflow_anywhere_fails_the_gate_and_a_saturated_one_stays_finite(unet: Any, probe: Probe) -> None:
    probe = thin(probe, 1, 1)
    reference = predict(unet, probe)
    for place in candidates(unet, "overflow"):
        with plant(unet, "overflow", place):
            assert not fidelity.gate(worst(unet, probe, reference), 1.0)["passed"], place
    for place in places(unet, "saturated", 4):
        with plant(unet, "saturated", place):
            assert math.isfinite(worst(unet, probe, reference))


def test_a_gate_at_the_error_of_2_percent_detects_2_percent_at_the_least(unet: Any, probe: Probe) -> None:
    reference = predict(unet, probe)
    for place in places(unet, "scaled", 4):
        with plant(unet, "scaled", place):
            limit = worst(unet, probe, reference)
        assert sensitivity(unet, probe, limit, count=4).scaled[str(place)] == pytest.approx(0.02, rel=1e-3)
        with_floor = sensitivity(unet, probe, limit, floor=0.6 * limit, count=4).scaled[str(place)]
        assert with_floor == pytest.approx(0.02 * 0.8, rel=0.01), "a backend's own error adds in squares"


def test_just_more_than_the_least_change_fails_the_gate_and_just_less_passes(unet: Any, probe: Probe) -> None:
    reference, limit = predict(unet, probe), 2e-3
    found = sensitivity(unet, probe, limit, count=12)
    assert found.places == 12
    assert found.blind < 12
    for place in places(unet, "scaled", 12):
        change = found.scaled[str(place)]
        for share, over in ((1.05, True), (0.95, False)):
            if change is not None:
                with plant(unet, "scaled", place, 1 + share * change):
                    assert (worst(unet, probe, reference) > limit) is over, place
        if change is None:
            with plant(unet, "scaled", place, 2.0):
                assert worst(unet, probe, reference) <= limit
    for name, error in found.zeroed.items():
        place = next(place for place in candidates(unet, "head") if str(place) == name)
        with plant(unet, "head", place):
            assert worst(unet, probe, reference) == pytest.approx(error, rel=1e-4)


def test_a_very_wide_gate_detects_nothing_and_a_very_narrow_one_all(unet: Any, probe: Probe) -> None:
    blind = sensitivity(unet, probe, 1e3, count=5)
    assert (blind.least, blind.least_low, blind.blind, blind.heads_unseen) == (None, None, 5, 5)
    sharp = sensitivity(unet, probe, 1e-7, count=5)
    assert sharp.blind == sharp.heads_unseen == 0
    assert sharp.least is not None
    assert sharp.least < 1e-2


def test_a_limit_for_each_timestep_applies_to_that_timestep(unet: Any, probe: Probe) -> None:
    one, same = (sensitivity(unet, probe, limit, count=4) for limit in (1e-3, [1e-3] * 3))
    assert one == same
    only_the_last = sensitivity(unet, probe, [1e3, 1e3, 1e-3], count=4)
    assert one.least is not None
    assert only_the_last.least is not None
    assert only_the_last.least >= one.least
    assert sensitivity(unet, probe, [1e3, 1e-3, 1e3], count=4, timesteps=2).blind == 4, (
        "of three timesteps the first and the last are left"
    )


def test_a_thinned_probe_keeps_its_ends(probe: Probe) -> None:
    two = thin(probe, 2, 1)
    assert two.timesteps == (1, 901)
    assert torch.equal(two.latents, probe.latents[[0, 2], :1])
    assert (
        thin(
            Probe(probe.latents.repeat(1, 3, 1, 1, 1), probe.timesteps, probe.encoder_hidden_states.repeat(3, 1, 1)),
            3,
            2,
        ).encoder_hidden_states.shape[0]
        == 2
    )
    assert thin(probe, 9, 9).timesteps == probe.timesteps


def test_other_models_and_limits_that_judge_nothing_are_refused(unet: Any, probe: Probe) -> None:
    runner = SimpleNamespace(dtype=torch.float32)
    with pytest.raises(ModelError, match="no PyTorch UNet in fp32"):
        sensitivity(SimpleNamespace(unet=runner), probe, 1e-4)
    with pytest.raises(ModelError, match="no PyTorch UNet in fp32"):
        sensitivity(copy.deepcopy(unet).to(torch.bfloat16), probe, 1e-4)
    for limit, floor in ((math.nan, 0.0), (math.inf, 0.0), (0.0, 0.0), (1e-3, math.nan)):
        with pytest.raises(ValueError, match="judges nothing"):
            sensitivity(unet, probe, limit, floor)
    with pytest.raises(ModelError, match="at most the"):
        places(unet, "head", 1000)
    with pytest.raises(ModelError, match="no place for a fault"):
        places(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), "head", 1)
