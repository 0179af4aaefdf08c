"""Pictures → latents, in as large batches as the memory allows."""

from __future__ import annotations

import math
from typing import Any

import torch
from sdcompress_engines.errors import DataError
from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.data.memory import count_free_bytes, count_picture_bytes, is_out_of_memory
from sdcompress.data.precision import DTYPES, Precision, copy_encoder, uses_channels_last

FREE_SHARE = 0.8
"""Share of the free memory that a batch may take.

The rest is for other programs and for the allocator's fragmentation.
"""
CUDA_BATCH_PX = 32 * 512 * 512
"""Total pixels of a batch above which a larger batch is not faster on a GPU."""
CPU_BATCH_BYTES = 32 * 2**20
"""Bytes of a batch's activations above which they exceed a CPU's last-level cache and a larger batch is slower."""
CPU_BATCH = 8
"""Pictures of a batch above which a larger batch is not faster on a CPU, however small the pictures are."""
SMALLEST_TILE_PX = 256


class LatentEncoder:
    """Encodes pictures in batches that fit the memory, and on a CPU also its last cache.

    A batch that runs out of memory is halved, down to one picture, as VAE slicing does. Where even one is too much, it
    is encoded in tiles of half its longer side, then of a quarter. Tiles overlap and are blended, but a tile's norms
    and attention do not see the rest of the picture: tiling changes values, most of all near the seams.

    The batch size changes a result only by rounding, because backends choose kernels by it: on a CPU by at most 2e-5 of
    the largest value, before values are rounded to fp16.

    Args:
        vae: an AutoencoderKL; it is not changed.
        device: where to encode.
        precision: of weights and activations.
        budget_bytes: memory that a batch may take; by default a share of what is free at the moment.
        processes: number of processes that share a CPU's memory.
        report: gets a line when pictures must be encoded in tiles.

    Attributes:
        tile_px: side of the tiles in pixels; None while pictures are encoded whole.
        tiled: number of pictures encoded in tiles so far.
        factor: side of a picture over the side of its latents.
        channels: of the latents.
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
        self.channels: int = vae.config.latent_channels
        self.tile_px: int | None = None
        self.tiled = 0
        self._picture_bytes: dict[tuple[int, int], int] = {}
        self._limits: dict[tuple[int, int], int] = {}

    def batch_size(self, width: int, height: int) -> int:
        """Returns how many pictures of this size the next batch takes.

        On CUDA the first batch of a size is one picture, whose memory is measured. On a CPU the bytes of a picture are
        counted, and one that does not fit is encoded in tiles at once, because Linux kills a process before it refuses
        it memory.

        Args:
            width, height: in pixels.
        """
        size = (width, height)
        if size not in self._picture_bytes:
            if self.device.type == "cuda":
                return 1
            self._count_on_cpu(width, height)
        fitting = self._budget() // self._picture_bytes[size]
        on_cpu = min(CPU_BATCH, CPU_BATCH_BYTES // self._picture_bytes[size])
        useful = CUDA_BATCH_PX // (width * height) if self.device.type == "cuda" else on_cpu
        return max(1, min(fitting, useful, self._limits.get(size, fitting)))

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and log-variance of the posterior, unscaled: (N, C, H/8, W/8) each, float16, on the CPU.

        Args:
            pixels: (N, 3, H, W), float32 in [-1, 1], on the CPU; N has no limit.

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
                self._lower_limit(len(batch), width, height)
                continue
            parts.append(part)
            rest = rest[len(batch) :]
            if self.tile_px is not None and max(width, height) > self.tile_px:
                self.tiled += len(batch)
        means, logvars = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(logvars)

    def _encode_batch(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns mean and log-variance, or None where the memory ran out. Then the tensors of the call are freed."""
        size = (pixels.shape[-1], pixels.shape[-2])
        measured = self.device.type != "cuda" or size in self._picture_bytes
        held = 0
        if not measured:
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
        layout = torch.channels_last if uses_channels_last(self.device, self.precision) else torch.contiguous_format
        try:
            on_device = pixels.to(self.device, DTYPES[self.precision], memory_format=layout)
            posterior = self.vae.encode(on_device).latent_dist
            latents = posterior.mean.half().cpu(), posterior.logvar.half().cpu()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        if not measured:
            taken = torch.cuda.max_memory_allocated(self.device) - held
            self._picture_bytes[size] = max(1, math.ceil(taken / len(pixels)))
        return latents

    def _budget(self) -> int:
        """Returns the bytes that the next batch may take."""
        if self.budget_bytes is not None:
            return self.budget_bytes
        return int(FREE_SHARE * count_free_bytes(self.device, self.processes))

    def _count_on_cpu(self, width: int, height: int) -> None:
        """Count the bytes that a picture takes on a CPU, with smaller and smaller tiles until it fits."""
        while True:
            self._picture_bytes[width, height] = count_picture_bytes(self.vae, width, height, self.precision)
            if self._picture_bytes[width, height] <= self._budget():
                return
            self._use_smaller_tiles(width, height)

    def _lower_limit(self, batch: int, width: int, height: int) -> None:
        """Halve the batch size of a shape after a batch ran out of memory; after one picture, use smaller tiles.

        Args:
            batch: number of pictures in that batch.
            width, height: of the pictures, in pixels.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._limits[width, height] = max(1, batch // 2)
        if batch == 1:
            self._use_smaller_tiles(width, height)

    def _use_smaller_tiles(self, width: int, height: int) -> None:
        """Halve the side of the tiles; the first tiles have half the picture's longer side.

        The side is rounded up so that a quarter of a tile is a whole number of latents.

        Raises:
            DataError: the tiles would be smaller than `SMALLEST_TILE_PX`.
        """
        step = 4 * self.factor
        longest = min(max(width, height), self.tile_px or max(width, height))
        tile_px = math.ceil(longest / 2 / step) * step
        if tile_px < SMALLEST_TILE_PX or tile_px >= longest:
            raise DataError(
                f"there is too little memory for one picture of {width} x {height} px"
                + (f", even in tiles of {self.tile_px} px" if self.tile_px else ""),
                where=str(self.device),
                hint="close other programs that use this memory, or choose a smaller --size",
            )
        self.report.show_line(
            f"cache: there is too little memory for one picture of {width} x {height} px: pictures are encoded in "
            f"tiles of {tile_px} px, which changes the latents, most of all near the seams"
        )
        self.tile_px = tile_px
        self.vae.enable_tiling()
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = tile_px, tile_px // self.factor
