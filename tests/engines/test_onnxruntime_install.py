"""What ONNX Runtime needs on a device is checked before a session starts, and each fault names its command."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from sdcompress_engines.errors import BackendMissing
from sdcompress_engines.manifest import write_manifest
from sdcompress_engines.runners.onnxruntime_install import missing
from sdcompress_engines.runners.onnxruntime_session import SessionRequest, check_provider, precision_options

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def test_onnxruntime_for_the_cpu_is_missing_on_cuda_with_the_command_that_replaces_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    assert missing() is None
    assert missing("cpu") is None
    reason = missing("cuda:1") or ""
    assert "runs on the CPU only" in reason
    assert 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "sdcompress[gpu]"' in reason
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    assert missing("cuda") is None


def test_without_onnxruntime_each_device_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "sdcompress[cpu]" in (missing() or "")
    assert "sdcompress[gpu]" in (missing("cuda") or "")


@pytest.mark.parametrize(
    ("onnxruntimes", "torchs", "command"),
    [
        ("13.0", "12.8", "onnxruntime-gpu<1.27"),
        ("12.8", "13.0", "pip install --upgrade onnxruntime-gpu"),
        ("13.0", "13.2", None),
        ("", "13.0", None),
        ("13.0", None, None),
    ],
)
def test_another_cuda_than_torchs_is_said_before_a_session_fails(
    monkeypatch: pytest.MonkeyPatch, onnxruntimes: str, torchs: str | None, command: str | None
) -> None:
    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "cuda_version", onnxruntimes, raising=False)
    monkeypatch.setattr(torch.version, "cuda", torchs)
    monkeypatch.setattr(ctypes, "CDLL", load)
    reason = missing("cuda")
    if command is None:
        assert reason is None
        return
    assert command in (reason or "")
    assert f"needs CUDA {onnxruntimes[:2]}" in (reason or "")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)  # that CUDA is installed, too
    assert missing("cuda") is None


@pytest.mark.parametrize(
    ("flags", "precision", "announced"),
    [
        (("FP16", "BF16"), "fp16", {"trt_fp16_enable": "1"}),
        (("FP16", "BF16"), "bf16", {"trt_bf16_enable": "1"}),
        (("FP16", "BF16"), "fp32", {}),
        (("REFIT",), "fp16", {}),  # TensorRT 11
        (None, "fp16", {"trt_fp16_enable": "1"}),  # TensorRT's libraries without its Python package
    ],
)
def test_half_precision_is_announced_where_tensorrt_knows_the_flag(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...] | None,
    precision: str,
    announced: dict[str, str],
) -> None:
    library = (
        None if flags is None else SimpleNamespace(BuilderFlag=SimpleNamespace(**dict.fromkeys(flags)), __version__="0")
    )
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    (tmp_path / "unet.onnx").touch()
    write_manifest(tmp_path, "onnx", config={"precision": precision})
    assert precision_options(tmp_path / "unet.onnx") == announced


@pytest.mark.parametrize(("version", "said"), [("11.4.0.106", "11.4.0.106 is installed"), (None, "no TensorRT is")])
def test_a_tensorrt_provider_that_does_not_start_names_the_tensorrt_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, said: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None if version is None else SimpleNamespace(__version__=version))
    request = SessionRequest(tmp_path / "unet.onnx", "tensorrt")
    with pytest.raises(BackendMissing, match=rf'did not start.*pip install "tensorrt<11".*{said}'):
        check_provider(request, {"TensorrtExecutionProvider"}, [CUDA, CPU], {})
