"""Encoding within the memory: batches change no latents, and tiling and precision are chosen and recorded.

`ScarceMemory` is a stand-in for a device that runs out of memory: a real VAE whose encoder refuses inputs over a limit.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import operations
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Encoder
from sdcompress_engines.errors import BackendMissing, DataError
from sdcompress_engines.exactness import relative_l2
from sdcompress_engines.progress import Reporter

from sdcompress.data import encode as module
from sdcompress.data.build_cache import agree_on_precision
from sdcompress.data.embed import embed_in_batches, text_encoders_on
from sdcompress.data.encode import LatentEncoder
from sdcompress.data.memory import count_picture_bytes
from sdcompress.data.precision import DTYPES, choose_vae_precision, copy_encoder
from sdcompress.data.sources import open_source
from sdcompress.data.views import to_pixels
from sdcompress.models.load import load_pipeline

CPU = torch.device("cpu")
ULP = 2.0**-10  # of fp16, relative
CONFIGS = Path(module.__file__).parents[1] / "assets/configs"


class Lines(Reporter):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def show_line(self, text: str) -> None:
        self.lines.append(text)


class ScarceMemory:
    """Stand-in for a small memory: `Encoder.forward` raises for inputs of over `limit_px` pixels.

    `refused` and `done` list the inputs as (batch, side).
    """

    def __init__(self, patch: pytest.MonkeyPatch, limit_px: int, error: Any = None) -> None:
        self.refused: list[tuple[int, int]] = []
        self.done: list[tuple[int, int]] = []
        genuine = Encoder.forward

        def forward(encoder: Any, sample: torch.Tensor) -> torch.Tensor:
            if sample.device.type == "meta":  # counted, not computed
                return genuine(encoder, sample)
            given = (sample.shape[0], max(sample.shape[2:]))
            if sample.shape[0] * sample.shape[2] * sample.shape[3] > limit_px:
                self.refused.append(given)
                if error is None:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
                error()
            self.done.append(given)
            return genuine(encoder, sample)

        patch.setattr(Encoder, "forward", forward)


@pytest.fixture
def vae(random_pipeline: Any) -> Any:
    return random_pipeline.vae


@pytest.fixture(scope="module")
def nano_pixels() -> torch.Tensor:
    """13 held-out pictures of nano, (13, 3, 128, 128)."""
    from sdcompress.models import nano

    found = zip(range(13), open_source(nano.shards("heldout")), strict=False)
    return torch.stack([to_pixels(record.picture(), 128) for _, record in found])


def encoder_with_batch(vae: Any, size: int, patch: pytest.MonkeyPatch) -> LatentEncoder:
    """Returns an encoder on the CPU whose memory holds `size` pictures of 128 px."""
    patch.setattr(module, "CPU_BATCH_BYTES", 2**40)
    patch.setattr(module, "CPU_BATCH", 2**40)
    return LatentEncoder(vae, CPU, "fp32", budget_bytes=size * count_picture_bytes(vae, 128, 128, "fp32"))


def assert_equal_but_for_rounding(a: torch.Tensor, b: torch.Tensor) -> None:
    """Check for the differences that `LatentEncoder` states: 2e-5 of the largest value, then one rounding to fp16."""
    a, b = a.float(), b.float()
    assert torch.all((a - b).abs() <= 2e-5 * a.abs().max() + ULP * a.abs())


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_latents_do_not_depend_on_the_batch(
    vae: Any, nano_pixels: torch.Tensor, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoder_with_batch(vae, 13, monkeypatch).encode(nano_pixels)
    memory = ScarceMemory(monkeypatch, 2**40)
    found = encoder_with_batch(vae, size, monkeypatch).encode(nano_pixels)
    assert {batch for batch, _ in memory.done[:-1]} == {size}
    for a, b in zip(found, whole, strict=True):
        assert a.dtype == torch.float16
        assert_equal_but_for_rounding(a, b)


def test_latents_are_the_posterior_of_the_vae(vae: Any, nano_pixels: torch.Tensor) -> None:
    mean, logvar = LatentEncoder(vae, CPU, "fp32").encode(nano_pixels)
    with torch.no_grad():
        posterior = vae.encode(nano_pixels).latent_dist
    assert_equal_but_for_rounding(posterior.mean, mean)
    assert_equal_but_for_rounding(posterior.logvar, logvar)


def test_a_cpu_batch_stays_in_the_last_cache(vae: Any) -> None:
    encoder = LatentEncoder(vae, CPU, "fp32")
    taken = encoder.batch_size(128, 128) * count_picture_bytes(vae, 128, 128, "fp32")
    assert module.CPU_BATCH_BYTES / 2 < taken <= module.CPU_BATCH_BYTES
    assert encoder.batch_size(64, 64) == module.CPU_BATCH
    assert encoder.batch_size(512, 512) == 1


def test_a_batch_that_runs_out_of_memory_is_halved_until_it_fits(
    vae: Any, nano_pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encoder_with_batch(vae, 2, monkeypatch).encode(nano_pixels)
    scarce = ScarceMemory(monkeypatch, 3 * 128 * 128)
    encoder = encoder_with_batch(vae, 8, monkeypatch)
    found = encoder.encode(nano_pixels)
    assert scarce.refused == [(8, 128), (4, 128)]
    assert [batch for batch, _ in scarce.done] == [2, 2, 2, 2, 2, 2, 1]
    assert encoder.tile_px is None
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_an_error_of_the_cpu_allocator_halves_the_batch(
    vae: Any, nano_pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce = ScarceMemory(monkeypatch, 4 * 128 * 128, error=lambda: torch.empty(2**58))
    encoder_with_batch(vae, 8, monkeypatch).encode(nano_pixels)
    assert scarce.refused == [(8, 128)]


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no"), OSError(5, "")]
)
def test_other_errors_are_raised(
    vae: Any, nano_pixels: torch.Tensor, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    scarce = ScarceMemory(monkeypatch, 4 * 128 * 128, fail)
    with pytest.raises(type(error)) as raised:
        encoder_with_batch(vae, 8, monkeypatch).encode(nano_pixels)
    assert raised.value is error
    assert len(scarce.refused) == 1


def test_a_picture_that_does_not_fit_is_tiled_and_reported(
    vae: Any, nano_pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = torch.nn.functional.interpolate(nano_pixels[:2], size=(512, 512), mode="bilinear")
    whole, _ = LatentEncoder(vae, CPU, "fp32").encode(large)
    scarce, lines = ScarceMemory(monkeypatch, 256 * 256), Lines()
    before = dict(vars(vae))
    encoder = LatentEncoder(vae, CPU, "fp32", report=lines)
    found, _ = encoder.encode(large)
    assert scarce.refused == [(1, 512)]
    assert encoder.tile_px == 256
    assert encoder.tiled == 2
    assert len(lines.lines) == 1
    assert "512 x 512 px" in lines.lines[0]
    assert "tiles of 256 px" in lines.lines[0]
    assert found.shape == whole.shape
    assert not torch.equal(found, whole)
    tiled = copy.deepcopy(vae)
    tiled.enable_tiling()
    tiled.tile_sample_min_size, tiled.tile_latent_min_size = 256, 32
    with torch.no_grad():
        expected = torch.cat([tiled.encode(one).latent_dist.mean for one in large.split(1)])
    assert_equal_but_for_rounding(expected, found)
    assert all(vars(vae)[name] is value for name, value in before.items())


def test_a_picture_too_large_for_a_cpu_is_tiled_at_once(
    vae: Any, nano_pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = torch.nn.functional.interpolate(nano_pixels[:1], size=(1024, 1024), mode="bilinear")
    need = count_picture_bytes(vae, 1024, 1024, "fp32")
    memory = ScarceMemory(monkeypatch, 2**40)
    encoder = LatentEncoder(vae, CPU, "fp32", budget_bytes=need // 2)
    encoder.encode(large)
    assert encoder.tile_px == 512
    assert {side for _, side in memory.done} <= {512, 256}


def test_a_tile_that_does_not_fit_is_an_error(
    vae: Any, nano_pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = torch.nn.functional.interpolate(nano_pixels[:1], size=(512, 512), mode="bilinear")
    ScarceMemory(monkeypatch, 0)
    with pytest.raises(DataError, match=r"one picture of 512 x 512 px, even in tiles of 256 px.* a smaller --size"):
        LatentEncoder(vae, CPU, "fp32").encode(large)


@pytest.mark.parametrize(("family", "size_px", "gib"), [("sd1", 512, 20), ("sdxl", 1024, 80)])
def test_counted_bytes_are_those_of_the_published_vaes(family: str, size_px: int, gib: int) -> None:
    """32 pictures in fp32 need what a batch of 32 was measured to take: 20 GiB, and 80 GiB with SDXL."""
    config = json.loads((CONFIGS / family / "vae/config.json").read_text())
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    counted = 32 * count_picture_bytes(vae, size_px, size_px, "fp32") / 2**30
    assert counted == pytest.approx(gib, rel=0.02)
    assert count_picture_bytes(vae, size_px, size_px, "bf16") == pytest.approx(counted * 2**30 / 64, rel=0.01)


GROWTH = """
import sys, torch
from sdcompress.data.memory import count_picture_bytes
from sdcompress.data.precision import copy_encoder
from sdcompress.models.load import load_pipeline
from sdcompress_engines.resources import peak_rss_mib

