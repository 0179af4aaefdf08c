"""The small decoder: what is learned, what is saved, where it takes the place of a VAE, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from sdcompress_engines.errors import BackendMissing, DataError, ModelError, UsageError
from sdcompress_engines.manifest import read_manifest

from sdcompress.backends.assemble import open_pipeline
from sdcompress.checkpoints.taesd import taesd_names
from sdcompress.checkpoints.write import export_ldm
from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.sources import open_source
from sdcompress.export.export_model import ExportRequest, export_model
from sdcompress.models.describe import describe_model
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.sampling import encode_pictures, generate
from sdcompress.support import package_weights
from sdcompress.support.lpips import LpipsNetwork
from sdcompress.support.pipeline import latent_scale
from sdcompress.train.batches import Batches
from sdcompress.train.config import DecoderConfig, TrainConfig
from sdcompress.train.decoder import build_decoder, check_lpips, count_decoder, distill_decoder
from sdcompress.train.latent_batches import LatentBatches
from sdcompress.train.objectives.decoder_distillation import DecoderDistillation, TeacherDecoder
from sdcompress.train.pipelines import make_batches
from sdcompress.train.recipes import load_config

SHORT = DecoderConfig(
    steps=6,
    batch_size=4,
    learning_rate=2e-3,
    precision="fp32",
    checkpoint_every=2,
    log_every=1,
    sample_every=3,
    ema_decay=0.9,
    width=8,
    blocks=(1, 1, 0, 0),
    lpips_net="alex",
)
SD_DECODER_PARAMETERS = 49_490_179 + 20  # with the convolution of the latents before it
PROMPT = "a flat icon of a cat"


@pytest.fixture(scope="module")
def teacher() -> LoadedPipeline:
    return load_pipeline("nano")


@pytest.fixture(scope="module")
def cache(teacher: LoadedPipeline, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return build_cache(open_source(pictures), teacher, tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def finished(teacher: LoadedPipeline, cache: LatentCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    distill_decoder(teacher, cache, SHORT, output)
    return output


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def draw(pipeline: Any) -> torch.Tensor:
    """A latent of noise, decoded as the pipeline does it after its last step; pixels from 0 to 1."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    return (pixels / 2 + 0.5).clamp(0, 1)


