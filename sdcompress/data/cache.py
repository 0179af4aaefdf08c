"""Latents and text embeddings, computed once: training from the cache never runs the VAE or the text encoder.

A cache is made in pieces, one file for each unit of the source (a shard, or a thousand pictures of a folder). A piece is whole
or not there, so a stopped build goes on; it does not depend on the others, so any number of processes can share the work.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import DataError
from sdcompress_engines.manifest import FileEntry, check_free, faults, read_manifest, require_space, sha256_file, storage_errors, write_manifest
from sdcompress_engines.progress import SILENT, Reporter

from .config import DataConfig
from .sources import Record, Skipped, Source

if TYPE_CHECKING:
    from sdcompress.teacher import LoadedPipeline

ENCODE_BATCH = 32
TEXT_BATCH = 128
INDEX = "index.safetensors"
EMPTY = "empty.safetensors"
MAX_BUCKET_ASPECT = 2.0

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class View:
    """One crop of one picture.

    Attributes:
        pixels: float32 in [-1, 1], (3, h, w).
        time_ids: height and width of the original, top and left of the crop in the resized picture, height and width of the crop;
            SDXL is conditioned on them (arXiv 2307.01952, section 2.2).
    """

    pixels: torch.Tensor
    time_ids: tuple[int, int, int, int, int, int]


def bucket_shapes(size_px: int, step_px: int) -> list[tuple[int, int]]:
    """(width, height) of equal area, about `size_px` squared, in multiples of `step_px`, up to twice as long as wide; the square first."""
    shapes = {(size_px, size_px)}
    for width in range(step_px, 2 * size_px, step_px):
        height = max(step_px, int(size_px * size_px / width // step_px) * step_px)
        if max(width / height, height / width) <= MAX_BUCKET_ASPECT:
            shapes.add((width, height))
    return sorted(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1])), shape))


def nearest_bucket(width: int, height: int, shapes: list[tuple[int, int]]) -> int:
    """The index of the shape whose aspect ratio is nearest."""
    return min(range(len(shapes)), key=lambda i: (abs(math.log(width / height) - math.log(shapes[i][0] / shapes[i][1])), i))


def to_view(picture: Image.Image, width: int, height: int, place: tuple[float, float] = (0.5, 0.5), flip: bool = False) -> View:
    """The picture resized to cover (width, height) and cropped to it, at `place` of what is over: 0 is left or top, 0.5 the centre."""
    original = picture.size
    scale = max(width / picture.width, height / picture.height)
    if scale != 1:
        picture = picture.resize((max(width, round(picture.width * scale)), max(height, round(picture.height * scale))), Image.Resampling.LANCZOS)
    left, top = round((picture.width - width) * place[0]), round((picture.height - height) * place[1])
    if place == (0.5, 0.5):
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    array = np.asarray(ImageOps.mirror(picture) if flip else picture, dtype=np.float32) / np.float32(127.5) - 1
    return View(torch.from_numpy(array).permute(2, 0, 1), (original[1], original[0], top, left, height, width))


def to_pixels(picture: Image.Image, size_px: int) -> torch.Tensor:
    """Short side to `size_px`, center crop, float32 in [-1, 1], (3, size_px, size_px)."""
    return to_view(picture, size_px, size_px).pixels


@torch.no_grad()
def embed_captions(pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
    """What the UNet is conditioned on, as the pipeline's own `encode_prompt` has it, on the CPU.

    Returns:
        `text`, (N, 77, D) float32, and for SDXL `pooled`, (N, P) float32; else `ids`, the tokens, (N, 77) int32.
    """
    from sdcompress.teacher import quiet

    with quiet():
        encoded = pipeline.encode_prompt(captions, device=pipeline.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    if len(encoded) > 2:
        return {"text": encoded[0].float().cpu(), "pooled": encoded[2].float().cpu()}
    ids = pipeline.tokenizer(captions, padding="max_length", max_length=pipeline.tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids
    return {"text": encoded[0].float().cpu(), "ids": ids.int()}


def default_size_px(pipeline: Any) -> int:
    """The side the UNet was made for: `sample_size` times the VAE's factor."""
    return int(pipeline.unet.config.sample_size) * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