vae = load_pipeline(sys.argv[1]).pipeline.vae
counted = count_picture_bytes(vae, 1024, 1024, "fp32")
encoder = copy_encoder(vae, torch.device("cpu"), "fp32")
with torch.no_grad():
    encoder.encode(torch.zeros(1, 3, 64, 64))
    before_mib = peak_rss_mib()
    encoder.encode(torch.zeros(1, 3, 1024, 1024))
print((peak_rss_mib() - before_mib) * 2**20 / counted)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="allocators of other systems keep more")
def test_encoding_on_a_cpu_takes_the_counted_bytes(random_folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", GROWTH, random_folder], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_sd1_encodes_in_bf16_where_a_card_has_it(
    random_pipeline: Any, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)  # stand-in for a card
    cuda = torch.device("cuda", 0)
    assert choose_vae_precision(random_pipeline, cuda) == expected
    assert choose_vae_precision(random_pipeline, cuda, "fp32") == "fp32"
    assert choose_vae_precision(random_pipeline, CPU) == "fp32"


def test_bf16_is_refused_where_it_would_be_emulated(random_pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))  # stand-in for a card
    with pytest.raises(BackendMissing, match=r"capability 7\.5 has no bf16; expected 8\.0 .*--vae-precision fp32"):
        choose_vae_precision(random_pipeline, torch.device("cuda", 0), "bf16")


