"""Counted work agrees with the textbook, published figures and torch's allocations; measured peaks are limits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sdcompress_bench.peaks import Peaks, measure_peaks, roofline
from sdcompress_bench.work import BYTES, Work, count_pipeline, count_work
from sdcompress_engines.errors import BackendMissing, ModelError, UsageError

from sdcompress.families.configs import CONFIGS
from sdcompress.models.locate import read_component_config
from sdcompress.prune.presets import make_plan

PUBLISHED_GMACS = {None: 338.83, "bk-base": 223.81, "bk-small": 217.78, "bk-tiny": 205.09}
"""SD1.x at 64×64 latents: DeepCache (arXiv 2312.00858), table 3; BK-SDM (arXiv 2305.15798) has the same models.

Counted over layers, so without the products inside of attention; we agree within 0.1%.
"""
PAIRS = {None: (5, 5, 5, 1), "bk-base": (3, 3, 3, 1), "bk-small": (3, 3, 3, 0), "bk-tiny": (3, 3, 3, 0)}
"""Resnet-attention pairs at 64², 32², 16² and 8² positions."""


class Attention(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)


def sd1_configs(plan: str | None = None) -> dict[str, Any]:
    configs = {name: read_component_config(CONFIGS / "sd1", name) for name in ("unet", "vae", "text_encoder")}
    return configs if plan is None else configs | {"unet": make_plan(configs["unet"], plan).student_config()}


def inputs_of(unet: Any, batch: int = 2) -> dict[str, torch.Tensor]:
    side = unet.config.sample_size
    return {
        "sample": torch.randn(batch, 4, side, side),
        "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states": torch.randn(batch, 77, unet.config.cross_attention_dim),
    }


def test_a_convolution_a_linear_layer_and_attention_count_as_in_the_textbook() -> None:
    conv = count_work(torch.nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), {"input": torch.empty(5, 6, 20, 14)}, 2)
    assert conv.macs == 5 * 8 * 10 * 7 * (6 // 2) * 9
    assert conv.weight_bytes == 2 * (8 * 3 * 9 + 8)
    assert conv.activation_bytes == 2 * (5 * 6 * 20 * 14 + 5 * 8 * 10 * 7) == conv.peak_bytes

    linear = count_work(torch.nn.Linear(24, 40), {"input": torch.empty(3, 7, 24)}, 4)
    assert (linear.macs, linear.weight_bytes, linear.activation_bytes) == (
        3 * 7 * 24 * 40,
        4 * (24 * 40 + 40),
        4 * 3 * 7 * (24 + 40),
    )

    query, key = torch.empty(2, 3, 50, 8), torch.empty(2, 3, 77, 8)
    attention = count_work(Attention(), {"query": query, "key": key, "value": key}, 2)
    assert attention.macs == 2 * (2 * 3 * 50 * 77 * 8)
    assert attention.activation_bytes == 2 * (2 * query.numel() + 2 * key.numel()), (
        "the scores are not among what is moved"
    )
    assert attention.weight_bytes == 0


@pytest.mark.parametrize("plan", PUBLISHED_GMACS)
def test_sd1_and_its_students_have_the_published_macs(plan: str | None) -> None:
    unet = count_pipeline(sd1_configs(plan), 512, 1, False, "fp16")["unet"]
    inside = 0
    for pairs, side, width in zip(PAIRS[plan], (64, 32, 16, 8), (320, 640, 1280, 1280), strict=True):
        inside += pairs * 2 * side**2 * (side**2 + 77) * width
    assert (unet.macs - inside) / 1e9 == pytest.approx(PUBLISHED_GMACS[plan], rel=0.001)


def test_a_pipeline_is_counted_with_all_the_weights_that_it_uses() -> None:
    found = count_pipeline(CONFIGS / "sd1", 512, 2, True, "fp16")
    assert found.keys() == {"unet", "text_encoder", "vae_decoder"}
    assert found["unet"].weight_bytes == 2 * 859_520_964
    tables = (49408 + 77) * 768
    assert (found["text_encoder"].table_bytes, found["text_encoder"].weight_bytes) == (
        2 * tables,
        2 * (123_060_480 - tables) + 8 * 77,
    ), "and 77 position ids"
    assert found["vae_decoder"].weight_bytes == 2 * 49_490_199, "decoder and post_quant_conv, without the encoder"

    single = count_pipeline(CONFIGS / "sd1", 512, 1, False, "fp32")
    assert found["unet"].macs == 4 * single["unet"].macs, "two pictures, each with and without its prompt"
    assert found["vae_decoder"].macs == 2 * single["vae_decoder"].macs
    assert single["unet"].weight_bytes == 2 * found["unet"].weight_bytes
    assert single["vae_decoder"].peak_bytes == found["vae_decoder"].peak_bytes


def test_sdxl_is_counted_with_both_text_encoders_and_its_size_embedding() -> None:
    found = count_pipeline(CONFIGS / "sdxl", 1024, 1, True, "bf16")
    assert found.keys() == {"unet", "text_encoder", "text_encoder_2", "vae_decoder"}
    assert found["unet"].weight_bytes == 2 * 2_567_463_684


def test_counting_leaves_the_component_as_it_was(random_pipeline: Any) -> None:
    unet = random_pipeline.unet
    before = copy.deepcopy(unet.state_dict())
    example = inputs_of(unet)
    counted = count_work(unet, example, 4)
    assert all(
        weight.device.type == "cpu" and torch.equal(weight, before[name]) for name, weight in unet.state_dict().items()
    )
    assert counted == count_work(copy.deepcopy(unet).to("meta"), example, 4)
    assert counted == count_work(unet.half(), example, 4), "what counts is the precision asked for"
    unet.float().load_state_dict(before)


def most_allocated(call: Callable[[], Any]) -> int:
    """Returns the most bytes that torch's CPU allocator had allocated at once during a call."""
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    results: Any = profiler.profiler
    events = sorted(
        (event for event in results.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    alive = most = 0
    for event in events:
        alive += event.nbytes()
        most = max(most, alive)
    assert events
    return most


def size_of(example: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in example.values())


def test_the_peak_agrees_with_torchs_allocations(random_pipeline: Any) -> None:
    unet, text = random_pipeline.unet, random_pipeline.text_encoder
    example = inputs_of(unet)
    assert count_work(unet, example, 4).peak_bytes == pytest.approx(
        size_of(example) + most_allocated(lambda: unet(**example)), rel=0.02
    )
    ids = {"input_ids": torch.zeros(2, 77, dtype=torch.long)}
    assert count_work(text, ids, 4).peak_bytes == pytest.approx(
        size_of(ids) + most_allocated(lambda: text(**ids)), rel=0.02
    )
    latents = {"z": torch.randn(1, 4, 16, 16)}
    counted, found = (
        count_work(random_pipeline.vae, latents, 4, "decode").peak_bytes,
        size_of(latents) + most_allocated(lambda: random_pipeline.vae.decode(**latents)),
    )
    assert counted <= found <= 1.4 * counted, "convolutions take workspaces"


@pytest.mark.gpu
def test_the_peak_agrees_with_a_gpus_allocations(random_pipeline: Any) -> None:
    unet = copy.deepcopy(random_pipeline.unet).to("cuda", torch.float16)
    example = {name: tensor.to("cuda", torch.float16) for name, tensor in inputs_of(unet, 16).items()}
    with torch.no_grad():
        unet(**example)  # cuBLAS keeps a workspace from its first call on
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        unet(**example)
    found = torch.cuda.max_memory_allocated() - before + size_of(example)
    assert 0.9 * count_work(unet, example, 2).peak_bytes <= found <= 1.6 * count_work(unet, example, 2).peak_bytes


def test_the_roofline_is_the_longer_of_both_limits() -> None:
    peaks = Peaks(1e12, 1e11, "fp32")
    work = Work(macs=10**11, weight_bytes=10**9, activation_bytes=10**9, peak_bytes=1)
    assert roofline(work, peaks, 0.8) == pytest.approx(
        {"share_of_matmul_peak": 0.25, "share_of_bandwidth": 0.025, "least_ms": 200.0, "bound": "compute"}
    )
    assert roofline(Work(10**9, 10**10, 0, 1), peaks, 0.1) == pytest.approx(
        {"share_of_matmul_peak": 0.02, "share_of_bandwidth": 1.0, "least_ms": 100.0, "bound": "memory"}
    )
    with pytest.raises(UsageError, match="step of 0"):
        roofline(work, peaks, 0.0)


@pytest.mark.slow
@pytest.mark.alone
def test_no_product_or_copy_is_far_over_the_measured_peaks() -> None:
    import time

    peaks = measure_peaks("cpu", "fp32")
    left = torch.randn(768, 768)
    layer = torch.nn.Linear(768, 768, bias=False)
    source, target = torch.ones(2**26), torch.ones(2**26)
    with torch.no_grad():
        times: dict[str, list[float]] = {"product": [], "copy": []}
        for _ in range(8):
            for name, call in (("product", lambda: layer(left)), ("copy", lambda: target.copy_(source))):
                started = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - started)
    product = roofline(count_work(layer, {"input": left}, 4), peaks, min(times["product"]))
    assert 0.05 < product["share_of_matmul_peak"] < 1.5
    assert 0.2 < 2 * source.nbytes / min(times["copy"]) / peaks.bandwidth_bytes_per_s < 1.5


@pytest.mark.gpu
def test_a_gpu_is_faster_in_half_precision() -> None:
    half, single = measure_peaks("cuda", "fp16"), measure_peaks("cuda", "fp32")
    assert half.matmul_flops_per_s > 1.5 * single.matmul_flops_per_s
    assert half.bandwidth_bytes_per_s == pytest.approx(single.bandwidth_bytes_per_s, rel=0.2)


def test_work_that_cannot_be_counted_or_measured_is_an_error() -> None:
    configs = sd1_configs()
    with pytest.raises(UsageError, match="no precision 'fp4'"):
        count_pipeline(configs, 512, 1, False, "fp4")
    with pytest.raises(UsageError, match=r"500 px.*multiple of 64"):
        count_pipeline(configs, 500, 1, False, "fp16")
    with pytest.raises(UsageError, match="batch of 0"):
        count_pipeline(configs, 512, 0, False, "fp16")
    with pytest.raises(ModelError, match="no config of the text_encoder, vae"):
        count_pipeline({"unet": configs["unet"]}, 512, 1, False, "fp16")
    with pytest.raises(ModelError, match=r"Linear.forward does not take input: .*reduction dim"):
        count_work(torch.nn.Linear(8, 8), {"input": torch.empty(3, 9)}, 4)
    with pytest.raises(UsageError, match="no peak is measured in 'int8'"):
        measure_peaks("cpu", "int8")
    with pytest.raises(BackendMissing, match="no device 'tpu'"):
        measure_peaks("tpu", "fp32")
    assert set(BYTES) >= {"fp32", "fp16", "bf16"}
