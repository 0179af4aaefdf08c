"""Latents and text embeddings, computed in the precision and the batch size that the device allows.

Precision. A cache holds fp16 values. bf16 has 8 bits of mantissa: encoding nano's pictures in it moves the latents by
0.5% (relative L2; 1.0% for the worst of 256 pictures; bench/studies/encoding.py). The limit is 1%: a third of the noise
that the first training timestep adds (SD's schedule begins at sigma 0.029, in units of the latents' spread), and less
than what saving the pictures as JPEG at quality 95 does (2.1%). SD1's and SD2's VAE are taken to stay under it as
nano's does, so CUDA devices that compute bf16 natively use it. SDXL's VAE has activations so large that fp16 overflows;
what bf16 loses there is not measured, so it stays fp32. Nothing is encoded in fp16. fp32 is torch's own, which on CUDA
lets convolutions round their inputs to TF32.

Memory. `LatentEncoder` finds out what one picture needs and encodes as many at once as fit.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import psutil
import torch
import torch.nn.functional as F
from sdcompress_engines.errors import BackendMissing, DataError
from sdcompress_engines.progress import SILENT, Reporter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdcompress.families.registry import family_of

Precision = Literal["fp32", "bf16"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_CAPABILITY = (8, 0)
"""Compute capability from which an NVIDIA card has bf16 arithmetic; older ones emulate it."""
FREE_SHARE = 0.8
"""Share of the free memory that a batch may take; the rest is for other programs and for what an allocator cannot use.
"""
CUDA_BATCH_PX = 32 * 512 * 512
"""Pixels in a batch, of all its pictures, above which a GPU gains nothing."""
CPU_BATCH_BYTES = 32 * 2**20
"""Bytes of activations in a batch above which they leave a CPU's last cache, and a larger batch is slower."""
CPU_BATCH = 8
"""Pictures in a batch from which a CPU gains nothing, however small they are."""
SMALLEST_TILE_PX = 256
TEXT_BATCH = 128
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_FP32_LAYERS = ("encoder.conv_norm_out.", "encoder.conv_out.", "quant_conv.")
_ALLOCATORS = ("DefaultCPUAllocator", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


def choose_precision(pipeline: Any, device: torch.device, wanted: PrecisionChoice = "auto") -> Precision:
    """Returns the precision in which a pipeline's VAE encodes on `device`.

    `auto` is bf16 on CUDA devices that have it, for SD1, SD2 and a VAE whose config sets `force_upcast` off, which says
    that it was finetuned for half precision; else fp32. `force_upcast` alone does not tell: SD1's config leaves it out,
    and diffusers' default is on.

    Raises:
        BackendMissing: bf16 is wanted of a CUDA device that only emulates it.
    """
    native = device.type != "cuda" or torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    if wanted == "bf16" and not native:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise BackendMissing(
            f"compute capability {capability} has no bf16",
            where=str(device),
            expected="8.0 or newer",
            hint="--vae-precision fp32",
        )
    if wanted != "auto":
        return wanted
    bf16_safe = family_of(pipeline.unet.config).bf16_vae or not pipeline.vae.config.get("force_upcast", True)
    return "bf16" if device.type == "cuda" and native and bf16_safe else "fp32"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a CPU's or a GPU's allocator has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _ALLOCATORS)