def test_sdxl_is_never_encoded_in_fp16(sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline: Any = load_pipeline(sdxl_folder).pipeline
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, version=capability: version)
        assert choose_vae_precision(pipeline, torch.device("cuda", 0)) == "fp32"
    half = copy.deepcopy(pipeline.vae).half()  # a checkpoint that was loaded in the precision it is stored in
    for precision in ("fp32", "bf16"):
        encoder = copy_encoder(half, CPU, precision)
        dtypes: set[torch.dtype] = set()
        for part in encoder.modules():
            part.register_forward_hook(
                lambda _, __, out, dtypes=dtypes: dtypes.add(out.dtype) if torch.is_tensor(out) else None
            )
        with torch.no_grad():
            encoder.encode(torch.zeros(1, 3, 64, 64, dtype=DTYPES[precision]))
        assert dtypes == {torch.float32, DTYPES[precision]}


def test_processes_on_different_cards_encode_in_one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.gather_object", lambda _: ["bf16", "fp32"])  # stand-in for two processes
    assert agree_on_precision("bf16") == "fp32"
    monkeypatch.setattr("accelerate.utils.gather_object", operations.gather_object)
    assert agree_on_precision("bf16") == "bf16"


def test_bf16_moves_nanos_latents_by_less_than_one_percent(nano_pixels: torch.Tensor) -> None:
    vae: Any = load_pipeline("nano").pipeline.vae
    exact, found = (LatentEncoder(vae, CPU, precision).encode(nano_pixels) for precision in ("fp32", "bf16"))
    assert 0 < relative_l2(found[0], exact[0]) < 0.01
    assert float((found[1].float() - exact[1].float()).abs().max()) < 0.05


