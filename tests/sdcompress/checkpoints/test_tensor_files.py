"""Whatever a weight file holds, its tensors are read or it is refused in one line, and no code from it runs."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sdcompress_engines.errors import ModelError, SdCompressError

from sdcompress.checkpoints.tensor_files import read_pickle
from sdcompress.checkpoints.weights import open_weights
from sdcompress.models.locate import locate_pipeline

QUICK = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
STATE = {f"model.diffusion_model.input_blocks.{i}.0.weight": torch.ones(4, 4) for i in range(3)}


class Code:
    """A pickle of it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def check_refusal(error: SdCompressError) -> None:
    assert len(str(error)) < 600
    assert "\n" not in str(error)


@QUICK
@given(data=st.data(), new=st.booleans())
def test_a_mutated_pickle_is_read_or_refused_in_one_line(tmp_path: Path, data: st.DataObject, new: bool) -> None:
    file = tmp_path / "a.ckpt"
    torch.save(STATE, file, _use_new_zipfile_serialization=new)
    content = bytearray(file.read_bytes())
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), max_size=5)):
        content[min(place, len(content) - 1)] = byte
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        weights = open_weights(file)
        assert all(weights.read(key).shape == shape for key, shape in weights.shapes.items())
    except SdCompressError as error:
        check_refusal(error)


@QUICK
@given(program=st.binary(max_size=40).map(lambda tail: b"\x80\x02" + tail))
def test_any_pickle_program_is_a_value_or_refused_in_one_line(tmp_path: Path, program: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(program)
    with pytest.raises(SdCompressError) as refusal:
        open_weights(tmp_path / "a.pt")
    check_refusal(refusal.value)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_with_code_is_not_run(tmp_path: Path, new: bool) -> None:
    torch.save({"a": Code(tmp_path / "written")}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=new)
    with pytest.raises(ModelError, match="more than tensors"):
        open_weights(tmp_path / "a.ckpt")
    assert not (tmp_path / "written").exists()


def test_a_pickle_that_contains_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["state_dict"] = state
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(ModelError, match="holds no tensors"):
        open_weights(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**12),
        torch.sparse_coo_tensor(
            torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**9, 10**9), check_invariants=True
        ),
        torch.zeros(10**6, device="meta"),
    ],
    ids=["repeated", "sparse", "without numbers"],
)
def test_a_tensor_that_is_larger_than_the_file_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save(STATE | {"x": tensor}, tmp_path / "a.ckpt")
    with pytest.raises(ModelError, match="does not hold all numbers of x"):
        open_weights(tmp_path / "a.ckpt")


@pytest.mark.parametrize("size", [2**63, 17 * 2**20, 2**64 - 1])
def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", size) + b"{" * 100)
    with pytest.raises(ModelError, match=r"header has .* MiB"):
        open_weights(tmp_path / "a.safetensors")


@QUICK
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_mutated_safetensors_file_is_read_or_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    file = tmp_path / "a.safetensors"
    save_file(STATE, file)
    content = bytearray(file.read_bytes())
    for place, byte in changes:
        content[place] = byte
    file.write_bytes(content)
    try:
        weights = open_weights(file)
        assert all(weights.read(key).shape == shape for key, shape in weights.shapes.items())
    except SdCompressError as error:
        check_refusal(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_pointer_of_git_lfs_is_called_so(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265146304\n")
    with pytest.raises(ModelError, match=r"is a pointer of Git LFS.*git lfs pull"):
        open_weights(file)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".bin"])
def test_only_regular_files_are_opened(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"folder{suffix}").mkdir()
    for name, kind in (("pipe", "a named pipe"), ("zero", "a device"), ("folder", "a folder")):
        with pytest.raises(ModelError, match=f"{name}{suffix}: is {kind}"):
            open_weights(tmp_path / f"{name}{suffix}")
    torch.save(STATE, tmp_path / "real.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    assert read_pickle(tmp_path / "link.pt").keys() == STATE.keys()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_model_folder_with_a_pipe_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    os.mkfifo(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors: is a named pipe"):
        locate_pipeline(tmp_path)
