"""A small pipeline and its exports, which several test files share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdcompress.backends.subjects import small_unet
from sdcompress.export import onnx_file
from sdcompress.export.onnx import ExportResult, export_onnx


@pytest.fixture(scope="session")
def small_pipeline(random_pipeline: Any) -> Any:
    """Stable Diffusion's operators with few of each, so that an export takes seconds: random weights, fp32, CPU.

    The UNet and the VAE have two levels, the text encoder two layers.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text = CLIPTextModel(CLIPTextConfig(**random_pipeline.text_encoder.config.to_dict() | {"num_hidden_layers": 2}))
    return with_parts(
        random_pipeline, unet=small_unet(random_pipeline.unet.config), vae=vae.eval(), text_encoder=text.eval()
    )


def with_parts(pipeline: Any, **parts: Any) -> Any:
    """A pipeline of the same class with other components."""
    return type(pipeline)(**(pipeline.components | {"requires_safety_checker": False} | parts))


@pytest.fixture(scope="session")
def small_folder(small_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_pipeline` as a diffusers folder."""
    folder = tmp_path_factory.mktemp("models") / "small"
    small_pipeline.save_pretrained(folder)
    return folder


Exports = Callable[..., ExportResult]


@pytest.fixture(scope="session")
def small_exports(small_pipeline: Any, make_once: Callable[..., Any]) -> Exports:
    """Exports of `small_pipeline` by the options of `export_onnx`; each is made once.

    Nearly all of an export's time is torch's trace, which depends on neither host nor runtime. Exports of one precision
    share it; all that follows the trace is done for each.
    """
    traces: dict[Any, Any] = {}
    results: dict[Any, ExportResult] = {}
    trace = onnx_file.trace_graph

    def trace_once(graph: Any, wanted: Any, opset: int) -> Any:
        key = (wanted.component, wanted.outputs[0].dtype, opset)
        if key not in traces:
            traces[key] = trace(graph, wanted, opset)
        return torch.onnx.ONNXProgram(traces[key].model.clone(), traces[key].exported_program)

    def export(**options: Any) -> ExportResult:
        key = tuple(sorted(options.items()))
        if key not in results:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(onnx_file, "trace_graph", trace_once)
                results[key] = make_once(
                    "small " + ", ".join(f"{name} {value}" for name, value in key),
                    lambda folder: export_onnx(small_pipeline, folder, source={"pipeline": "0" * 64}, **options),
                )
        return results[key]

    return export


@pytest.fixture
def stop_at_call(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, int], None]:
    """Returns a function (objective class, number): this call of its `compute_losses` is interrupted, as by Ctrl-C."""

    def stop(objective: Any, number: int) -> None:
        genuine, calls = objective.compute_losses, 0

        def compute(self: Any, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise KeyboardInterrupt
            return genuine(self, *args)

        monkeypatch.setattr(objective, "compute_losses", compute)

    return stop
