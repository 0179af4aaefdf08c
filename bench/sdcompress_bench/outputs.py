"""What a model answers, run one way: noise predictions and pictures, written by a process of its own and compared
elsewhere.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from . import fidelity

PREDICTION, PROBE = "prediction.pt", "probe.pt"


def produce(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case: its pictures as PNG, its probe where it makes one, its prediction.

    Returns the parameters of each component and whether the prediction is finite.

    Args:
        case: `path`, `backend`, `artifacts`, `device`, `precision` of the model; `folder` to write to; `captions` and
            `seeds` of the pictures; `probe`, a file to answer; or `make_probe`, how many pictures to make one of, with
            `timesteps` and `random`.
    """
    from sdcompress.sampling import generate

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    folder = Path(case["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = fidelity.load(case["path"], case["backend"], case["artifacts"], case["device"], case["precision"])
    images: list[Image.Image] = []
    if case["captions"]:
        options = {
            "steps": case["steps"],
            "guidance_scale": case["guidance_scale"],
            "size_px": case["size_px"],
            "batch_size": case["batch"],
        }
        images = generate(pipeline, case["captions"], seeds=case["seeds"], **options)
        for number, image in enumerate(images):
            image.save(folder / f"{number:04}.png")
    found: dict[str, Any] = {
        "parameters": {
            name: _count(getattr(pipeline, name, None)) for name in ("unet", "text_encoder", "text_encoder_2", "vae")
        },
        "finite": True,
    }
    probe = None
    if case["make_probe"]:
        count, timesteps, seed = case["make_probe"], case["timesteps"], case["seed"]
        captions = case["probe_captions"][:count]
        if images and not case["random"]:
            probe = fidelity.make_probe(pipeline, images[:count], captions[: len(images)], timesteps, seed)
        else:
            probe = fidelity.make_random_probe(pipeline, case["size_px"], captions, timesteps, seed)
        torch.save(asdict(probe), folder / PROBE)
    elif case["probe"] and _takes(pipeline, probe := read_probe(Path(case["probe"]))) is False:
        return found | {"unlike": "its UNet takes other inputs than the teacher's"}
    if probe is not None:
        prediction = fidelity.predict(pipeline, probe)
        found["finite"] = bool(torch.isfinite(prediction).all())
        torch.save(prediction, folder / PREDICTION)
    return found


def feel(case: dict[str, Any]) -> dict[str, Any]:
    """How small a fault a gate can see in the model of a case: `faults.Sensitivity` as plain values.

    Args:
        case: `path`, `device`, `probe`; for each of its timesteps the gate's limit in `limits` and what the gated way
            is off by in `floors`; `count` of places, `seed`.
    """
    from .faults import sensitivity

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    pipeline = fidelity.load(case["path"], "torch", None, case["device"], "fp32")
    return asdict(
        sensitivity(
            pipeline, read_probe(Path(case["probe"])), case["limits"], case["floors"], case["count"], case["seed"]
        )
    )


def read_probe(path: Path) -> fidelity.Probe:
    return fidelity.Probe(**torch.load(path, weights_only=True))


def read_pictures(folder: Path, count: int | None = None) -> list[Image.Image]:
    """The pictures of a case, RGB, in the order of its captions."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))[:count]]


def count_pictures(folder: Path) -> int:
    return len(list(folder.glob("*.png")))


def read_prediction(folder: Path) -> torch.Tensor:
    prediction: torch.Tensor = torch.load(folder / PREDICTION, weights_only=True)
    return prediction


def _takes(pipeline: Any, probe: fidelity.Probe) -> bool:
    """Whether the UNet answers the teacher's inputs: equal latent channels, text width and added inputs."""
    config = pipeline.unet.config
    added = config.addition_embed_type == "text_time"
    return bool(
        config.in_channels == probe.latents.shape[2]
        and config.cross_attention_dim == probe.encoder_hidden_states.shape[-1]
        and added == (probe.text_embeds is not None)
    )


def _count(component: Any) -> int:
    return (
        sum(parameter.numel() for parameter in component.parameters()) if isinstance(component, torch.nn.Module) else 0
    )
