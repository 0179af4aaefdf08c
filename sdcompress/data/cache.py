"""Latents and text embeddings, computed once: training from the cache never runs the VAE or the text encoder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import DataError
from sdcompress_engines.manifest import faults, read_manifest, require_space, staged, write_manifest
from sdcompress_engines.progress import SILENT, Reporter

from .sources import Skipped, Source

if TYPE_CHECKING:
    from sdcompress.teacher import LoadedPipeline

ENCODE_BATCH = 32
TEXT_BATCH = 128


def to_pixels(picture: Image.Image, size_px: int) -> torch.Tensor:
    """Short side to `size_px`, center crop, float32 in [-1, 1], (3, size_px, size_px)."""
    scale = size_px / min(picture.size)
    if scale != 1:
        picture = picture.resize((max(size_px, round(picture.width * scale)), max(size_px, round(picture.height * scale))), Image.Resampling.LANCZOS)
    left, top = (picture.width - size_px) // 2, (picture.height - size_px) // 2
    array = np.asarray(picture.crop((left, top, left + size_px, top + size_px)), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


@torch.no_grad()
def embed_captions(pipeline: Any, captions: list[str]) -> torch.Tensor:
    """The text encoder's last hidden state, (N, 77, D) float32 on the CPU, as the pipeline's own `encode_prompt` has it."""
    ids = pipeline.tokenizer(captions, padding="max_length", max_length=pipeline.tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids
    return pipeline.text_encoder(ids.to(pipeline.text_encoder.device))[0].float().cpu()


def default_size_px(pipeline: Any) -> int:
    """The side the UNet was made for: `sample_size` times the VAE's factor."""
    return int(pipeline.unet.config.sample_size) * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


@dataclass(frozen=True)
class LatentCache:
    """A cache in memory-mapped tensors.

    Attributes:
        mean, std: of the VAE's posterior, unscaled, (N, C, h, w) float16.
        text: one embedding a distinct caption, (M, 77, D) float16; the last row is the empty caption's.
        caption_index: row of `text` for each picture, (N,) int64.
        sha256: of the cache's content, to name it in what is trained from it.
    """

    mean: torch.Tensor
    std: torch.Tensor
    text: torch.Tensor
    caption_index: torch.Tensor
    sha256: str
    teacher_sha256: str
    size_px: int

    def __len__(self) -> int:
        return len(self.mean)

    @classmethod
    def open(cls, folder: Path, teacher_sha256: str | None = None, source: Source | None = None, size_px: int | None = None) -> LatentCache:
        """Open a cache, made with the teacher of this hash, from this data, at this size, as far as they are given.

        Raises:
            DataError: damaged, no cache, or made from something else.
        """
        found = faults(folder, "cache")
        if found:
            raise DataError(f"is no whole cache: {found[0]}", where=folder, hint="delete it and let it be made again")
        manifest = read_manifest(folder)
        assert manifest is not None  # for the type checker: faults() has just read it
        if teacher_sha256 and manifest.inputs["teacher"] != teacher_sha256:
            raise DataError(f"was made with the teacher {manifest.inputs['teacher'][:12]}", where=folder, expected=f"{teacher_sha256[:12]}, the one given", hint="delete it and let it be made again")
        if source and manifest.config["files"] != source.fingerprint():
            raise DataError(f"was made from other data ({manifest.config['source']})", where=folder, expected=f"{source.name} as it is now", hint="delete it and let it be made again")
        if size_px and manifest.config["size_px"] != size_px:
            raise DataError(f"holds latents of {manifest.config['size_px']} px pictures", where=folder, expected=f"{size_px} px", hint="another --cache")
        tensors = load_file(folder / "cache.safetensors")
        digest = manifest.files["cache.safetensors"].sha256
        return cls(tensors["mean"], tensors["std"], tensors["text"], tensors["caption_index"], digest, manifest.inputs["teacher"], manifest.config["size_px"])


@torch.no_grad()
def build_cache(source: Source, teacher: LoadedPipeline, output: Path, size_px: int | None = None, *, force: bool = False, report: Reporter = SILENT) -> LatentCache:
    """Encode every usable picture and caption of `source` with the teacher's VAE and text encoder into `output`.

    Broken and captionless pictures are skipped and counted in the manifest.

    Raises:
        DataError: nothing usable, or more than 5% unusable. ArtifactError, StorageError: `output` cannot be written.
    """
    pipeline: Any = teacher.pipeline
    size_px = size_px or default_size_px(pipeline)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.vae.to(device)
    pipeline.text_encoder.to(device)
    captions: dict[str, int] = {}
    index: list[int] = []
    moments: list[tuple[torch.Tensor, torch.Tensor]] = []
    pending: list[torch.Tensor] = []
    digest = hashlib.sha256()
    broken = Skipped()

    def encode() -> None:
        if pending:
            posterior = pipeline.vae.encode(torch.stack(pending).to(device)).latent_dist
            moments.append((posterior.mean.half().cpu(), posterior.std.half().cpu()))
            pending.clear()

    with staged(output, force) as out:
        with report.task("encode pictures") as advance:
            for record in source:
                try:
                    pending.append(to_pixels(record.picture(), size_px))
                except DataError:
                    broken.add("unreadable picture", record.key)
                    continue
                index.append(captions.setdefault(record.caption, len(captions)))
                digest.update(hashlib.sha256(record.encoded).digest() + record.caption.encode() + b"\0")
                if len(pending) == ENCODE_BATCH:
                    encode()
                advance()
            encode()
        broken.reasons |= source.skipped.reasons
        broken.read = len(index)
        broken.check(source.name)
        texts = []
        with report.task("encode captions", len(captions) + 1) as advance:
            rows = [*captions, ""]
            for start in range(0, len(rows), TEXT_BATCH):
                texts.append(embed_captions(pipeline, rows[start : start + TEXT_BATCH]).half())
                advance(len(texts[-1]))
        tensors = {
            "mean": torch.cat([m for m, _ in moments]).contiguous(),
            "std": torch.cat([s for _, s in moments]).contiguous(),
            "text": torch.cat(texts).contiguous(),
            "caption_index": torch.tensor(index, dtype=torch.int64),
        }
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        require_space(output, size, "the cache")
        save_file(tensors, out / "cache.safetensors")
        figures = {"pictures": len(index), "captions": len(captions), "bytes_per_picture": round(size / len(index)), "skipped": {k: len(v) for k, v in broken.reasons.items()}}
        write_manifest(out, "cache", config={"size_px": size_px, "source": source.name, "files": source.fingerprint()}, inputs={"teacher": teacher.sha256, "data": digest.hexdigest()}, figures=figures)
    told = "".join(f", {len(keys)} left out: {reason}" for reason, keys in broken.reasons.items())
    report.say(f"cache: {len(index):,} pictures, {figures['bytes_per_picture']:,} bytes each{told}")
    return LatentCache.open(output)
