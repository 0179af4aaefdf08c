"""The cache holds what the pipeline computes, and a stopped build ends with the same cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import ArtifactError, DataError
from sdcompress_engines.manifest import read_manifest, write_manifest
from sdcompress_engines.progress import Reporter

from sdcompress.data import build_cache as build_cache_module
from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.config import DataConfig
from sdcompress.data.encode import LatentEncoder
from sdcompress.data.sources import open_source
from sdcompress.data.units import UnitEncoder
from sdcompress.data.views import CENTER, bucket_shapes, nearest_bucket, to_view
from sdcompress.models.load import LoadedPipeline, load_pipeline


@pytest.fixture(scope="module")
def teacher(random_folder: Path) -> LoadedPipeline:
    return load_pipeline(random_folder)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Nine pictures of three shapes, and a copy of one of them."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(9):
        size = ((150, 150), (220, 130), (130, 230))[i % 3]
        Image.new("RGB", size, (20 * i, 255 - 20 * i, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture of number {i}")
    shutil.copy(folder / "4.png", folder / "4b.png")
    shutil.copy(folder / "4.txt", folder / "4b.txt")
    return folder


def stored_tensors(cache: LatentCache) -> list[torch.Tensor]:
    samples = [cache.sample(i, view, 0.0) for i in range(len(cache)) for view in range(cache.views)]
    return [t for s in samples for t in (s.mean, s.std, s.text, s.time_ids)]


class Lines(Reporter):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def show_line(self, text: str) -> None:
        self.lines.append(text)


def stop_at(patch: pytest.MonkeyPatch, stop: int) -> list[int]:
    """Stop the next build once before unit `stop`. Returns a list that fills with the encoded units, -1 at the stop."""
    genuine, encoded = UnitEncoder.encode, list[int]()

    def encode(self: UnitEncoder, source: Any, number: int, advance: Any) -> Any:
        if number == stop and -1 not in encoded:
            encoded.append(-1)
            raise KeyboardInterrupt
        encoded.append(number)
        return genuine(self, source, number, advance)

    patch.setattr(UnitEncoder, "encode", encode)
    return encoded


def test_a_sample_is_what_the_vae_gives_for_the_cropped_picture(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path
) -> None:
    cache = build_cache(open_source(mixed), teacher, tmp_path / "cache", 64, config=DataConfig(flip=True))
    vae: Any = teacher.pipeline.vae
    for view, flip in ((0, False), (1, True)):
        expected = to_view(Image.open(mixed / "1.png"), 64, 64, flip=flip)
        with torch.no_grad():
            posterior = vae.encode(expected.pixels[None]).latent_dist
        found = cache.sample(1, view, 0.0)
        assert torch.allclose(found.mean, posterior.mean[0], atol=2e-2, rtol=2e-3)
        assert torch.allclose(found.std, posterior.std[0], rtol=1e-2)
        assert found.time_ids.tolist() == [130, 220, 0, 22, 64, 64]
    assert len(cache) == 9
    manifest = read_manifest(tmp_path / "cache")
    assert manifest is not None
    assert manifest.figures["duplicates"] == 1
    assert manifest.figures["bytes_per_picture"] == round(
        sum(f.stat().st_size for f in (tmp_path / "cache").glob("*.safetensors") if f.name != "empty.safetensors") / 9
    )


@pytest.mark.parametrize("place", [(0.0, 0.0), (0.3, 0.0), CENTER, (1.0, 0.0)])
def test_a_mirrored_crop_names_its_place_in_the_mirrored_picture(place: tuple[float, float]) -> None:
    noise = torch.randint(256, (64, 101, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.numpy())
    view = to_view(picture, 64, 64, place, flip=True)
    left = view.time_ids[3]
    of_mirrored = to_view(ImageOps.mirror(picture).crop((left, 0, left + 64, 64)), 64, 64)
    assert torch.equal(view.pixels, of_mirrored.pixels)


def test_buckets_keep_the_aspect_and_equal_the_area(teacher: LoadedPipeline, mixed: Path, tmp_path: Path) -> None:
    shapes = bucket_shapes(512, 64)
    assert shapes[0] == (512, 512)
    assert {(448, 576), (576, 448), (640, 384)} <= set(shapes)
    assert all(w % 64 == h % 64 == 0 and 0.8 < w * h / 512**2 <= 1 for w, h in shapes)
    assert shapes[nearest_bucket(1920, 1280, shapes)] == (640, 384)
    cache = build_cache(open_source(mixed), teacher, tmp_path / "cache", 64, config=DataConfig(buckets=True))
    found = {tuple(cache.sample(i, 0, 0.0).mean.shape[1:]) for i in range(len(cache))}
    assert len(found) == 3
    assert len(cache.buckets.unique()) == 3


@pytest.mark.parametrize("size_px", [64, 96, 136, 200, 504, 520])
def test_the_sides_of_buckets_are_whole_latents(teacher: LoadedPipeline, size_px: int) -> None:
    latents = LatentEncoder(teacher.pipeline.vae, torch.device("cpu"), "fp32")
    shapes = UnitEncoder(teacher.pipeline, latents, size_px, DataConfig(buckets=True)).shapes
    assert len(shapes) > 1
    assert not [shape for shape in shapes if shape[0] % latents.factor or shape[1] % latents.factor]


def test_a_stopped_build_continues_and_ends_the_same(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcompress.data.folder.UNIT_PICTURES", 3)
    whole = build_cache(open_source(mixed), teacher, tmp_path / "whole", 64)
    encoded = stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
    assert not (tmp_path / "cache").exists()
    again = build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
    assert encoded == [0, 1, -1, 2, 3]
    assert again.sha256 == whole.sha256
    assert all(torch.equal(a, b) for a, b in zip(stored_tensors(again), stored_tensors(whole), strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "mixed", "whole"]


def test_a_second_build_of_a_cache_is_refused_while_the_first_goes_on(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_another(self: UnitEncoder, *args: Any) -> Any:
        with pytest.raises(ArtifactError, match="another process is writing this output"):
            build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
        return encode(self, *args)

    encode = UnitEncoder.encode
    monkeypatch.setattr(UnitEncoder, "encode", start_another)
    assert len(build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "mixed"]


def test_a_cache_of_other_settings_or_cut_short_is_refused_with_the_reason(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path
) -> None:
    build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
    with pytest.raises(DataError, match="flip: False in the cache, True now"):
        LatentCache.open(tmp_path / "cache", config=DataConfig(flip=True))
    unit = tmp_path / "cache/unit-00000.safetensors"
    unit.write_bytes(unit.read_bytes()[:-1])
    with pytest.raises(DataError, match="is not a complete cache"):
        LatentCache.open(tmp_path / "cache")


def test_a_folder_that_is_no_cache_is_not_to_be_deleted(random_folder: Path, mixed: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path, "student")
    for folder, words in ((random_folder, "is no cache"), (tmp_path, "is an artifact of kind student, and no cache")):
        with pytest.raises(DataError, match=words) as refusal:
            LatentCache.open(folder)
        assert refusal.value.hint == "choose another --cache"


def test_a_cache_of_another_teacher_is_kept(teacher: LoadedPipeline, mixed: Path, tmp_path: Path) -> None:
    build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
    with pytest.raises(DataError, match="was made with the teacher") as refusal:
        LatentCache.open(tmp_path / "cache", teacher_sha256="0" * 64)
    assert refusal.value.hint == "choose another --cache; or delete the folder, if nothing else needs it"


def test_a_cache_of_captions_that_were_edited_since_is_refused(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path
) -> None:
    build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
    captions = sorted(mixed.glob("*.txt"))[0]
    captions.write_text(captions.read_text()[::-1])  # of the same size
    with pytest.raises(DataError, match="was made from other data"):
        LatentCache.open(tmp_path / "cache", source=open_source(mixed))


def test_captions_are_drawn_by_their_shares(teacher: LoadedPipeline, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "a.json").write_text('{"short": "red", "long": "a plain red square"}')
    cache = build_cache(
        open_source(folder, DataConfig(captions={"short": 1, "long": 3})), teacher, tmp_path / "cache", 64
    )
    texts = [cache.sample(0, 0, pick).text for pick in (0.0, 0.24, 0.26, 0.99)]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[2], texts[3])
    assert not torch.equal(texts[1], texts[2])


def test_random_crops_are_the_same_every_time(teacher: LoadedPipeline, mixed: Path, tmp_path: Path) -> None:
    config = DataConfig(crop="random", views=3)
    first, second = (build_cache(open_source(mixed), teacher, tmp_path / name, 64, config=config) for name in "ab")
    assert first.views == 3
    assert first.sha256 == second.sha256
    crops = {tuple(first.sample(1, view, 0.0).time_ids.tolist()) for view in range(3)}
    assert len(crops) > 1


def test_too_many_unreadable_pictures_stop_the_build_unless_the_limit_is_higher(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path
) -> None:
    (mixed / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1 of 10 pictures cannot be used: unreadable picture: 1 \(0\.png\)"):
        build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
    config = DataConfig(max_unusable=0.2)
    assert len(build_cache(open_source(mixed, config), teacher, tmp_path / "cache", 64, config=config)) == 8


def test_a_resumed_build_keeps_units_of_another_batch_size(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcompress.data.folder.UNIT_PICTURES", 3)
    whole = build_cache(open_source(mixed), teacher, tmp_path / "whole", 64)
    encoded = stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
    monkeypatch.setattr("sdcompress.data.encode.CPU_BATCH_BYTES", 1)
    again = build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
    assert encoded == [0, 1, -1, 2, 3]
    for a, b in zip(stored_tensors(again), stored_tensors(whole), strict=True):
        assert torch.all((a - b).abs() <= 2e-5 * a.abs().max() + 2**-10 * a.abs())


def test_a_stopped_build_of_another_precision_starts_over_and_is_reported(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcompress.data.folder.UNIT_PICTURES", 3)
    encoded = stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
    lines = Lines()
    cache = build_cache(open_source(mixed), teacher, tmp_path / "cache", 64, precision="bf16", report=lines)
    assert encoded == [0, 1, -1, 0, 1, 2, 3]
    assert lines.lines[0] == "cache: starting over: its 2 units were encoded in fp32, this build encodes in bf16"
    assert cache.precision == "bf16"


@pytest.mark.parametrize("done", [False, True])
def test_a_kill_at_the_last_rename_loses_no_unit(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    replace, left = build_cache_module.replace_folder, tmp_path / "left by a kill"

    def keep(partial: Path, output: Path) -> None:
        if not done:
            shutil.copytree(partial, left)
        replace(partial, output)
        if done:
            shutil.copytree(output, left)

    monkeypatch.setattr(build_cache_module, "replace_folder", keep)
    source, output = open_source(mixed), tmp_path / "cache"
    whole = build_cache(source, teacher, output, 64).sha256
    assert {path.suffix for path in output.iterdir()} == {".safetensors", ".json"}
    assert [path.name for path in output.glob("*.json")] == ["sdcompress.json"]
    shutil.rmtree(output)
    left.rename(output if done else tmp_path / ".cache.partial")
    monkeypatch.undo()
    encoded = stop_at(monkeypatch, 0)
    opened = LatentCache.open(output, source=source) if done else build_cache(source, teacher, output, 64)
    assert opened.sha256 == whole
    assert encoded == []


def test_a_stopped_build_from_before_precision_was_recorded_continues_as_fp32(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcompress.data.folder.UNIT_PICTURES", 3)
    encoded = stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
    marker = tmp_path / ".cache.partial/build.json"
    marker.write_text(json.dumps({k: v for k, v in json.loads(marker.read_text()).items() if k != "precision"}))
    for sidecar in marker.parent.glob("unit-*.json"):
        facts = json.loads(sidecar.read_text())
        sidecar.write_text(json.dumps({k: v for k, v in facts.items() if k not in ("tiled", "tile_px")}))
    assert build_cache(open_source(mixed), teacher, tmp_path / "cache", 64).precision == "fp32"
    assert encoded == [0, 1, -1, 2, 3]


def test_a_cache_from_before_precision_was_recorded_is_fp32(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = build_cache_module.write_manifest

    def write(*args: Any, config: dict[str, Any], **rest: Any) -> None:
        genuine(*args, config={k: v for k, v in config.items() if k not in ("precision", "tile_px")}, **rest)

    monkeypatch.setattr(build_cache_module, "write_manifest", write)  # as the earlier version wrote it
    source = open_source(mixed)
    built = build_cache(source, teacher, tmp_path / "cache", 64)
    manifest = read_manifest(tmp_path / "cache")
    assert manifest is not None
    assert "precision" not in manifest.config
    opened = LatentCache.open(tmp_path / "cache", teacher.sha256, source, 64, DataConfig())
    assert (opened.precision, opened.tile_px) == ("fp32", None)
    assert all(torch.equal(a, b) for a, b in zip(stored_tensors(opened), stored_tensors(built), strict=True))


def test_precision_is_recorded_and_changes_the_content(teacher: LoadedPipeline, mixed: Path, tmp_path: Path) -> None:
    exact, half = (build_cache(open_source(mixed), teacher, tmp_path / p, 64, precision=p) for p in ("fp32", "bf16"))
    assert exact.sha256 != half.sha256
    for name in ("fp32", "bf16"):
        manifest = read_manifest(tmp_path / name)
        assert manifest is not None
        assert manifest.config["precision"] == name
        assert LatentCache.open(tmp_path / name, config=DataConfig()).precision == name
    error = torch.stack([half.sample(i, 0, 0.0).mean - exact.sample(i, 0, 0.0).mean for i in range(len(exact))]).norm()
    assert 0 < error < 0.02 * torch.stack([exact.sample(i, 0, 0.0).mean for i in range(len(exact))]).norm()


def test_tiling_is_recorded(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcompress.data.encode.count_free_bytes", lambda *_: 24 * 2**20)  # stand-in for a small memory
    lines = Lines()
    cache = build_cache(open_source(mixed), teacher, tmp_path / "cache", 512, report=lines)
    manifest = read_manifest(tmp_path / "cache")
    assert manifest is not None
    assert cache.tile_px == manifest.config["tile_px"] == 256
    assert manifest.figures["tiled_views"] == 10
    assert "tiles of 256 px" in lines.lines[0]
    assert cache.sample(0, 0, 0.0).mean.shape == (4, 64, 64)


EDITS: dict[str, Any] = {
    "scalar": lambda tensor: tensor.flatten()[0].clone(),
    "empty": lambda tensor: tensor[:0].clone(),
    "flat": lambda tensor: tensor.repeat(3).clone() if tensor.ndim == 1 else tensor.flatten().clone(),
    "truth": lambda tensor: tensor.bool(),
    "wrong": lambda tensor: (
        torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else torch.full_like(tensor, -(2**20))
    ),
    "missing": lambda tensor: None,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_cache_is_refused_by_its_file(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path, edit: str
) -> None:
    """Each tensor that is read is edited, one at a time, under a manifest that fits."""
    build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
    manifest = read_manifest(tmp_path / "cache")
    assert manifest is not None
    for name in ("index.safetensors", "unit-00000.safetensors", "empty.safetensors"):
        tensors = load_file(tmp_path / "cache" / name)
        for key in [key for key in tensors if not key.startswith(("pictures.", "time_ids", "ids"))]:
            changed = tensors | {key: EDITS[edit](tensors[key])}
            copy = shutil.copytree(tmp_path / "cache", tmp_path / "edited", dirs_exist_ok=True)
            save_file({k: v for k, v in changed.items() if v is not None}, copy / name)
            write_manifest(copy, "cache", config=manifest.config, inputs=manifest.inputs)
            with pytest.raises(DataError, match=name) as refusal:
                draw_all(LatentCache.open(copy))
            assert len(str(refusal.value)) < 600
            shutil.rmtree(copy)


def draw_all(cache: LatentCache) -> None:
    for i in range(len(cache)):
        cache.sample(i, 0, 0.0)
        cache.sample(i, 0, 0.9, drop_caption=True)


@pytest.mark.parametrize("change", [{"views": 0}, {"views": "x"}, {"size_px": None}, {"source": [1]}, {"files": {}}])
def test_a_cache_whose_manifest_records_something_else_is_refused(
    teacher: LoadedPipeline, mixed: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    build_cache(open_source(mixed), teacher, tmp_path / "cache", 64)
    manifest = read_manifest(tmp_path / "cache")
    assert manifest is not None
    write_manifest(tmp_path / "cache", "cache", config=manifest.config | change, inputs=manifest.inputs)
    with pytest.raises(DataError, match=next(iter(change))):
        LatentCache.open(tmp_path / "cache")
