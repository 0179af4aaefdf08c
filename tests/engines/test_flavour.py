"""Whether an engine loads on this machine: by its version, cards and platform."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from sdcompress_engines import flavour
from sdcompress_engines.errors import (
    ArtifactError,
    BackendMissing,
    EngineMismatch,
)
from sdcompress_engines.flavour import (
    TENSORRT_RTX,
    binding,
    check_fits_here,
    obstacle,
    platform_name,
)

from .stored_engines import KEY, needs_rtx


def config_for(**changes: Any) -> dict[str, Any]:
    version = TENSORRT_RTX.version if TENSORRT_RTX.missing() is None else "1.0"
    return replace(KEY, **{"version": version, "platform": platform_name(), **changes}).config()


def with_card(patch: pytest.MonkeyPatch, card: tuple[int, int]) -> None:
    """A card that this machine lacks, as far as torch tells of it."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: card)
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some Card")


@needs_rtx
def test_version_card_and_platform_are_three_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, (12, 0))
    messages = []
    for config in (config_for(version="1.0.0.21"), config_for(), config_for(platform="plan9-mips")):
        with pytest.raises(EngineMismatch) as caught:
            check_fits_here(config, "unet.engine")
        messages.append(str(caught.value))
    version, card, system = messages
    assert "1.0.0.21" in version
    assert TENSORRT_RTX.version in version
    assert "8.9, and Some Card has 12.0" in card
    assert "--compute-capability 12.0" in card
    assert "plan9-mips" in system
    assert platform_name() in system
    assert all(
        message.startswith("unet.engine: ") and "expected" in message and "sdcompress export MODEL --trt" in message
        for message in messages
    )
    with_card(monkeypatch, (8, 9))
    check_fits_here(config_for(), "unet.engine")
    assert obstacle(config_for()) is None
    assert obstacle(config_for(version="1.0.0.21")) is not None


@needs_rtx
def test_the_cards_an_engine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    several, default = config_for(compute_capabilities=((8, 6), (12, 0))), config_for(compute_capabilities=())
    for card, fits in (
        ((7, 5), (False, False)),
        ((8, 6), (True, True)),
        ((8, 9), (False, True)),
        ((12, 0), (True, True)),
        ((12, 1), (False, True)),
    ):
        with_card(monkeypatch, card)
        assert (obstacle(several) is None, obstacle(default) is None) == fits, card


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what a machine without a GPU says")
def test_no_gpu_is_said_only_of_an_engine_that_would_load_with_one() -> None:
    with pytest.raises(BackendMissing, match="NVIDIA GPU"):
        check_fits_here(config_for(), "unet.engine")
    with pytest.raises(EngineMismatch, match=r"1\.0\.0\.21"):
        check_fits_here(config_for(version="1.0.0.21"), "unet.engine")


@pytest.mark.gpu
@needs_rtx
def test_on_a_real_card_only_engines_for_it_fit() -> None:
    card = torch.cuda.get_device_capability()
    check_fits_here(config_for(compute_capabilities=(card,)), "unet.engine")
    with pytest.raises(EngineMismatch, match=r"3\.5"):
        check_fits_here(config_for(compute_capabilities=((3, 5),)), "unet.engine")


def test_a_flavour_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendMissing, match=r"sdcompress\[trt\]"):
        check_fits_here(config_for(flavour="tensorrt", version="10.14.1"), "unet.engine")
    with pytest.raises(EngineMismatch, match="tensorrt or tensorrt-rtx"):
        check_fits_here(config_for() | {"flavour": "aitemplate"}, "unet.engine")


def test_version_compatible_engines_go_to_later_versions_only() -> None:
    fits = flavour.accepts_version
    assert fits("10.14.1.48", "10.14.1.48", False)
    assert not fits("10.14.1.48", "10.14.1.49", False)
    assert fits("10.14.1.48", "10.15.0.1", True)
    assert fits("10.14.1.48", "11.0.0.1", True)
    assert fits("8.6.1", "10.0.0.1", True)
    assert not fits("8.6.1", "11.0.0.1", True)
    assert not fits("10.15.0.1", "10.14.1.48", True)
    assert not fits("11.0.0.1", "10.14.1.48", True)
    assert not fits("10.14.1.48", "ten", True)


@pytest.mark.parametrize(
    "change",
    [
        {"flavour": None},
        {"version": 3},
        {"compute_capabilities": "89"},
        {"compute_capabilities": [[8, 9, 1]]},
        {"platform": ""},
        {"options": 5},
        {"options": {}, "flavour": "tensorrt", "compute_capabilities": []},
    ],
)
def test_a_config_that_does_not_say_what_it_is_for_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="does not say what it was built for"):
        binding(config_for() | change)
    assert obstacle(config_for() | change) is not None
    with pytest.raises(ArtifactError, match=r"^unet\.engine"):
        check_fits_here(config_for() | change, "unet.engine")
