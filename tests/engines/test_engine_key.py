"""Everything that decides an engine, and nothing else, changes its key."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.store import EngineStore

from .stored_engines import KEY, builder


def test_a_key_is_the_same_from_python_and_from_the_manifest(store: EngineStore) -> None:
    entry, hit = store.get_or_build(KEY, builder())
    assert not hit
    assert entry.digest == KEY.digest
    assert EngineKey.of(entry.manifest.config, "unet").digest == KEY.digest
    assert entry.manifest.config["keys"] == {"unet": KEY.digest}
    assert entry.manifest.config["model"] == {"unet": "a" * 64}
    assert entry.manifest.config["vae_scale"] == 8
    assert entry.manifest.figures == {"unet": {"seconds": 1.5}}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "b" * 64},
        {"component": "vae_decoder"},
        {"precision": "bf16"},
        {"signature": "webui"},
        {"flavour": "tensorrt"},
        {"version": "1.7.2.1"},
        {"compute_capabilities": ((8, 9), (12, 0))},
        {"platform": "linux-aarch64"},
        {"profiles": KEY.profiles * 2},
        {"profiles": ({"sample": ((1, 4, 32, 32), (2, 4, 64, 64), (8, 4, 96, 97))},)},
        {"options": {"optimization_level": 4, "timing_cache": True}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_decides_an_engine_changes_its_key(change: dict[str, Any]) -> None:
    assert replace(KEY, **change).digest != KEY.digest


def test_what_does_not_bind_an_engine_is_not_in_its_key() -> None:
    assert replace(KEY, platform="windows-amd64").digest == KEY.digest  # an RTX engine goes over to another system
    plain = replace(KEY, flavour="tensorrt", version="10.14.1.48")
    assert replace(plain, platform="windows-amd64").digest != plain.digest
    assert replace(plain, version="10.14.2.1").digest != plain.digest
    forward = replace(plain, options={"version_compatible": True})
    assert replace(forward, version="10.14.2.1").digest == forward.digest
    assert replace(forward, version="10.15.0.1").digest != forward.digest
    ampere = replace(plain, options={"hardware_compatible": "ampere_plus"})
    assert replace(ampere, compute_capabilities=((12, 0),)).digest == ampere.digest
    same = replace(plain, options={"hardware_compatible": "same_compute_capability"})
    assert replace(same, compute_capabilities=((12, 0),)).digest != same.digest
    two = replace(KEY, compute_capabilities=((8, 9), (12, 0)))
    assert replace(two, compute_capabilities=((12, 0), (8, 9))).digest == two.digest


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(entry=st.sampled_from(sorted(KEY.config())), value=JSON, component=st.sampled_from(["unet", 0, 8, None]))
def test_a_manifest_with_any_value_has_a_key_or_one_error(entry: str, value: Any, component: Any) -> None:
    with suppress(ArtifactError):
        EngineKey.of(KEY.config() | {entry: value}, component)
