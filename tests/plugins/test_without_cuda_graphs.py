"""Both plugins say once why an engine runs without the CUDA graphs that a person has asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .test_comfyui_plugin import graph, models, node, parts  # noqa: F401 (fixtures)
from .test_webui_plugin import TITLE, installed, sample, tiny_graph, webui, words  # noqa: F401 (fixtures)
from .webui_host import WebUI

REASON = "This session cannot use the graph capture feature"


def test_the_webui_prints_it_once(webui: WebUI, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    webui.opts.sd_unet = TITLE
    sample(webui, cond=words(1), uncond=words(2), steps=1)
    (runner,) = webui.sd_unet.current_unet.hosted._runners.values()
    assert "without CUDA graphs" not in capsys.readouterr().out
    runner.graph_failure = REASON  # as ONNX Runtime refuses one, or a capture fails, on a GPU
    sample(webui, cond=words(1), uncond=words(2), steps=2)
    said = [line for line in capsys.readouterr().out.splitlines() if "without CUDA graphs" in line]
    assert said == [f"*** sdcompress: {TITLE} runs without CUDA graphs: {REASON}"]


def test_comfyui_logs_it_once(parts: Any, models: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    model = parts.model.EngineModel(parts.folders.read_folder("tiny", models / "tiny"), {"cuda_graph": True})
    arguments = torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 77, 96)
    model(*arguments)  # on the CPU, where an ONNX graph runs without, whatever the node asks for
    assert not caplog.records
    model._unet.runner.graph_failure = REASON
    for _ in range(2):
        model(*arguments)
    assert [record.message for record in caplog.records] == [f"tiny runs without CUDA graphs: {REASON}"]
