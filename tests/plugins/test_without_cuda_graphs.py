"""Both plugins report once why an engine runs without the CUDA graphs that the user has asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .webui_cases import TITLE, sample, words
from .webui_host import WebUI

REASON = "This session cannot use the graph capture feature"


def test_the_webui_prints_it_once(webui: WebUI, capsys: pytest.CaptureFixture[str]) -> None:
    webui.opts.sd_unet = TITLE
    sample(webui, cond=words(1), uncond=words(2), steps=1)
    (runner,) = webui.sd_unet.current_unet.hosted.engines.runners.values()
    assert "without CUDA graphs" not in capsys.readouterr().out
    runner.graph_failure = REASON  # on a GPU, ONNX Runtime may refuse a graph, or a capture may fail
    sample(webui, cond=words(1), uncond=words(2), steps=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "without CUDA graphs" in line]
    assert lines == [f"*** sdcompress: {TITLE} runs without CUDA graphs: {REASON}"]


def test_comfyui_logs_it_once(parts: Any, models: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = parts.model.EngineModel(parts.folders.read_folder("tiny", models / "tiny"), {"cuda_graph": True})
    arguments = torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 77, 96)
    model(*arguments)  # on the CPU an ONNX graph runs without, whatever the node asks for
    assert not caplog.records
    model._unet.runner.graph_failure = REASON
    for _ in range(2):
        model(*arguments)
    assert [record.message for record in caplog.records] == [f"tiny runs without CUDA graphs: {REASON}"]
