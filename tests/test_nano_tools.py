"""The programs that make nano: batches, augmentation, near copies, and what the judge's pictures lose."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw

from sdcompress.models.load import load_pipeline

TOOLS = Path(__file__).parents[1] / "tools/nano"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that imports a module of tools/nano."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def load_module(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load_module


def picture(color: str, shape: str = "ellipse") -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    getattr(ImageDraw.Draw(image), shape)((30, 20, 90, 100), fill=color)
    return image


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_an_epoch_has_each_picture_once(load: Any) -> None:
    batches = [load("common").batch_indices(step, 6, 24, seed=3) for step in range(4)]
    assert sorted(torch.cat(batches).tolist()) == list(range(24))
    assert not torch.equal(batches[0], load("common").batch_indices(4, 6, 24, seed=3))


@pytest.mark.parametrize("turned", [False, True])
def test_augmentation_moves_a_picture_and_keeps_it_on_white(load: Any, turned: bool) -> None:
    pixels = torch.ones(4, 3, 128, 128)
    pixels[:, :, 50:80, 40:90] = -1
    moved = load("common").augment(pixels, generator(), strength=1.0, turned=turned)
    assert moved[:, :, 0, 0].min() > 0.9
    assert not torch.allclose(moved, pixels, atol=0.1)
    assert (moved - pixels).abs().mean() < 0.15


def test_a_copy_is_found_wherever_it_lies_and_another_picture_is_not(load: Any) -> None:
    is_near_copy = load("near_copies").is_near_copy
    ours = picture("red")
    assert is_near_copy(ours, [picture("blue"), ImageChops.offset(ours, 4, -4)])
    assert not is_near_copy(ours, [picture("blue"), picture("red", "rectangle")])
    assert not is_near_copy(ours, [])


def test_more_pictures_are_neither_known_nor_held_out_nor_nearly_held_out(load: Any) -> None:
    def split(**pictures: Image.Image) -> Any:
        pixels = [
            torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(128, 128, 3) for p in pictures.values()
        ]
        return load("common").Split(torch.stack(pixels).permute(0, 3, 1, 2), list(pictures), [{} for _ in pictures])

    heldout = split(disc=picture("red"))
    known = split(square=picture("red", "rectangle"))
    near, new = ImageChops.offset(picture("red"), 4, 0), picture("blue", "rectangle")
    more = split(disc=picture("green"), square=picture("red", "rectangle"), near=near, new=new)
    assert load("train_unet").select_more(more, known, heldout).captions == ["new"]


def test_a_training_is_as_far_as_its_steps_or_its_minutes_whichever_is_further(load: Any, tmp_path: Path) -> None:
    progress = load("common").Progress(tmp_path, "part", minutes=1)
    progress.started -= 15
    assert progress.share(1, 10) == pytest.approx(0.25, abs=0.05)
    assert progress.share(5, 10) == 0.5
    progress.started -= 60
    assert progress.share(5, 10) == 1


def test_the_decoder_alone_learns_from_latents_with_noise(load: Any) -> None:
    train_vae, cfg = load("train_vae"), load("common").config("vae")
    assert cfg["latent_noise"] == 0 < cfg["decoder"]["latent_noise"]
    vae = train_vae.build(cfg)
    pixels, noise = torch.rand(2, 3, 32, 32, generator=generator()), torch.randn(2, 4, 4, 4, generator=generator())
    plain, noisy = (train_vae.reconstruction_loss(vae, cfg | {"latent_noise": n}, pixels, noise)[0] for n in (0.0, 3.0))
    assert not torch.isclose(plain, noisy, rtol=1e-5)


def test_a_style_that_is_held_out_for_a_concept_is_no_wrong_answer(load: Any) -> None:
    seen = torch.tensor([[True, True, False], [True, True, True]])
    parts = SimpleNamespace(concepts=torch.zeros(2, 77), styles=torch.zeros(3, 77), seen=seen)
    classifiers = load("train_clip").Classifiers(4, parts)
    torch.nn.init.zeros_(classifiers.style.weight)
    features, style_of = torch.randn(1, 4, generator=generator()), torch.tensor([0])

    def loss(concept: int, lost: int) -> float:
        return classifiers.loss(features, torch.tensor([concept]), style_of, torch.tensor([lost])).item()

    before = [loss(0, 0), loss(1, 0)]
    with torch.no_grad():
        classifiers.style.bias[2] += 10
    assert loss(0, 0) == pytest.approx(before[0])
    assert loss(1, 0) > before[1] + 1


def test_a_picture_redrawn_by_the_vae_is_near_the_picture(load: Any, tmp_path: Path) -> None:
    pipeline = load_pipeline("nano").pipeline
    torch.save(pipeline.vae.state_dict(), tmp_path / "vae.pt")
    images = load("common").load("heldout", count=4).images
    again = load("train_clip").redraw(images, tmp_path / "vae.pt", "cpu")
    assert again.dtype == torch.uint8
    assert again.shape == images.shape
    error = (again.float() - images.float()).abs().mean()
    assert 0.1 < error < 10


def test_what_has_lost_its_style_is_black_and_white_and_shows_the_outline(load: Any) -> None:
    pixels = torch.ones(2, 3, 128, 128)
    pixels[:, 0, 40:90, 40:90], pixels[:, 1:, 40:90, 40:90] = 1.0, -0.8
    bare = load("stripped").strip_style(pixels, generator())
    assert torch.equal(bare[:, 0], bare[:, 1])
    assert bare[:, :, 40, 60].max() < 0
    assert bare[:, :, 10, 10].min() == 1


def test_what_has_lost_its_concept_is_made_of_pictures_of_the_same_style(load: Any) -> None:
    style_of = torch.tensor([0, 0, 1, 1])
    pixels = torch.stack([torch.full((3, 128, 128), value) for value in (0.1, 0.2, 0.8, 0.9)])
    mixed = load("stripped").strip_concept(pixels, style_of, generator())
    assert set(mixed[:2].unique().tolist()) <= set(pixels[:2].unique().tolist())
    assert set(mixed[2:].unique().tolist()) <= set(pixels[2:].unique().tolist())


def test_pictures_that_lost_something_are_as_many_as_asked(load: Any) -> None:
    pixels, style_of = torch.ones(4000, 3, 16, 16), torch.zeros(4000, dtype=torch.long)
    stripped, lost = load("stripped").strip(pixels, style_of, (0.3, 0.2), generator())
    assert [round((lost == kind).float().mean().item(), 1) for kind in (0, 1, 2)] == [0.5, 0.3, 0.2]
    assert stripped.shape == pixels.shape


def test_one_picture_of_every_batch_stays_whole(load: Any) -> None:
    pixels, style_of = torch.ones(1, 3, 16, 16), torch.zeros(1, dtype=torch.long)
    for seed in range(30):
        lost = load("stripped").strip(pixels, style_of, (0.5, 0.5), torch.Generator().manual_seed(seed))[1]
        assert lost.tolist() == [0]


def test_the_nearest_training_picture_is_found_mirrored_and_shifted(load: Any) -> None:
    copies = load("copies")
    training = torch.rand(5, 3, 32, 32, generator=generator())
    training[3] = 1.0
    training[3, :, 5:20, 8:12] = 0.0
    asked = training[3:4].flip(-1).roll(1, -2)
    distance, index = copies.find_nearest(asked, training)
    assert index.item() == 3
    assert distance.item() < 0.01


def test_models_of_the_hero_may_follow_the_options(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pictures = load("pictures")
    drawn: list[str] = []

    def draw(models: list[str], seed: int) -> Image.Image:
        drawn.extend(models)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(pictures, "draw_hero", draw)
    monkeypatch.setattr("sys.argv", ["pictures.py", "hero", "-o", str(tmp_path / "hero.webp"), "nano-tiny", "student"])
    pictures.main()
    assert drawn == ["nano", "nano-tiny", "student"]
    assert (tmp_path / "hero.webp").is_file()
