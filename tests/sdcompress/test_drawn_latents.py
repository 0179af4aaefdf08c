"""The latents of a set that a teacher drew: kept beside the pictures, and taken by a cache in place of encoding."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sdcompress_engines.manifest import MANIFEST_NAME, read_manifest, write_manifest
from sdcompress_engines.progress import Reporter

from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.config import DataConfig
from sdcompress.data.drawn import hash_vae, latents_name, pack_latents
from sdcompress.data.encode import LatentEncoder
from sdcompress.data.report import inspect_source
from sdcompress.data.sources import open_source
from sdcompress.data.units import UnitEncoder
from sdcompress.generate.dataset import generate_dataset
from sdcompress.generate.output_folder import METADATA
from sdcompress.generate.settings import GenerateSettings
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.sampling import generate
from sdcompress.train.config import TrainConfig
from sdcompress.train.pipelines import make_batches

PROMPTS = ["a flat icon of a cat", "a 3d render of a tree"]
SETTINGS = GenerateSettings(count=5, batch_size=2, steps=2, size_px=64, seed=3, picture_format="png")
NAMES = [f"{i:06d}.png" for i in range(5)]


class Lines(Reporter):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def show_line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def teacher(random_folder: Path) -> LoadedPipeline:
    return load_pipeline(random_folder)


@pytest.fixture(scope="module")
def drawn(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five 64 px pictures in three batches, with their latents."""
    return generate_dataset(random_folder, PROMPTS, tmp_path_factory.mktemp("drawn") / "set", SETTINGS).folder


@pytest.fixture
def copied(drawn: Path, tmp_path: Path) -> Path:
    return shutil.copytree(drawn, tmp_path / "set")


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes encoding a picture an error."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a picture was encoded")

    monkeypatch.setattr(LatentEncoder, "encode", refuse)


def stored_latents(folder: Path) -> torch.Tensor:
    """The latents of all pictures of a set, (N, C, H/8, W/8) float16."""
    return torch.cat([load_file(file)["latents"] for file in sorted(folder.glob("latents-*.safetensors"))])