@dataclass(frozen=True)
class CachedSample:
    """One view of one picture with one of its captions.

    Attributes:
        mean, std: of the VAE's posterior, unscaled, (C, h, w) float32.
        text: (77, D) float32.
        pooled: (P,) float32, for SDXL; else None.
        ids: the caption's tokens, (77,) int64; None for SDXL.
        time_ids: (6,) float32, see `View`.
    """

    mean: torch.Tensor
    std: torch.Tensor
    text: torch.Tensor
    pooled: torch.Tensor | None
    ids: torch.Tensor | None
    time_ids: torch.Tensor


@dataclass
class LatentCache:
    """A cache whose tensors stay on disk, mapped into memory, until they are drawn.

    Attributes:
        index: `unit`, `bucket`, `row`, `first`, `count` of each picture and the flat `caption_row` and `caption_share`.
        views: crops of each picture, mirrored ones counted.
        sha256: of the cache's content, to name it in what is trained from it.
        size_px: side of the square pictures, or the root of the buckets' area.
        source: the data set's name.
    """

    folder: Path
    index: dict[str, torch.Tensor]
    views: int
    sha256: str
    teacher_sha256: str
    size_px: int
    source: str = ""
    _units: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    _empty: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.index["unit"])

    @property
    def buckets(self) -> torch.Tensor:
        """Which of the shapes each picture has, (N,) int32; pictures of one batch must share it."""
        return self.index["bucket"]

    def about(self) -> dict[str, Any]:
        """What a manifest says of the data something was trained on."""
        return {"source": self.source, "pictures": len(self), "size_px": self.size_px}

    def _unit(self, number: int) -> dict[str, torch.Tensor]:
        if number not in self._units:
            self._units[number] = load_file(self.folder / unit_name(number))
        return self._units[number]

    def sample(self, i: int, view: int, pick: float, *, drop_caption: bool = False) -> CachedSample:
        """View `view` of picture `i`, with the caption that `pick` in [0, 1) falls on by the captions' shares, or the empty one."""
        unit = self._unit(int(self.index["unit"][i]))
        bucket, row = int(self.index["bucket"][i]), int(self.index["row"][i]) + view
        if drop_caption:
            self._empty = self._empty or load_file(self.folder / EMPTY)
            texts, place = self._empty, 0
        else:
            texts, place = unit, int(self.index["caption_row"][self._caption(i, pick)])
        pooled = texts["pooled"][place].float() if "pooled" in texts else None
        ids = texts["ids"][place].long() if "ids" in texts else None
        std = (0.5 * unit[f"logvar.{bucket}"][row].float()).exp()
        return CachedSample(unit[f"mean.{bucket}"][row].float(), std, texts["text"][place].float(), pooled, ids, unit[f"time_ids.{bucket}"][row].float())

    def _caption(self, i: int, pick: float) -> int:
        first, count = int(self.index["first"][i]), int(self.index["count"][i])
        reached = 0.0
        for place in range(first, first + count):
            reached += float(self.index["caption_share"][place])
            if pick < reached:
                return place
        return first + count - 1

    @classmethod
    def open(cls, folder: Path, teacher_sha256: str | None = None, source: Source | None = None, size_px: int | None = None, config: DataConfig | None = None) -> LatentCache:
        """Open a cache, made with the teacher of this hash, from this data, at this size and so cut, as far as they are given.

        Raises:
            DataError: damaged, no cache, or made from something else.
        """
        found = faults(folder, "cache", contents=False)
        if found:
            raise DataError(f"is no whole cache: {found[0]}", where=folder, hint="delete it and let it be made again")
        manifest = read_manifest(folder)
        if manifest is None or "data" not in manifest.config:
            raise DataError("was made by an earlier version", where=folder, hint="delete it and let it be made again")
        if teacher_sha256 and manifest.inputs["teacher"] != teacher_sha256:
            raise DataError(f"was made with the teacher {manifest.inputs['teacher'][:12]}", where=folder, expected=f"{teacher_sha256[:12]}, the one given", hint="delete it and let it be made again")
        if source and manifest.config["files"] != source.fingerprint():
            raise DataError(f"was made from other data ({manifest.config['source']})", where=folder, expected=f"{source.name} as it is now", hint="delete it and let it be made again")
        if size_px and manifest.config["size_px"] != size_px:
            raise DataError(f"holds latents of {manifest.config['size_px']} px pictures", where=folder, expected=f"{size_px} px", hint="another --cache")
        if config is not None:
            theirs, ours = manifest.config["data"], _cut(config)
            differing = "; ".join(f"{k}: {theirs.get(k)} there, {ours[k]} here" for k in ours if theirs.get(k) != ours[k])
            if differing:
                raise DataError(f"was made with other data settings ({differing})", where=folder, hint="another --cache, or delete it and let it be made again")
        return cls(folder, load_file(folder / INDEX), manifest.config["views"], manifest.inputs["data"], manifest.inputs["teacher"], manifest.config["size_px"], manifest.config["source"])


