"""The UNets that are measured: a teacher and its block-pruned students on the device, with reference outputs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from sdcompress_engines.exactness import ieee_fp32, relative_l2
from sdcompress_engines.runners import TorchRunner
from sdcompress_engines.signature import CONTEXT_TOKENS, Signature

from sdcompress.backends.torch_unet import PositionalUNet
from sdcompress.export.components import DTYPES, random_inputs, signature_of
from sdcompress.models.load import load_pipeline
from sdcompress.models.random import random_decoder, random_pipeline
from sdcompress.prune.presets import make_plan
from sdcompress.prune.student import build_student

from ..peaks import Peaks, measure_peaks, roofline
from ..work import Work, count_work
from .child import PartRun

TEACHER = "sd15"
MODELS = (TEACHER, "bk-tiny", "bk-small", "bk-base")
"""The most important first, because what is measured first is not lost at a cap."""
ONE_LEVEL = "one-level"
"""A UNet for the smoke run; torch needs a minute to compile anything larger."""
LIMITS = {"fp16": 1e-2, "bf16": 5e-2, "fp32": 1e-4}
"""Limit of torch's own relative L2 to IEEE fp32; a backend may have twice the error of torch."""
BACKEND_FACTOR = 2.0
CHECKED_AT, TIMED_AT = 700.0, 300.0
"""Timesteps of the inputs. A result is checked at another timestep than a graph was captured at."""
SMALL_COPY_BYTES = 2**24


class Models:
    """SD1.5's shapes with random weights, or nano with `smoke`, in the run's precision on its device.

    They are created on first use and kept. All of SD1.5's together have about 10 GB.
    """

    def __init__(self, run: PartRun) -> None:
        self.run = run

    @functools.cached_property
    def pipeline(self) -> Any:
        """The teacher's pipeline, with its scheduler and tokenizer."""
        dtype = DTYPES[self.run.precision]
        if self.run.smoke:
            return load_pipeline("nano").pipeline.to(self.run.device, dtype)
        return random_pipeline("sd1", dtype=dtype, device=self.run.device)

    @functools.cached_property
    def small_decoder(self) -> Any:
        """An `AutoencoderTiny` of TAESD's shape with random weights, for the latents of the teacher's VAE."""
        return random_decoder(self.pipeline.vae.config, dtype=DTYPES[self.run.precision], device=self.run.device)

    @functools.cache  # noqa: B019 (the object lives as long as its process)
    def unet(self, name: str, channels_last: bool = False) -> Any:
        """Returns a UNet in evaluation mode; with `channels_last` a separate copy of it."""
        if channels_last:
            return copy.deepcopy(self.unet(name)).to(memory_format=torch.channels_last)
        if name == ONE_LEVEL:
            return make_one_level().to(self.run.device, DTYPES[self.run.precision])
        teacher = self.pipeline.unet
        unet = teacher if name == TEACHER else build_student(teacher, make_plan(teacher.config, name))
        return unet.eval().requires_grad_(False)

    def signature(self, name: str) -> Signature:
        return signature_of("unet", self.unet(name), self.run.precision)  # type: ignore[arg-type]

    def feeds(self, name: str, batch: int, timestep: float = TIMED_AT) -> dict[str, torch.Tensor]:
        """Returns random inputs of the UNet's own picture size, on the device.

        `sample` (B, 4, h, w) and `encoder_hidden_states` (B, 77, C) in the run's precision, `timestep` (B,) in float32.

        Args:
            name: of the UNet.
            batch: B.
            timestep: of all rows of the batch.
        """
        config = self.unet(name).config
        side = config.sample_size
        sizes = {"batch": batch, "height": side, "width": side, "tokens": CONTEXT_TOKENS}
        inputs = random_inputs(self.signature(name), config, sizes, timestep)
        return {key: tensor.to(self.run.device) for key, tensor in inputs.items()}

    @functools.cache  # noqa: B019
    def reference(self, name: str, batch: int) -> torch.Tensor:
        """Returns the output of the same weights in IEEE fp32, (B, 4, h, w)."""
        exact = PositionalUNet(copy.deepcopy(self.unet(name)).float())
        feeds = {key: tensor.float() for key, tensor in self.feeds(name, batch, CHECKED_AT).items()}
        with ieee_fp32(), torch.no_grad():
            return exact(*feeds.values())[0]

    @functools.cache  # noqa: B019
    def work(self, name: str, batch: int) -> Work:
        """Returns the work of a step in the run's precision."""
        return count_work(self.unet(name), self.feeds(name, batch), DTYPES[self.run.precision].itemsize)

    def runner(self, name: str, mode: str = "eager", cuda_graph: bool = False) -> TorchRunner:
        """Returns a runner of a UNet in torch.

        Args:
            name: of the UNet.
            mode: of `TorchRunner`.
            cuda_graph: replay calls from a CUDA graph.
        """
        wanted = self.signature(name)
        module = PositionalUNet(self.unet(name, mode != "eager"))
        return TorchRunner(module, wanted.inputs, wanted.outputs, mode, cuda_graph=cuda_graph, named=module.unet)

    @functools.cached_property
    def peaks(self) -> Peaks:
        """The device's limits from part 1; measured now if part 1 did not run."""
        return known_peaks(self.run, self.run.precision)

    def judge(
        self, name: str, batch: int, output: torch.Tensor, step_ms: float, floor: float | None = None
    ) -> dict[str, Any]:
        """Returns a step's `relative_l2`, its limit, `share_of_peak` and `least_ms`; `failed` over the limit.

        Args:
            name: of the UNet.
            batch: B.
            output: of `feeds(name, batch, CHECKED_AT)`, (B, 4, h, w).
            step_ms: measured time of a step.
            floor: torch's own error in this precision; None takes the precision's limit.
        """
        error = relative_l2(output, self.reference(name, batch))
        limit = LIMITS[self.run.precision] if floor is None else BACKEND_FACTOR * floor
        line = roofline(self.work(name, batch), self.peaks, step_ms / 1000)
        figures: dict[str, Any] = {
            "relative_l2": error,
            "limit_relative_l2": limit,
            "share_of_peak": line["share_of_matmul_peak"],
            "share_of_bandwidth": line["share_of_bandwidth"],
            "least_ms": line["least_ms"],
        }
        return (
            figures if error <= limit else figures | {"failed": f"off by {error:.2e} from IEEE fp32, over {limit:.2e}"}
        )


def make_one_level() -> Any:
    """Returns a random UNet of one level, in evaluation mode."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return unet.eval().requires_grad_(False)


def known_peaks(run: PartRun, precision: str) -> Peaks:
    """Returns the peaks of part 1, or measures them now."""
    row = run.find(1, precision)
    if row is None:
        return measure_peaks(str(run.device), precision, **peak_options(run.smoke))
    return Peaks(row["matmul_tflops"] * 1e12, row["copy_gb_per_s"] * 1e9, precision)


def peak_options(smoke: bool) -> Mapping[str, Any]:
    """Returns the options of `measure_peaks`: with `smoke`, a fraction of a second."""
    return {"budget_s": 0.05, "copy_bytes": SMALL_COPY_BYTES} if smoke else {}