def test_each_loss_is_logged_apart_and_all_fall(finished: Path) -> None:
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        parts = line["pixel_loss"] + 0.5 * line["lpips_loss"] + line["encoder_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)
    for name in ("pixel_loss", "encoder_loss"):
        assert lines[-1][name] < lines[0][name]
    assert (finished / "samples/step-000003.webp").is_file()


def test_diffusers_loads_it_without_a_warning_and_every_weight_was_trained(finished: Path) -> None:
    network = AutoencoderTiny.from_pretrained(finished / "decoder")  # warnings are errors
    torch.manual_seed(SHORT.seed)
    untrained = build_decoder(SHORT, 4).state_dict()
    trained = network.state_dict()
    assert trained.keys() == untrained.keys()
    assert not [name for name in trained if torch.equal(trained[name], untrained[name])]


def test_a_stopped_run_resumes_to_the_same_weights(
    teacher: LoadedPipeline,
    cache: LatentCache,
    finished: Path,
    tmp_path: Path,
    stop_at_call: Callable[[type, int], None],
) -> None:
    stop_at_call(DecoderDistillation, 6)
    with pytest.raises(KeyboardInterrupt):
        distill_decoder(teacher, cache, SHORT, tmp_path / "run")
    assert not (tmp_path / "run/decoder").exists()
    result = distill_decoder(teacher, cache, SHORT, tmp_path / "run", resume=True)
    assert result.resumed_from == 4
    file = "decoder/diffusion_pytorch_model.safetensors"
    whole, resumed = (load_file(path / file) for path in (finished, tmp_path / "run"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_teacher_decodes_the_latents_that_its_own_pipeline_would(
    teacher: LoadedPipeline, cache: LatentCache
) -> None:
    pipeline: Any = teacher.pipeline
    batches = LatentBatches(cache, SHORT, *latent_scale(pipeline.vae.config, pipeline.components))
    latents = batches.make_batch(range(4)).latents
    with torch.no_grad():
        expected = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    pictures = TeacherDecoder(pipeline.vae, torch.float32, *latent_scale(pipeline.vae.config, pipeline.components))(
        latents
    )
    assert torch.allclose(pictures, expected, atol=1e-5)
    parts = torch.cat([batches.make_batch(range(2)).latents, batches.make_batch(range(2, 4)).latents])
    assert torch.equal(parts, latents)


def test_latents_with_a_mean_and_a_spread_of_each_channel_are_decoded_from_what_the_unet_makes(
    teacher: LoadedPipeline, cache: LatentCache
) -> None:
    factor, mean = torch.tensor([0.5, 1.0, 2.0, 4.0]).view(4, 1, 1), torch.tensor([1.0, -1.0, 0.5, 0.0]).view(4, 1, 1)
    plain = LatentBatches(cache, SHORT, 1.0, 0.0).make_batch(range(2)).latents
    scaled = LatentBatches(cache, SHORT, factor, mean).make_batch(range(2)).latents
    assert torch.allclose(scaled, (plain - mean) * factor)
    vae: Any = teacher.pipeline.vae
    with torch.no_grad():
        expected = vae.decode(plain).sample.clamp(-1, 1)
    assert torch.allclose(TeacherDecoder(vae, torch.float32, factor, mean)(scaled), expected, atol=1e-4)


def test_latents_are_scaled_as_for_the_unets_training(teacher: LoadedPipeline, cache: LatentCache) -> None:
    noisy = make_batches(teacher.pipeline, cache, TrainConfig(batch_size=4))
    assert isinstance(noisy, Batches)
    assert (noisy.scaling_factor, noisy.latents_mean) == latent_scale(
        teacher.pipeline.vae.config, teacher.pipeline.components
    )


def test_files_for_comfyui_and_the_webuis_are_written_for_the_shape_that_they_build_and_its_size_is_small(
    teacher: LoadedPipeline, cache: LatentCache, finished: Path, tmp_path: Path
) -> None:
    config = SHORT.model_copy(
        update={
            "steps": 1,
            "batch_size": 1,
            "width": 64,
            "blocks": (3, 3, 3, 1),
            "lpips_weight": 0.0,
            "sample_every": 0,
        }
    )
    distill_decoder(teacher, cache, config, tmp_path / "run")
    stems = {path.stem for path in (tmp_path / "run/decoder").glob("taesd*")}
    assert stems == set(taesd_names(is_xl=False).values()) == {"taesd_decoder", "taesd_encoder"}
    assert not list((finished / "decoder").glob("taesd*"))
    manifest = read_manifest(tmp_path / "run/decoder")
    assert manifest is not None
    assert {"taesd_decoder.pth", "taesd_decoder.safetensors"} <= manifest.files.keys()
    assert count_decoder(build_decoder(config, 4)) <= 0.03 * SD_DECODER_PARAMETERS


def test_it_takes_the_place_of_the_vae_and_stays_there_when_saved(finished: Path, tmp_path: Path) -> None:
    small = load_pipeline("nano", decoder=finished)  # the training folder leads to decoder/
    network = AutoencoderTiny.from_pretrained(finished / "decoder").eval()
    assert torch.equal(draw(small.pipeline), draw(type("Pipeline", (), {"vae": network})))
    assert not torch.allclose(draw(small.pipeline), draw(load_pipeline("nano").pipeline), atol=0.05)
    small.pipeline.save_pretrained(tmp_path / "saved")
    saved = load_pipeline(tmp_path / "saved")
    assert torch.equal(draw(saved.pipeline), draw(small.pipeline))
    assert small.sha256 == load_pipeline("nano").sha256
    assert small.inputs.keys() == {"pipeline", "decoder"}
    assert small.note == ""


def test_a_student_saved_in_half_precision_has_the_same_vae(finished: Path, tmp_path: Path) -> None:
    pipeline: Any = load_pipeline("nano-tiny").pipeline
    pipeline.vae.half()
    pipeline.save_pretrained(tmp_path / "half")
    assert load_pipeline(tmp_path / "half", decoder=finished).note == ""
    with torch.no_grad():
        pipeline.vae.float().decoder.conv_out.weight.mul_(1.5)
    pipeline.save_pretrained(tmp_path / "other")
    assert "other weights" in load_pipeline(tmp_path / "other", decoder=finished).note


def test_its_encoder_encodes_where_a_picture_is_given(finished: Path) -> None:
    pipeline: Any = load_pipeline("nano", decoder=finished).pipeline
    pixels = torch.rand(1, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        assert torch.equal(encode_pictures(pipeline.vae, pixels), pipeline.vae.encoder(pixels))
        own = load_pipeline("nano").pipeline
        expected = own.vae.encode(pixels).latent_dist.mode() * own.vae.config.scaling_factor
        assert torch.equal(encode_pictures(own.vae, pixels), expected)


def test_graphs_of_it_draw_and_encode_what_torch_does(finished: Path, tmp_path: Path) -> None:
    request = ExportRequest(components=("vae_decoder", "vae_encoder"), decoder=finished / "decoder")
    result = export_model("nano", tmp_path / "graphs", request)
    for parity in result.graphs.parity.values():
        assert parity is not None
        assert parity.relative_l2 < 1e-4
    assert result.graphs.manifest.inputs.keys() == {"pipeline", "decoder"}
    from sdcompress_engines.runners import open_runner
    from sdcompress_engines.vae import EngineVaeDecoder

    config = json.loads((tmp_path / "graphs/pipeline/vae/config.json").read_text())
    runners = [open_runner(tmp_path / f"graphs/{name}.onnx", device="cpu") for name in request.components]
    vae = EngineVaeDecoder(runners[0], config, encoder=runners[1])
    network = AutoencoderTiny.from_pretrained(finished / "decoder").eval()
    pixels = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        expected = network.encode(pixels).latents
        assert torch.allclose(encode_pictures(vae, pixels), expected, atol=1e-4)
        sampled = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0))  # type: ignore[union-attr]
        assert torch.allclose(sampled, expected, atol=1e-4)
    vae.close()


@pytest.mark.slow
def test_a_pipeline_on_onnx_runtime_draws_with_it(finished: Path) -> None:
    pictures = [
        generate(open_pipeline("nano", backend, decoder=finished), [PROMPT], seeds=[1], steps=1, guidance_scale=1.0)[0]
        for backend in ("torch", "onnxruntime")
    ]
    torch_pixels, ort_pixels = (torch.tensor(np.asarray(picture), dtype=torch.float32) for picture in pictures)
    assert (torch_pixels - ort_pixels).abs().mean() < 1


def broken_decoder(fault: str, folder: Path) -> Path:
    """Change a copy of a decoder; returns its folder."""
    if fault == "no manifest, other levels":
        (folder / "sdcompress.json").unlink()
        config = SHORT.model_copy(update={"blocks": (1, 1, 0)})
        build_decoder(config, 4).save_pretrained(folder)
    elif fault == "no manifest, other channels":
        (folder / "sdcompress.json").unlink()
        build_decoder(SHORT, 16).save_pretrained(folder)
    elif fault == "cut":
        file = folder / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
    elif fault == "no config":
        (folder / "config.json").unlink()
    elif fault == "another class":
        (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    elif fault == "several widths":
        (folder / "sdcompress.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"decoder_block_out_channels": [8, 8, 8, 9]}))
    return folder


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no manifest, other levels", "another VAE .levels 3.; expected levels 4"),
        ("no manifest, other channels", "another VAE .latent_channels 16.; expected latent_channels 4"),
        ("cut", "is damaged"),
        ("no config", "no config.json"),
        ("another class", "holds no small decoder, but 'AutoencoderKL'"),
        ("several widths", "decoder_block_out_channels has several widths"),
    ],
)
def test_a_folder_that_is_no_fitting_decoder_is_refused_in_one_line(
    fault: str, message: str, finished: Path, tmp_path: Path
) -> None:
    folder = broken_decoder(fault, Path(shutil.copytree(finished / "decoder", tmp_path / "decoder")))
    with pytest.raises(ModelError, match=message) as error:
        load_pipeline("nano", decoder=folder)
    assert "\n" not in str(error.value)


def test_a_decoder_for_latents_of_another_scale_is_refused(finished: Path, random_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"another VAE \(scaling_factor 0.92.*expected scaling_factor 0.18215"):
        load_pipeline(random_folder, decoder=finished)
    with pytest.raises(UsageError, match="does not exist"):
        load_pipeline("nano", decoder=finished / "nothing")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_pipeline("nano", decoder=finished.parent)


def test_what_it_cannot_be_used_for_is_refused_in_one_line(
    finished: Path, pictures: Path, cache: LatentCache, tmp_path: Path
) -> None:
    small = load_pipeline("nano", decoder=finished)
    small.pipeline.save_pretrained(tmp_path / "small")
    saved = load_pipeline(tmp_path / "small")
    with pytest.raises(ModelError, match="small decoder already"):
        load_pipeline(tmp_path / "small", decoder=finished)
    with pytest.raises(ModelError, match="a small decoder in the place of its VAE"):
        export_ldm(saved.pipeline, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="a small decoder in the place of its VAE"):
        export_model(str(tmp_path / "small"), tmp_path / "unet", ExportRequest(host="comfyui"))
    with pytest.raises(UsageError, match="--decoder with --signature webui"):
        export_model("nano", tmp_path / "unet", ExportRequest(host="webui", decoder=finished))
    with pytest.raises(UsageError, match="--decoder with --component unet"):
        export_model("nano", tmp_path / "unet", ExportRequest(components=("unet",), decoder=finished))
    with pytest.raises(ModelError, match="small decoder"):
        build_cache(open_source(pictures), saved, tmp_path / "cache")
    with pytest.raises(ModelError, match="small decoder already"):
        distill_decoder(saved, cache, SHORT, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_a_configuration_that_does_not_fit_is_refused_before_any_work(
    teacher: LoadedPipeline, cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="blocks has 3 entries; expected 4"):
        distill_decoder(teacher, cache, SHORT.model_copy(update={"blocks": (1, 1, 1)}), tmp_path / "run")
    with pytest.raises(UsageError, match="so that nothing would be learned"):
        load_config(DecoderConfig, None, {}, ("pixel_weight=0", "lpips_weight=0"))
    for knob in ("snr_gamma=5", "caption_dropout=0.1", "gradient_checkpointing=true", "validation_prompts=[a]"):
        with pytest.raises(UsageError, match="unknown knob"):
            load_config(DecoderConfig, None, {}, (knob,))
    small = LatentCache(cache.folder, cache.index, cache.views, cache.sha256, cache.teacher_sha256, size_px=16)
    with pytest.raises(DataError, match="at least 31 px, for LPIPS"):
        distill_decoder(teacher, small, SHORT, tmp_path / "run")
    monkeypatch.setattr(package_weights, "find_spec", lambda package: None)
    with pytest.raises(BackendMissing, match=r"sdcompress\[metrics\].*--set lpips_weight=0"):
        check_lpips(SHORT)
    check_lpips(SHORT.model_copy(update={"lpips_weight": 0.0}))
    assert not (tmp_path / "run").exists()


def test_gradients_of_lpips_reach_the_picture_and_lower_it() -> None:
    torch.manual_seed(0)
    lpips = LpipsNetwork("alex")
    reference = torch.rand(1, 3, 64, 64)
    picture = torch.rand(1, 3, 64, 64, requires_grad=True)
    before = lpips(picture, reference)
    before.sum().backward()
    assert picture.grad is not None
    with torch.no_grad():
        after = lpips(picture - 0.02 * picture.grad / picture.grad.abs().max(), reference)
    assert after < before
    assert not list(lpips.parameters())


def test_inspect_describes_it(finished: Path) -> None:
    facts, manifest = describe_model(str(finished / "decoder"))
    assert manifest is not None
    assert (facts["kind"], facts["class"]) == ("decoder", "AutoencoderTiny")
    assert facts["parameters"]["decoder"] == count_decoder(build_decoder(SHORT, 4))
    assert facts["faults"] == []
