"""Engines without a runtime, for tests of the store: a key, a payload and builds that write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from sdcompress_engines.engine_key import EngineKey
from sdcompress_engines.flavour import (
    TENSORRT_RTX,
)
from sdcompress_engines.progress import Reporter

PAYLOAD = bytes(range(256)) * 64
KEY = EngineKey(
    model="a" * 64,
    component="unet",
    precision="fp16",
    signature="diffusers",
    flavour="tensorrt-rtx",
    version="1.7.1.116",
    compute_capabilities=((8, 9),),
    platform="linux-x86_64",
    profiles=({"sample": ((1, 4, 32, 32), (2, 4, 64, 64), (8, 4, 96, 96))},),
    options={"optimization_level": 3, "timing_cache": True},
)


class Notes(Reporter):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def show_line(self, text: str) -> None:
        self.said.append(text)


def builder(
    payload: bytes = PAYLOAD, config: Mapping[str, Any] | None = None
) -> Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]:
    """Returns a build that writes these bytes as the engine, and this config beside the key's."""

    def build(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        (folder / "unet.engine").write_bytes(payload)
        return {"vae_scale": 8, **(config or {})}, {"unet": {"seconds": 1.5}}

    return build


def refuse(folder: Path) -> Any:
    """A build that must not run."""
    raise AssertionError("built again")


needs_rtx = pytest.mark.skipif(TENSORRT_RTX.missing() is not None, reason="tensorrt-rtx is not installed")