def unit_name(number: int) -> str:
    return f"unit-{number:05d}.safetensors"


def _cut(config: DataConfig) -> dict[str, Any]:
    """What decides a cache's content besides teacher, data and size."""
    return json.loads(config.model_dump_json(exclude={"size_px", "max_unusable"}))


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map` with `workers` threads, in order, never more than a few items ahead."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def build_cache(
    source: Source, teacher: LoadedPipeline, output: Path, size_px: int | None = None, *, config: DataConfig | None = None, force: bool = False, report: Reporter = SILENT
) -> LatentCache:
    """Encode every usable picture and caption of `source` with the teacher's VAE and text encoder into `output`.

    A stopped build is taken up where it was; under `accelerate launch` or `torchrun` the processes share the units, and the first one
    writes the index. Exact duplicates (the same bytes with the same captions) are kept once.

    Raises:
        DataError: nothing usable, or more unusable than `config.max_unusable`. ArtifactError, StorageError: `output` cannot be written.
    """
    from accelerate import PartialState

    config = config or DataConfig()
    pipeline: Any = teacher.pipeline
    size_px = size_px or config.size_px or default_size_px(pipeline)
    state = PartialState(cpu=not torch.cuda.is_available())
    check_free(output, force)
    identity = {"teacher": teacher.sha256, "files": source.fingerprint(), "size_px": size_px, "data": _cut(config), "units": source.units()}
    partial = output.with_name(f".{output.name}.partial")
    with storage_errors(output):
        if state.is_main_process:
            _start_or_continue(partial, identity, report)
        state.wait_for_everyone()
        encoder = _Encoder(pipeline, state.device, size_px, config)
        try:
            with report.task("encode pictures") as advance:
                for number in range(state.process_index, source.units(), state.num_processes):
                    if not (partial / f"{unit_name(number)}.json").is_file():
                        encoder.unit(source, number, partial, advance)
            state.wait_for_everyone()
            if state.is_main_process:
                _finish(partial, output, source, teacher, identity, encoder, config, report)
        except BaseException:
            if state.is_main_process and not any(partial.glob("unit-*.json")):  # nothing to go on with
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            pipeline.vae.to("cpu")
        state.wait_for_everyone()
    return LatentCache.open(output)


def _start_or_continue(partial: Path, identity: dict[str, Any], report: Reporter) -> None:
    marker = partial / "build.json"
    if marker.is_file() and marker.read_text() == json.dumps(identity, sort_keys=True):
        done = len(list(partial.glob("unit-*.json")))
        report.say(f"cache: going on after {done} of {identity['units']} pieces")
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    marker.write_text(json.dumps(identity, sort_keys=True))


class _Encoder:
    """Turns units of a source into files of a cache."""

    CHECK_FROM = 1000  # pictures after which too large a share of unusable ones stops the build before its end

    def __init__(self, pipeline: Any, device: torch.device, size_px: int, config: DataConfig) -> None:
        self.pipeline, self.device, self.config = pipeline, device, config
        for name in ("vae", "text_encoder", "text_encoder_2"):
            if getattr(pipeline, name, None) is not None:
                getattr(pipeline, name).to(device)
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        self.shapes = bucket_shapes(size_px, max(factor, min(64, size_px // 8))) if config.buckets else [(size_px, size_px)]
        self.views = (config.views if config.crop == "random" else 1) * (2 if config.flip else 1)
        self.threads = max(1, (os.cpu_count() or 1) // 2)
        self.met = Skipped()

    def _views(self, record: Record) -> tuple[Record, int, list[View]] | tuple[Record, DataError]:
        try:
            picture = record.picture()
        except DataError as error:
            return record, error
        bucket = nearest_bucket(*picture.size, self.shapes)
        width, height = self.shapes[bucket]
        random = np.random.default_rng(list(hashlib.sha256(record.encoded).digest()[:8]))
        views = []
        for _ in range(self.config.views if self.config.crop == "random" else 1):
            place = (float(random.random()), float(random.random())) if self.config.crop == "random" else (0.5, 0.5)
            views += [to_view(picture, width, height, place, flip) for flip in ((False, True) if self.config.flip else (False,))]
        return record, bucket, views

    @torch.no_grad()
    def unit(self, source: Source, number: int, folder: Path, advance: Callable[..., None]) -> None:
        """Encode one unit into its file and, last, the JSON beside it that says it is whole."""
        skipped = Skipped()
        waiting: dict[int, list[View]] = {}
        done: dict[str, list[torch.Tensor]] = {}
        rows: dict[int, int] = {}
        captions: dict[str, int] = {}
        columns: dict[str, list[Any]] = {name: [] for name in ("bucket", "row", "first", "count", "caption_row", "caption_share", "digest")}

        def encode(bucket: int, least: int) -> None:
            views = waiting.get(bucket, [])
            while len(views) >= least:
                batch, views = views[:ENCODE_BATCH], views[ENCODE_BATCH:]
                posterior = self.pipeline.vae.encode(torch.stack([v.pixels for v in batch]).to(self.device)).latent_dist
                done.setdefault(f"mean.{bucket}", []).append(posterior.mean.half().cpu())
                done.setdefault(f"logvar.{bucket}", []).append(posterior.logvar.half().cpu())
                done.setdefault(f"time_ids.{bucket}", []).append(torch.tensor([v.time_ids for v in batch], dtype=torch.int32))
            waiting[bucket] = views

        for found in in_order(self._views, source.unit(number, skipped), self.threads):
            advance()
            if len(found) == 2:
                skipped.read -= 1
                skipped.add("unreadable picture", found[0].key)
                continue
            record, bucket, views = found
            columns["bucket"].append(bucket)
            columns["row"].append(rows.get(bucket, 0))
            columns["first"].append(len(columns["caption_row"]))
            columns["count"].append(len(record.captions))
            for caption, share in record.captions:
                columns["caption_row"].append(captions.setdefault(caption, len(captions)))
                columns["caption_share"].append(share)
            columns["digest"].append(list(hashlib.sha256(record.encoded + json.dumps(record.captions).encode()).digest()[:16]))
            rows[bucket] = rows.get(bucket, 0) + len(views)
            waiting.setdefault(bucket, []).extend(views)
            encode(bucket, ENCODE_BATCH)
        for bucket in list(waiting):
            encode(bucket, 1)
        self.met.merge(skipped)
        if self.met.read + self.met.count + sum(self.met.filtered.values()) >= self.CHECK_FROM:
            self.met.check(source.name, self.config.max_unusable)
        tensors = {name: torch.cat(parts) for name, parts in done.items()} | self.embed(list(captions))
        kinds = {"caption_share": torch.float32, "digest": torch.uint8}
        tensors |= {f"pictures.{name}": torch.tensor(values, dtype=kinds.get(name, torch.int32)).reshape(len(values), *((16,) if name == "digest" else ())) for name, values in columns.items()}
        require_space(folder, sum(t.numel() * t.element_size() for t in tensors.values()), "the cache's next piece")
        path = folder / unit_name(number)
        temporary = path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        os.replace(temporary, path)
        facts = {"sha256": sha256_file(path), "bytes": path.stat().st_size, "read": skipped.read, "reasons": skipped.reasons, "filtered": skipped.filtered, "fields": sorted(skipped.fields)}
        temporary.write_text(json.dumps(facts))
        os.replace(temporary, folder / f"{unit_name(number)}.json")

    def embed(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """What `embed_captions` gives, in float16."""
        parts = [embed_captions(self.pipeline, captions[start : start + TEXT_BATCH]) for start in range(0, len(captions), TEXT_BATCH)]
        joined = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}
        return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in joined.items()}


def _finish(partial: Path, output: Path, source: Source, teacher: LoadedPipeline, identity: dict[str, Any], encoder: _Encoder, config: DataConfig, report: Reporter) -> None:
    """Check the shares, write index and manifest, and rename the folder into its place."""
    total = Skipped()
    hashed: dict[str, FileEntry] = {}
    columns: dict[str, list[torch.Tensor]] = {}
    captions = rows = 0
    for number in range(source.units()):
        facts = json.loads((partial / f"{unit_name(number)}.json").read_text())
        total.merge(Skipped(read=facts["read"], reasons=facts["reasons"], filtered=facts["filtered"], fields=set(facts["fields"])))
        hashed[unit_name(number)] = FileEntry(facts["sha256"], facts["bytes"])
        unit = load_file(partial / unit_name(number))
        ours = {name.removeprefix("pictures."): tensor for name, tensor in unit.items() if name.startswith("pictures.")}
        ours["unit"] = torch.full_like(ours["row"], number)
        ours["first"] = ours["first"] + captions
        captions += len(ours["caption_row"])
        rows += len(unit.get("text", ()))
        for name, tensor in ours.items():
            columns.setdefault(name, []).append(tensor)
    if total.read == 0:
        shutil.rmtree(partial)
    total.check(source.name, config.max_unusable)
    index = {name: torch.cat(parts) for name, parts in columns.items()}
    _, first_seen = np.unique(index.pop("digest").numpy(), axis=0, return_index=True)
    kept = torch.from_numpy(np.sort(first_seen))
    found = len(index["unit"])
    index |= {name: index[name][kept].contiguous() for name in ("unit", "bucket", "row", "first", "count")}
    save_file(index, partial / INDEX)
    save_file(encoder.embed([""]), partial / EMPTY)
    (partial / "build.json").unlink()
    for sidecar in partial.glob("unit-*.json"):
        sidecar.unlink()
    size = sum(entry.bytes for entry in hashed.values()) + (partial / INDEX).stat().st_size
    content = hashlib.sha256("".join(entry.sha256 for entry in hashed.values()).encode()).hexdigest()
    figures = {
        "pictures": len(kept), "duplicates": found - len(kept), "captions": rows, "bytes": size, "bytes_per_picture": round(size / len(kept)),
        "skipped": {k: len(v) for k, v in total.reasons.items()}, "filtered": total.filtered,
    }  # fmt: skip
    write_manifest(
        partial, "cache", hashed=hashed, inputs={"teacher": teacher.sha256, "data": content}, figures=figures,
        config={"size_px": identity["size_px"], "source": source.name, "files": identity["files"], "data": identity["data"], "views": encoder.views, "shapes": encoder.shapes},
    )  # fmt: skip
    if output.exists():
        shutil.rmtree(output)
    os.replace(partial, output)
    told = "".join(f", {len(keys)} left out: {reason}" for reason, keys in total.reasons.items()) + "".join(f", {count} filtered out: {reason}" for reason, count in total.filtered.items())
    report.say(f"cache: {len(kept):,} pictures, {figures['bytes_per_picture']:,} bytes each{told}" + (f", {found - len(kept)} duplicates" if found > len(kept) else ""))