def cached_latents(cache: LatentCache, view: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of one view of all pictures, (N, C, H/8, W/8) float32 each."""
    samples = [cache.sample(i, view, 0.0) for i in range(len(cache))]
    return torch.stack([sample.mean for sample in samples]), torch.stack([sample.std for sample in samples])


def decode(pipeline: Any, latents: torch.Tensor) -> np.ndarray:
    """The pixels of unscaled latents, (N, H, W, 3), 0 to 255."""
    with torch.no_grad():
        pixels = pipeline.vae.decode(latents.float()).sample
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()


def encoded_rows(cache: LatentCache) -> list[int]:
    """Which pictures of a cache were encoded: those with a spread."""
    return [i for i, std in enumerate(cached_latents(cache)[1]) if std.max() > 0]


def test_a_set_holds_the_latents_that_the_unet_made_and_the_pictures_were_decoded_from(
    drawn: Path, teacher: LoadedPipeline
) -> None:
    kept: list[torch.Tensor] = []
    generate(teacher.pipeline, PROMPTS, seeds=[3, 4], steps=2, size_px=64, take_latents=kept.append)
    unscaled = (kept[0] / teacher.pipeline.vae.config.scaling_factor).half()
    assert torch.equal(stored_latents(drawn)[:2], unscaled)
    pictures = np.stack([np.asarray(Image.open(drawn / name)) for name in NAMES])
    assert np.abs(decode(teacher.pipeline, stored_latents(drawn)) - pictures).max() < 1.5
    rows = [json.loads(line) for line in (drawn / METADATA).read_text().splitlines()]
    assert [(row["latents"], row["latents_row"]) for row in rows[1:3]] == [(latents_name(0), 1), (latents_name(2), 0)]
    manifest = read_manifest(drawn)
    assert manifest is not None
    assert manifest.config["scaling_factor"] == teacher.pipeline.vae.config.scaling_factor
    assert manifest.inputs["teacher"] == teacher.sha256
    assert set(manifest.files) >= {latents_name(0), latents_name(2), latents_name(4)}


@pytest.mark.usefixtures("no_encoder")
def test_a_cache_of_a_drawn_set_holds_exactly_its_latents_and_encodes_nothing(
    drawn: Path, teacher: LoadedPipeline, tmp_path: Path
) -> None:
    lines = Lines()
    cache = build_cache(open_source(drawn), teacher, tmp_path / "cache", 64, report=lines)
    mean, std = cached_latents(cache)
    assert torch.equal(mean.half(), stored_latents(drawn))
    assert torch.equal(std, torch.zeros_like(mean))
    assert cache.sample(0, 0, 0.0).time_ids.tolist() == [64, 64, 0, 0, 64, 64]
    assert cache.drawn == 5
    assert lines.lines[-1].endswith("5 with the teacher's own latents")
    batches = make_batches(teacher.pipeline, cache, TrainConfig(batch_size=5))
    clean = torch.stack([batches._draw_sample(position)[0] for position in range(5)])
    scaled = stored_latents(drawn).float() * teacher.pipeline.vae.config.scaling_factor
    assert torch.equal(clean, scaled[[batches.order[position] for position in range(5)]])


def test_without_latents_the_same_pictures_are_drawn_and_encoded(
    drawn: Path, random_folder: Path, teacher: LoadedPipeline, tmp_path: Path
) -> None:
    plain = generate_dataset(random_folder, PROMPTS, tmp_path / "set", replace(SETTINGS, latents=False)).folder
    assert [(plain / name).read_bytes() for name in NAMES] == [(drawn / name).read_bytes() for name in NAMES]
    assert not list(plain.glob("*.safetensors"))
    assert "latents" not in (plain / METADATA).read_text()
    encoded = build_cache(open_source(plain), teacher, tmp_path / "encoded", 64)
    taken = build_cache(open_source(drawn), teacher, tmp_path / "taken", 64)
    assert encoded_rows(encoded) == [0, 1, 2, 3, 4]
    assert encoded.drawn == 0
    assert encoded.sha256 != taken.sha256


def test_a_set_of_an_earlier_version_is_continued_without_latents(
    random_folder: Path, drawn: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, latents=False)
    folder = generate_dataset(random_folder, PROMPTS, tmp_path / "set", settings).folder
    recorded = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({k: v for k, v in recorded.items() if k != "latents"}))
    (folder / MANIFEST_NAME).unlink()
    (folder / NAMES[4]).unlink()
    assert generate_dataset(random_folder, PROMPTS, folder, settings).drawn == 1
    assert (folder / NAMES[4]).read_bytes() == (drawn / NAMES[4]).read_bytes()


def test_an_edited_picture_is_encoded_and_counted_and_an_edited_caption_keeps_the_latents(
    copied: Path, drawn: Path, teacher: LoadedPipeline, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), "red").save(copied / NAMES[3])
    (copied / METADATA).write_text((copied / METADATA).read_text().replace("icon", "drawing"))
    lines = Lines()
    cache = build_cache(open_source(copied), teacher, tmp_path / "cache", 64, report=lines)
    assert encoded_rows(cache) == [3]
    kept = [0, 1, 2, 4]
    assert torch.equal(cached_latents(cache)[0][kept].half(), stored_latents(drawn)[kept])
    assert "4 with the teacher's own latents (encoded: 1 changed since they were drawn)" in lines.lines[-1]


def test_a_picture_edited_before_a_stopped_run_goes_on_is_encoded(
    copied: Path, random_folder: Path, teacher: LoadedPipeline, tmp_path: Path
) -> None:
    (copied / MANIFEST_NAME).unlink()
    (copied / NAMES[4]).unlink()
    Image.new("RGB", (64, 64), "red").save(copied / NAMES[0])
    generate_dataset(random_folder, PROMPTS, copied, SETTINGS)
    assert encoded_rows(build_cache(open_source(copied), teacher, tmp_path / "cache", 64)) == [0]


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("fault", "reason"), [(damage, "with damaged latents"), (Path.unlink, "without their latents")]
)
def test_pictures_of_damaged_latents_are_encoded_and_counted(
    copied: Path, teacher: LoadedPipeline, tmp_path: Path, fault: Any, reason: str
) -> None:
    fault(copied / latents_name(2))
    lines = Lines()
    cache = build_cache(open_source(copied), teacher, tmp_path / "cache", 64, report=lines)
    assert encoded_rows(cache) == [2, 3]
    assert lines.lines[-1].endswith(f"3 with the teacher's own latents (encoded: 2 {reason})")


FOREIGN: dict[str, Any] = {
    "channels": lambda latents: latents[:, :3],
    "side": lambda latents: latents[:, :, :4],
    "number": lambda latents: latents[:1],
    "flat": lambda latents: latents[0, 0],
    "dtype": lambda latents: latents.float(),
    "not finite": lambda latents: latents * float("inf"),
}


@pytest.mark.parametrize("edit", FOREIGN)
def test_latents_that_do_not_fit_their_pictures_are_never_taken(
    copied: Path, teacher: LoadedPipeline, tmp_path: Path, edit: str
) -> None:
    file, pictures = copied / latents_name(2), [(copied / name).read_bytes() for name in NAMES[2:4]]
    file.write_bytes(pack_latents(FOREIGN[edit](load_file(file)["latents"]).clone(), pictures, ""))
    manifest = read_manifest(copied)
    assert manifest is not None
    write_manifest(copied, "dataset", config=manifest.config, inputs=manifest.inputs)
    assert encoded_rows(build_cache(open_source(copied), teacher, tmp_path / "cache", 64)) == [2, 3]


def test_pictures_of_another_size_or_from_elsewhere_are_encoded(
    copied: Path, teacher: LoadedPipeline, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), "red").save(copied / "more.png")
    (copied / "more.txt").write_text("a red square")
    lines = Lines()
    cache = build_cache(open_source(copied), teacher, tmp_path / "cache", 128, report=lines)
    assert cache.drawn == 0
    assert "encoded: 5 of another size than the training's; 1 not of the drawn set" in lines.lines[-1]


def test_mirrored_views_are_encoded_beside_drawn_ones(drawn: Path, teacher: LoadedPipeline, tmp_path: Path) -> None:
    taken = build_cache(open_source(drawn), teacher, tmp_path / "taken", 64, config=DataConfig(flip=True))
    (plain := shutil.copytree(drawn, tmp_path / "plain")).joinpath(MANIFEST_NAME).unlink()
    for file in plain.glob("latents-*"):
        file.unlink()
    encoded = build_cache(open_source(plain), teacher, tmp_path / "encoded", 64, config=DataConfig(flip=True))
    assert torch.equal(cached_latents(taken, 0)[0].half(), stored_latents(drawn))
    for mirrored, expected in zip(cached_latents(taken, 1), cached_latents(encoded, 1), strict=True):
        assert torch.allclose(mirrored, expected, rtol=2e-3, atol=2e-3)


def test_buckets_and_random_crops_take_whole_pictures_as_they_were_drawn(
    drawn: Path, teacher: LoadedPipeline, tmp_path: Path
) -> None:
    config = DataConfig(buckets=True, crop="random", views=2)
    cache = build_cache(open_source(drawn), teacher, tmp_path / "cache", 64, config=config)
    for view in (0, 1):
        assert torch.equal(cached_latents(cache, view)[0].half(), stored_latents(drawn))


def test_another_model_takes_the_latents_where_its_vae_has_the_same_weights(
    drawn: Path, teacher: LoadedPipeline, tmp_path: Path
) -> None:
    student = replace(teacher, sha256="5" * 64)
    assert build_cache(open_source(drawn), student, tmp_path / "same", 64).drawn == 5
    other = copy.copy(teacher.pipeline)
    other.register_modules(vae=copy.deepcopy(teacher.pipeline.vae))  # type: ignore[attr-defined]
    with torch.no_grad():
        other.vae.decoder.conv_out.bias += 0.01
    lines = Lines()
    foreign = build_cache(open_source(drawn), replace(student, pipeline=other), tmp_path / "other", 64, report=lines)
    assert foreign.drawn == 0
    assert f"the latents of set were drawn by {teacher.sha256[:12]}, whose VAE is not known to be" in lines.lines[0]


def test_a_vae_has_the_same_hash_in_half_precision(teacher: LoadedPipeline) -> None:
    assert hash_vae(copy.deepcopy(teacher.pipeline.vae).half()) == hash_vae(teacher.pipeline.vae) != ""


def test_the_latents_of_an_export_are_those_of_its_pipeline(
    small_exports: Any, small_folder: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, count=2, backend="auto")
    folder = generate_dataset(small_exports().folder, PROMPTS, tmp_path / "set", settings).folder
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.config["vae"] == ""
    teacher = replace(load_pipeline(small_folder), sha256=manifest.inputs["pipeline"])
    cache = build_cache(open_source(folder), teacher, tmp_path / "cache", 64)
    assert cache.drawn == 2
    pictures = np.stack([np.asarray(Image.open(folder / name)) for name in NAMES[:2]])
    assert np.abs(decode(teacher.pipeline, cached_latents(cache)[0]) - pictures).max() < 1.5


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler scheduler
def test_the_mean_and_deviation_of_an_sdxl_vae_are_in_the_latents(sdxl_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sdxl_folder, tmp_path / "sdxl")
    config = json.loads((folder / "vae/config.json").read_text())
    config |= {"latents_mean": [0.5, -1.0, 2.0, 0.1], "latents_std": [2.0, 1.0, 3.0, 0.5]}
    (folder / "vae/config.json").write_text(json.dumps(config))
    drawn = generate_dataset(folder, PROMPTS, tmp_path / "set", replace(SETTINGS, count=2)).folder
    model = load_pipeline(folder)
    cache = build_cache(open_source(drawn), model, tmp_path / "cache", 64)
    assert cache.drawn == 2
    pictures = np.stack([np.asarray(Image.open(drawn / name)) for name in NAMES[:2]])
    assert np.abs(decode(model.pipeline, cached_latents(cache)[0]) - pictures).max() < 1.5


def test_a_stopped_build_with_drawn_latents_continues_and_ends_the_same(
    copied: Path, teacher: LoadedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcompress.data.folder.UNIT_PICTURES", 2)
    Image.new("RGB", (64, 64), "red").save(copied / NAMES[3])
    whole = build_cache(open_source(copied), teacher, tmp_path / "whole", 64)
    genuine, encoded = UnitEncoder.encode, list[int]()

    def encode(self: UnitEncoder, source: Any, number: int, advance: Any) -> Any:
        encoded.append(number)
        if encoded == [0, 1, 2]:
            raise KeyboardInterrupt
        return genuine(self, source, number, advance)

    monkeypatch.setattr(UnitEncoder, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        build_cache(open_source(copied), teacher, tmp_path / "cache", 64)
    again = build_cache(open_source(copied), teacher, tmp_path / "cache", 64)
    assert encoded == [0, 1, 2, 2]
    assert (again.sha256, again.drawn) == (whole.sha256, 4)


def test_a_stopped_build_that_encoded_starts_over_where_latents_are_there_now(
    copied: Path, teacher: LoadedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcompress.data.folder.UNIT_PICTURES", 2)
    built = build_cache(open_source(copied), teacher, tmp_path / "cache", 64)
    partial = tmp_path / ".cache.partial"
    shutil.copytree(built.folder, partial)
    source = open_source(copied)
    begun = {"teacher": teacher.sha256, "files": source.fingerprint(), "captions": source.hash_captions()}
    begun |= {"size_px": 64, "data": json.loads(DataConfig().model_dump_json(exclude={"size_px", "max_unusable"}))}
    (partial / "build.json").write_text(json.dumps(begun | {"units": 3, "precision": "fp32", "latents": None}))
    shutil.rmtree(built.folder)
    lines = Lines()
    assert build_cache(source, teacher, tmp_path / "cache", 64, report=lines).drawn == 5
    assert not [line for line in lines.lines if "continuing" in line]


@pytest.mark.parametrize("fault", ["unfinished", "edited", "other facts"])
def test_a_set_whose_manifest_does_not_vouch_for_its_latents_is_encoded_with_a_line(
    copied: Path, teacher: LoadedPipeline, tmp_path: Path, fault: str
) -> None:
    manifest = read_manifest(copied)
    assert manifest is not None
    if fault == "unfinished":
        (copied / MANIFEST_NAME).unlink()
        expected = "is a drawn data set that is not finished"
    elif fault == "edited":
        (copied / MANIFEST_NAME).write_text((copied / MANIFEST_NAME).read_text().replace("png", "pgn"))
        expected = "this manifest was edited"
    else:
        config = manifest.config | {"batch_size": "two"}
        write_manifest(copied, "dataset", config=config, inputs=manifest.inputs)
        expected = "has a manifest that is not a drawn data set's (batch_size"
    lines = Lines()
    cache = build_cache(open_source(copied), teacher, tmp_path / "cache", 64, report=lines)
    assert encoded_rows(cache) == [0, 1, 2, 3, 4]
    assert expected in lines.lines[0]


def test_inspection_counts_the_latents(copied: Path, teacher: LoadedPipeline) -> None:
    (copied / latents_name(0)).unlink()
    figures, _ = inspect_source(open_source(copied))
    assert figures.drawn_by == teacher.sha256
    assert (figures.drawn, figures.not_drawn) == (3, {"without their latents": 2})
