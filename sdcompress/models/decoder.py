"""A small decoder on disk (diffusers' `AutoencoderTiny`), and the VAE that it was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ModelError, UsageError
from sdcompress_engines.files import check_tree
from sdcompress_engines.json_files import read_json_object
from sdcompress_engines.manifest import Manifest, faults, read_manifest, sha256_tree
from sdcompress_engines.paths import expand_user

from sdcompress.checkpoints.folder import load_component
from sdcompress.families.schemas.check import check_config, is_tiny_vae
from sdcompress.families.schemas.tiny_vae import TINY_VAE
from sdcompress.models import nano
from sdcompress.models.locate import DECODER
from sdcompress.support.pipeline import TextToImagePipeline, vae_config

MAKE = "sdcompress distill-decoder MODEL --data DATA -o DIR"
_FACTS = ("latent_channels", "scaling_factor", "latents_mean", "latents_std")


@dataclass(frozen=True)
class SmallDecoder:
    """A small decoder, loaded.

    Attributes:
        network: an `AutoencoderTiny` in eval mode, on the CPU.
        sha256: over its folder. Later results name the decoder by it.
        note: what a user should know about it with this model; may be empty.
    """

    network: Any
    sha256: str
    note: str = ""


def locate_decoder(path: str | Path) -> Path:
    """Returns the folder of a small decoder, after a check of its files.

    Args:
        path: of the folder, or of the training folder that holds it as `decoder/`; or `nano`, the built-in one.

    Raises:
        UsageError: the path does not exist, or is no folder.
        ModelError: it holds no `AutoencoderTiny`, or is not as its manifest says.
    """
    folder = nano.decoder_folder() if str(path) == nano.DECODER_NAME else expand_user(str(path))
    if not folder.is_dir():
        raise UsageError("is no folder" if folder.exists() else "does not exist", where=path, expected=_expected())
    if not (folder / "config.json").is_file() and (folder / DECODER / "config.json").is_file():
        folder = folder / DECODER
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError("holds no small decoder: it has no config.json", where=path, expected=_expected(), hint=MAKE)
    check_tree(folder, ModelError)
    manifest = read_manifest(folder)
    if manifest is not None and manifest.kind != DECODER:
        raise ModelError(f"is an artifact of kind {manifest.kind}", where=folder, expected=_expected(), hint=MAKE)
    if not is_tiny_vae(content := read_json_object(config, ModelError)):
        found = content.get("_class_name", "no class")
        raise ModelError(f"holds no small decoder, but {found!r}", where=config, expected=TINY_VAE, hint=MAKE)
    if manifest is not None and (found := faults(folder, DECODER)):
        raise ModelError(f"is damaged: {found[0]}", where=folder, hint="copy it again, or train it again")
    return folder


def hash_decoder(path: str | Path) -> str:
    """Returns the sha256 of a small decoder's folder.

    Raises:
        UsageError, ModelError: as `locate_decoder`.
    """
    return sha256_tree(locate_decoder(path))


def _expected() -> str:
    return f"a folder that distill-decoder has written, an {TINY_VAE} of diffusers, or nano, the built-in one"


def load_decoder(
    path: str | Path, pipeline: TextToImagePipeline, choose_dtype: Callable[[torch.dtype], torch.dtype]
) -> SmallDecoder:
    """Returns the small decoder of a folder, for the place of a pipeline's VAE.

    Args:
        path: as of `locate_decoder`.
        pipeline: with the VAE that the decoder replaces.
        choose_dtype: the dtype of a stored tensor → that of the parameter.

    Raises:
        UsageError, ModelError: as `locate_decoder`, or it was made for another VAE.
    """
    folder = locate_decoder(path)
    where = folder / "config.json"
    config = check_config("vae", read_json_object(where, ModelError), where)
    manifest = read_manifest(folder)
    network = load_component(folder, "vae", config, choose_dtype)
    note = check_fits(network, manifest, pipeline, folder)
    return SmallDecoder(network, sha256_tree(folder), note)


def check_fits(network: Any, manifest: Manifest | None, pipeline: TextToImagePipeline, where: Path) -> str:
    """Refuse a small decoder of other latents than a pipeline's UNet makes.

    Returns a note where the latents are the same and the VAE has other weights, else "".

    Args:
        network: an `AutoencoderTiny`.
        manifest: of its folder; a decoder from elsewhere has none, and then only its shape can be checked.
        pipeline: with the VAE that it replaces.
        where: its folder, for the message.

    Raises:
        ModelError: they do not fit; the message names the difference.
    """
    check_has_vae(pipeline, where)
    known = manifest.config.get("vae") if manifest else None
    made_for = known or {"latent_channels": network.config.latent_channels}
    own = describe_vae(pipeline.vae)
    levels = (len(network.config.block_out_channels), len(pipeline.vae.config.block_out_channels))
    shared = [name for name in _FACTS if name in made_for]
    differing = {name: (made_for[name], own[name]) for name in shared if made_for[name] != own[name]}
    if levels[0] != levels[1]:
        differing["levels"] = levels
    if differing:
        raise ModelError(
            f"is for another VAE ({'; '.join(f'{name} {_show(found)}' for name, (found, _) in differing.items())})",
            where=where,
            expected=", ".join(f"{name} {_show(wanted)}" for name, (_, wanted) in differing.items()),
            hint=MAKE,
        )
    if made_for.get("sha256") not in (None, own["sha256"]):
        return f"the decoder in {where} was made for a VAE with other weights: its colors and details may be off"
    return ""


def check_has_vae(pipeline: TextToImagePipeline, where: str | Path) -> None:
    """Refuse a pipeline with a small decoder where its VAE itself is needed.

    Args:
        pipeline: in torch.
        where: the pipeline, or the decoder that should replace its VAE, for the message.

    Raises:
        ModelError: it has one.
    """
    if is_tiny_vae(vae_config(pipeline.vae)):
        raise ModelError(
            f"the model has a small decoder already ({TINY_VAE}) in the place of its VAE",
            where=where,
            expected="a model with its own VAE",
        )


def _show(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def describe_vae(vae: Any) -> dict[str, Any]:
    """Returns what a decoder must share with the VAE that it is made for: its latents, and a hash of its decoder.

    Args:
        vae: an `AutoencoderKL`.
    """
    mean_and_std = ((name, vae.config.get(name)) for name in ("latents_mean", "latents_std"))
    return {
        "latent_channels": vae.config.latent_channels,
        "scaling_factor": float(vae.config.scaling_factor),
        **{name: None if value is None else [float(each) for each in value] for name, value in mean_and_std},
        "sha256": hash_decoder_weights(vae),
    }


def hash_decoder_weights(vae: Any) -> str:
    """Returns the sha256 of a VAE's decoder in half precision, so that a copy saved in fp16 has the same one.

    Args:
        vae: an `AutoencoderKL`.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(vae.state_dict().items()):
        if name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            half = weight.detach().to("cpu", torch.float16).contiguous().flatten()
            digest.update(half.view(torch.uint8).numpy().data)
    return digest.hexdigest()
