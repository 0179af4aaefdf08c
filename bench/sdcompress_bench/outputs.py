"""Writes the outputs of a model in one backend setup, pictures and noise predictions, and reads them again.

Writing runs in a process of its own; the comparison happens elsewhere.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.files import atomic_file
from sdcompress_engines.signature import context_width

from sdcompress.checkpoints.tensor_files import is_dense, read_pickle
from sdcompress.data.records import Record
from sdcompress.support.pictures import save_picture
from sdcompress.support.pipeline import TextToImagePipeline

from . import fidelity

PREDICTION, PROBE = "prediction.pt", "probe.pt"
_AGAIN = "delete the folder, and measure again"


def write_outputs(case: dict[str, Any]) -> dict[str, Any]:
    """Write the pictures of a case as PNG files, its probe if it makes one, and its noise prediction.

    Returns the parameters of each component (`parameters`) and whether the prediction is `finite`, or `unlike` where
    the UNet does not accept the probe.

    Args:
        case: `path`, `backend`, `artifacts`, `device`, `precision`, `decoder`, `loras` of the model; `folder` to write
            to; `captions` and `seeds` of the pictures; `probe`, the file of a probe to predict for; or `make_probe`,
            from how many pictures to make a new probe, with `timesteps` and `random`; `probes_at_once` in a UNet call.
    """
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    folder = Path(case["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    places = (case["artifacts"], case["device"], case["precision"], case["decoder"], case["loras"])
    pipeline = fidelity.load(case["path"], case["backend"], *places)
    images = _draw(pipeline, case)
    for number, image in enumerate(images):
        save_picture(image, folder / f"{number:04}.png")
    parts = ("unet", "text_encoder", "text_encoder_2", "vae")
    found: dict[str, Any] = {
        "parameters": {name: count_weights(getattr(pipeline, name, None)) for name in parts},
        "finite": True,
    }
    probe = None
    if case["make_probe"]:
        probe = _make_probe(pipeline, case, images)
        with atomic_file(folder / PROBE) as partial:
            torch.save(asdict(probe), partial)
    elif case["probe"]:
        probe = read_probe(Path(case["probe"]))
        if not _accepts(pipeline, probe):
            return found | {"unlike": "its UNet takes other inputs than the teacher's"}
    if probe is not None:
        prediction = fidelity.predict(pipeline, probe, case["probes_at_once"])
        found["finite"] = bool(torch.isfinite(prediction).all())
        with atomic_file(folder / PREDICTION) as partial:
            torch.save(prediction, partial)
    return found


def _draw(pipeline: TextToImagePipeline, case: dict[str, Any]) -> list[Image.Image]:
    from sdcompress.sampling import generate

    if not case["captions"]:
        return []
    options = {name: case[name] for name in ("steps", "guidance_scale", "size_px")}
    images: list[Image.Image] = generate(
        pipeline, case["captions"], seeds=case["seeds"], batch_size=case["batch"], **options
    )
    return images


def _make_probe(pipeline: TextToImagePipeline, case: dict[str, Any], images: list[Image.Image]) -> fidelity.Probe:
    """Returns a probe of the pictures, or of Gaussian latents where there are none or the weights are random."""
    count, timesteps, seed = case["make_probe"], case["timesteps"], case["seed"]
    captions = case["probe_captions"][:count]
    if images and not case["random"]:
        return fidelity.make_probe(pipeline, images[:count], captions[: len(images)], timesteps, seed)
    return fidelity.make_random_probe(pipeline, case["size_px"], captions, timesteps, seed)


def measure_sensitivity(case: dict[str, Any]) -> dict[str, Any]:
    """Returns how small a fault a gate detects in the model of a case: `faults.Sensitivity` as plain values.

    Args:
        case: `path`, `loras`, `device`, `probe`; `limits` and `floors`, for each of the probe's timesteps the gate's
            limit and the error of the gated setup without a fault; `count` of places; `seed`.
    """
    from .faults import sensitivity

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    pipeline = fidelity.load(case["path"], "torch", None, case["device"], "fp32", loras=case["loras"])
    probe = read_probe(Path(case["probe"]))
    return asdict(sensitivity(pipeline, probe, case["limits"], case["floors"], case["count"], case["seed"]))


def read_probe(path: Path) -> fidelity.Probe:
    """Returns the probe in a file that `write_outputs` wrote.

    Raises:
        ArtifactError: the file is damaged or something else.
    """
    content = read_pickle(path, ArtifactError, what="probe", hint=_AGAIN)
    try:
        probe = fidelity.Probe(**content)
        whole = len(probe.timesteps) == len(probe.latents) and is_dense(probe.encoder_hidden_states)
    except TypeError:
        whole = False
    if not whole:
        raise ArtifactError("is no probe", where=path, expected="latents, timesteps and embeddings", hint=_AGAIN)
    return probe


def read_pictures(folder: Path, count: int | None = None) -> list[Image.Image]:
    """Returns the pictures of a case, RGB, in the order of its captions; at most `count` where given."""
    return [Record(str(path), path.read_bytes(), "").picture() for path in sorted(folder.glob("*.png"))[:count]]


def count_pictures(folder: Path) -> int:
    return len(list(folder.glob("*.png")))


def read_prediction(folder: Path) -> torch.Tensor:
    """Returns the noise prediction that `write_outputs` wrote: (T, B, C, h, w), float32.

    Raises:
        ArtifactError: the file is damaged or something else.
    """
    path = folder / PREDICTION
    prediction = read_pickle(path, ArtifactError, what="prediction", hint=_AGAIN)
    if not is_dense(prediction) or prediction.ndim != 5 or prediction.dtype != torch.float32:
        raise ArtifactError("is no prediction", where=path, expected="a tensor of five dimensions", hint=_AGAIN)
    return cast("torch.Tensor", prediction)


def _accepts(pipeline: TextToImagePipeline, probe: fidelity.Probe) -> bool:
    """Returns whether the UNet accepts the teacher's inputs: same latent channels, text width and added inputs."""
    config = pipeline.unet.config
    added = config.addition_embed_type == "text_time"
    return bool(
        config.in_channels == probe.latents.shape[2]
        and context_width(config) == probe.encoder_hidden_states.shape[-1]
        and added == (probe.text_embeds is not None)
    )


def count_weights(component: Any) -> int:
    """Returns the number of parameters of a pipeline's component; 0 for one that is no module."""
    if not isinstance(component, torch.nn.Module):
        return 0
    return sum(parameter.numel() for parameter in component.parameters())