def free_bytes(device: torch.device, processes: int = 1) -> int:
    """Returns the bytes that a process can still allocate on `device`; a CPU's memory is shared by `processes`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available // processes


def copy_encoder(vae: Any, device: torch.device, precision: Precision) -> Any:
    """Returns a copy of a VAE that only encodes, on `device`; the VAE itself keeps its weights, device and tiling.

    Weights that need no conversion are shared. In bf16 the layers after the last block stay fp32: they run at an eighth
    of the resolution, and 8 bits of mantissa are too few for the log-variance.
    """

    def convert(name: str, weight: torch.Tensor) -> torch.nn.Parameter:
        dtype = torch.float32 if name.startswith(_FP32_LAYERS) else DTYPES[precision]
        is_nhwc = _is_channels_last(device, precision) and weight.ndim == 4
        layout = torch.channels_last if is_nhwc else torch.preserve_format
        return torch.nn.Parameter(weight.detach().to(device, dtype, memory_format=layout), requires_grad=False)

    memo: dict[int, Any] = {id(part): None for part in (vae.decoder, vae.post_quant_conv)}
    memo |= {
        id(weight): convert(name, weight)
        for name, weight in vae.named_parameters()
        if not name.startswith(("decoder.", "post_quant_conv."))
    }
    copied = copy.deepcopy(vae, memo).eval()
    copied.encoder.conv_norm_out.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    return copied


def _is_channels_last(device: torch.device, precision: Precision) -> bool:
    """bf16 convolutions on tensor cores read channels last. On a CPU it moves fp32 latents by 3e-4, so not there."""
    return device.type == "cuda" and precision == "bf16"


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch's attention would fall into its parts; on CPU and GPU it never holds the scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class _LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive, weights left out, and keeps the largest sum in `peak`."""

    def __init__(self, weights: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: dict[int, Any] = {weight.untyped_storage()._cdata: None for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf.untyped_storage())
        return out

    def _watch(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def drop(_: weakref.ref[Any]) -> None:
            del self._known[key]
            self._now -= size

        self._known[key] = weakref.ref(storage, drop)
        self._now += size
        self.peak = max(self.peak, self._now)


def count_picture_bytes(vae: Any, width: int, height: int, precision: Precision) -> int:
    """Returns the most bytes that encoding one picture of this size holds at once, weights left out.

    Counted on the meta device, so nothing is computed. What an operator takes for itself and frees is not in it.
    """
    encoder = copy_encoder(vae, torch.device("meta"), precision)
    with torch.no_grad(), _FusedAttention(), _LiveBytes(encoder.parameters()) as live:
        encoder.encode(torch.empty(1, vae.config.in_channels, height, width, dtype=DTYPES[precision], device="meta"))
    return live.peak


class LatentEncoder:
    """Encodes pictures in batches that fit the memory; on a CPU also its last cache.

    A batch that runs out of memory is halved, down to one picture, which is what VAE slicing does. Where even one is
    too much, it is encoded in tiles of half its longer side, then a quarter. Tiles overlap and are blended, but a
    tile's norms and attention do not see the rest of the picture: tiling changes values, most of all near the seams.

    The batch itself does not change a result beyond rounding, because backends choose kernels by batch: on a CPU by at
    most 2e-5 of the largest value, before values are rounded to fp16.

    Args:
        vae: an AutoencoderKL; stays as it is.
        device: where to encode.
        precision: of weights and activations.
        budget_bytes: memory that a batch may take; without it a share of what is free at the moment.
        processes: processes that share a CPU's memory.

    Attributes:
        tile_px: side of the tiles, in pixels; None while pictures are encoded whole.
        tiled: pictures encoded in tiles so far.
    """

    def __init__(
        self,
        vae: Any,
        device: torch.device,
        precision: Precision,
        *,
        budget_bytes: int | None = None,
        processes: int = 1,
        report: Reporter = SILENT,
    ) -> None:
        self.vae = copy_encoder(vae, device, precision)
        self.device, self.precision, self.budget_bytes, self.processes = device, precision, budget_bytes, processes
        self.report = report
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.tile_px: int | None = None
        self.tiled = 0
        self._picture_bytes: dict[tuple[int, int], int] = {}
        self._limits: dict[tuple[int, int], int] = {}

    def batch_size(self, width: int, height: int) -> int:
        """Returns how many pictures of this size the next batch takes.

        On CUDA the first batch of a size is one picture, which is measured. On a CPU a picture's bytes are counted, and
        one that does not fit is tiled at once: Linux ends a process rather than refuse it memory.
        """
        size = (width, height)
        if size not in self._picture_bytes:
            if self.device.type == "cuda":
                return 1
            self._count(width, height)
        fitting = self._budget() // self._picture_bytes[size]
        on_cpu = min(CPU_BATCH, CPU_BATCH_BYTES // self._picture_bytes[size])
        useful = CUDA_BATCH_PX // (width * height) if self.device.type == "cuda" else on_cpu
        return max(1, min(fitting, useful, self._limits.get(size, fitting)))

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and log-variance of the posterior, unscaled: (N, C, H/8, W/8) each, float16, on the CPU.

        Args:
            pixels: (N, 3, H, W), float32 in [-1, 1], on the CPU; N is not limited.

        Raises:
            DataError: not even one tile fits the memory.
        """
        height, width = pixels.shape[-2:]
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        rest = pixels
        while len(rest):
            batch = rest[: self.batch_size(width, height)]
            part = self._encode_batch(batch)
            if part is None:
                self._ask_less(len(batch), width, height)
                continue
            parts.append(part)
            rest = rest[len(batch) :]
            if self.tile_px is not None and max(width, height) > self.tile_px:
                self.tiled += len(batch)
        means, logvars = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(logvars)

    def _encode_batch(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns mean and log-variance, or None where the memory ran out; the failed call's tensors are free then."""
        size = (pixels.shape[-1], pixels.shape[-2])
        measured = self.device.type != "cuda" or size in self._picture_bytes
        held = 0
        if not measured:
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
        layout = torch.channels_last if _is_channels_last(self.device, self.precision) else torch.contiguous_format
        try:
            given = pixels.to(self.device, DTYPES[self.precision], memory_format=layout)
            posterior = self.vae.encode(given).latent_dist
            found = posterior.mean.half().cpu(), posterior.logvar.half().cpu()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        if not measured:
            taken = torch.cuda.max_memory_allocated(self.device) - held
            self._picture_bytes[size] = max(1, math.ceil(taken / len(pixels)))
        return found

    def _budget(self) -> int:
        if self.budget_bytes is not None:
            return self.budget_bytes
        return int(FREE_SHARE * free_bytes(self.device, self.processes))

    def _count(self, width: int, height: int) -> None:
        """Count what a picture takes on a CPU, and switch tiling on until one fits."""
        while True:
            self._picture_bytes[width, height] = count_picture_bytes(self.vae, width, height, self.precision)
            if self._picture_bytes[width, height] <= self._budget():
                return
            self._use_smaller_tiles(width, height)

    def _ask_less(self, batch: int, width: int, height: int) -> None:
        """Halve the batch of this size after it ran out of memory; where it was one picture, use smaller tiles."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._limits[width, height] = max(1, batch // 2)
        if batch == 1:
            self._use_smaller_tiles(width, height)

    def _use_smaller_tiles(self, width: int, height: int) -> None:
        """Halve the tiles, from the picture's longer side on, rounded up so that a quarter of one is whole latents.

        Raises:
            DataError: they would be smaller than `SMALLEST_TILE_PX`.
        """
        step = 4 * self.factor
        longest = min(max(width, height), self.tile_px or max(width, height))
        tile_px = math.ceil(longest / 2 / step) * step
        if tile_px < SMALLEST_TILE_PX or tile_px >= longest:
            raise DataError(
                f"the memory does not hold one picture of {width} x {height} px"
                + (f", not even in tiles of {self.tile_px} px" if self.tile_px else ""),
                where=str(self.device),
                hint="end other programs that use this memory, or a smaller --size",
            )
        self.report.say(
            f"cache: the memory does not hold one picture of {width} x {height} px: it is encoded in tiles of "
            f"{tile_px} px, which changes the latents, most of all near the seams"
        )
        self.tile_px = tile_px
        self.vae.enable_tiling()
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = tile_px, tile_px // self.factor


@contextmanager
def text_encoders_on(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Holds a pipeline's text encoders on `device` inside the block, and puts them back where they were."""
    encoders = [encoder for name in TEXT_ENCODERS if (encoder := getattr(pipeline, name, None)) is not None]
    homes = [next(encoder.parameters()).device for encoder in encoders]
    try:
        for encoder in encoders:
            encoder.to(device)
        yield
    finally:
        for encoder, home in zip(encoders, homes, strict=True):
            encoder.to(home)


@torch.no_grad()
def embed_captions(pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
    """Returns what the UNet is conditioned on, computed by the pipeline's own `encode_prompt`, on the CPU.

    Returns:
        `text`, (N, 77, D) float32, and for SDXL `pooled`, (N, P) float32; else `ids`, the tokens, (N, 77) int32.
    """
    from sdcompress.support.quiet import quiet

    device = pipeline.text_encoder.device
    with quiet():
        encoded = pipeline.encode_prompt(
            captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    if len(encoded) > 2:
        return {"text": encoded[0].float().cpu(), "pooled": encoded[2].float().cpu()}
    tokenizer = pipeline.tokenizer
    ids = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return {"text": encoded[0].float().cpu(), "ids": ids.int()}


def embed_in_batches(pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
    """Returns what `embed_captions` gives for any number of captions, in float16; an empty dict for none."""
    starts = range(0, len(captions), TEXT_BATCH)
    parts = [embed_captions(pipeline, captions[start : start + TEXT_BATCH]) for start in starts]
    joined = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in joined.items()}
