"""Hosts and engines for the tests of installs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdcompress.hosts.find import find_host

from .trees import HOSTS, make_engine, make_tree


@pytest.fixture(autouse=True)
def plain_permissions() -> Iterator[None]:
    old = os.umask(0o022)
    yield
    os.umask(old)


@pytest.fixture(params=HOSTS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """Returns a host and its folder, whose name has spaces and letters of other alphabets."""
    return find_host(request.param, make_tree(tmp_path / "größe 模型 (2)", request.param))


@pytest.fixture
def comfyui(tmp_path: Path) -> tuple[Any, Path]:
    return find_host("comfyui", make_tree(tmp_path / "ComfyUI", "comfyui"))


@pytest.fixture
def webui(tmp_path: Path) -> tuple[Any, Path]:
    return find_host("webui", make_tree(tmp_path / "webui", "webui"))


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return make_engine(tmp_path / "made/engine", "comfyui")