def test_encoding_leaves_the_vae_as_it_was(random_folder: Path, nano_pixels: torch.Tensor) -> None:
    vae: Any = load_pipeline(random_folder).pipeline.vae
    before = {name: (weight, weight.clone()) for name, weight in vae.state_dict(keep_vars=True).items()}
    LatentEncoder(vae, CPU, "bf16").encode(nano_pixels)
    after = vae.state_dict(keep_vars=True)
    assert all(after[name] is weight and torch.equal(weight, value) for name, (weight, value) in before.items())
    assert all(not part._forward_pre_hooks for part in vae.modules())


def test_text_encoders_are_put_back_after_an_error() -> None:
    moves: list[str] = []

    class Moved(torch.nn.Linear):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            moves.append(str(device))
            return self

    pipeline = type("Pipeline", (), {"text_encoder": Moved(1, 1), "text_encoder_2": Moved(1, 1)})()
    with pytest.raises(KeyboardInterrupt), text_encoders_on(pipeline, torch.device("cuda", 0)):
        raise KeyboardInterrupt
    assert moves == ["cuda:0", "cuda:0", "cpu", "cpu"]


def test_no_captions_give_no_embeddings(random_pipeline: Any) -> None:
    assert embed_in_batches(random_pipeline, []) == {}


def published_vae(family: str) -> Any:
    """The published VAE's shape with random weights."""
    torch.manual_seed(0)
    return AutoencoderKL.from_config(json.loads((CONFIGS / family / "vae/config.json").read_text())).eval()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_batch_stays_within_the_budget(precision: Any) -> None:
    cuda, budget, count = torch.device("cuda"), 6 * 2**30, 24
    vae = published_vae("sd1")
    encoder = LatentEncoder(vae, cuda, precision, budget_bytes=budget)
    batches: list[int] = []
    encoder.vae.encoder.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    pixels = torch.rand(count, 3, 512, 512) * 2 - 1
    encoder.encode(pixels[:1])
    torch.cuda.reset_peak_memory_stats()
    encoder.encode(pixels[1:])
    assert torch.cuda.max_memory_allocated() - held <= budget
    assert max(batches) > 1


@pytest.mark.gpu
def test_bf16_on_a_gpu_stays_within_one_percent_of_fp32(nano_pixels: torch.Tensor) -> None:
    """Channels last and the kernels of a card change only the rounding."""
    vae: Any = load_pipeline("nano").pipeline.vae
    exact, _ = LatentEncoder(vae, CPU, "fp32").encode(nano_pixels)
    found, _ = LatentEncoder(vae, torch.device("cuda"), "bf16").encode(nano_pixels)
    assert relative_l2(found, exact) < 0.01


@pytest.mark.gpu
def test_a_real_gpu_out_of_memory_halves_the_batch() -> None:
    cuda = torch.device("cuda")
    encoder = LatentEncoder(published_vae("sd1"), cuda, "fp32", budget_bytes=2**50)
    pixels = torch.zeros(32, 3, 512, 512)
    encoder.encode(pixels[:1])
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated() + 4 * 2**30) / total))
    try:
        mean, _ = encoder.encode(pixels)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(mean) == 32
    assert encoder._limits[512, 512] < 32
