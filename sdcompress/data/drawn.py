"""The latents of a drawn data set: what the teacher's UNet made each picture from, in files beside the pictures.

A file holds the latents of one batch, in the scale of the VAE's decoder and in half precision, with the sha256 of each
picture's file. So the latents of a picture that was edited since are noticed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors.torch import save
from sdcompress_engines.errors import ArtifactError, DataError, shorten
from sdcompress_engines.manifest import MANIFEST_NAME, FileEntry, find_file_fault, read_manifest, sha256_file
from sdcompress_engines.paths import file_inside

from sdcompress.checkpoints.tensor_files import open_safetensors, read_safetensors
from sdcompress.models.decoder import hash_decoder_weights
from sdcompress.support.faults import faults_of

DATASET = "dataset"
"""Kind of the manifest of a drawn data set."""
DRAWN_LOGVAR = torch.finfo(torch.float16).min
"""Log-variance of drawn latents in a cache: the standard deviation that it stands for is exactly 0 in float32."""
CHANGED = "changed since they were drawn"
DAMAGED = "with damaged latents"
MISSING = "without their latents"
NOT_OF_SET = "not of the drawn set"
RESIZED = "of another size than the training's"
_LATENTS, _DIGESTS, _VAE = "latents", "sha256", "vae"
_PATTERN = "latents-*.safetensors"
_OPEN_FILES = 4
"""Files of which a set keeps the content, for the next pictures of the same batch."""


def latents_name(first: int) -> str:
    """Returns the name of the file with the latents of a batch.

    Args:
        first: number of the batch's first picture.
    """
    return f"latents-{first:06d}.safetensors"


def pack_latents(latents: torch.Tensor, pictures: Sequence[bytes], vae: str) -> bytes:
    """Returns the content of a file of latents.

    Args:
        latents: what the VAE's decoder takes, (B, C, H/8, W/8) float16, on the CPU.
        pictures: the files of the same pictures.
        vae: what `hash_vae` returns.
    """
    digests = torch.tensor([list(hashlib.sha256(picture).digest()) for picture in pictures], dtype=torch.uint8)
    # One entry of metadata: of several, safetensors writes the order at random.
    return save({_LATENTS: latents.contiguous(), _DIGESTS: digests}, metadata={_VAE: vae})


def read_vae_hash(path: Path) -> str:
    """Returns what `hash_vae` returned for the VAE of a file of latents.

    Raises:
        ArtifactError: the file is damaged.
    """
    with open_safetensors(path, ArtifactError) as file:
        return (file.metadata() or {}).get(_VAE, "")


def hash_vae(vae: Any) -> str:
    """Returns a sha256 that VAEs with the same latents share; "" for one that is no `AutoencoderKL` in torch.

    It is that of the decoder's weights: they say what the latents mean. The config is left out, because two pipelines
    may scale the same latents differently for their UNets.
    """
    from diffusers import AutoencoderKL

    return hash_decoder_weights(vae) if isinstance(vae, AutoencoderKL) else ""


class _Facts(BaseModel):
    """What the manifest of a drawn set with latents records, as far as it is used here."""

    count: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    picture_format: str
    vae: str
    teacher: str
    pipeline: str | None


class DrawnSet:
    """The latents of a finished data set, read as they are needed. Threads may share it.

    Args:
        folder: of the set.
        facts: of its manifest.
        files: name → hash and size of the set's files.

    Attributes:
        sha256: names the latents of all pictures.
        teacher: sha256 of what drew them.
    """

    def __init__(self, folder: Path, facts: _Facts, files: Mapping[str, FileEntry]) -> None:
        self.folder, self.teacher = folder, facts.teacher
        self._facts, self._files = facts, files
        names = sorted(name for name in files if Path(name).match(_PATTERN))
        self.sha256 = hashlib.sha256("".join(f"{name} {files[name].sha256}\n" for name in names).encode()).hexdigest()
        self._read_batch = functools.lru_cache(_OPEN_FILES)(self._read_file)

    def fits(self, teacher_sha256: str, vae: Any) -> bool:
        """Returns whether these are latents of a teacher: it or its export drew them, or its VAE decodes the same.

        Args:
            teacher_sha256: of the teacher.
            vae: its VAE.
        """
        facts = self._facts
        return teacher_sha256 in (facts.teacher, facts.pipeline) or (facts.vae != "" and facts.vae == hash_vae(vae))

    def read(self, key: str, encoded: bytes) -> torch.Tensor | str:
        """Returns the latents of a picture, unscaled, (C, H/8, W/8) float16, on the CPU; or why there are none.

        Args:
            key: name of the picture's file in the set.
            encoded: the content of that file.
        """
        stem, _, suffix = key.rpartition(".")
        is_number = stem.isascii() and stem.isdigit() and suffix == self._facts.picture_format
        if not is_number or key not in self._files or int(stem) >= self._facts.count:
            return NOT_OF_SET
        first = int(stem) // self._facts.batch_size * self._facts.batch_size
        batch = self._read_batch(first)
        if isinstance(batch, str):
            return batch
        if bytes(batch[_DIGESTS][int(stem) - first].tolist()) != hashlib.sha256(encoded).digest():
            return CHANGED
        return batch[_LATENTS][int(stem) - first]

    def _read_file(self, first: int) -> dict[str, torch.Tensor] | str:
        """Returns the content of the file of a batch, or what is wrong with it."""
        name = latents_name(first)
        try:
            path = file_inside(self.folder, name, source=self.folder / MANIFEST_NAME)
            if name not in self._files or not path.exists():
                return MISSING
            if find_file_fault(path, self._files[name], sha256_file):
                return DAMAGED
            batch = read_safetensors(path, DataError)
        except (ArtifactError, DataError, OSError):
            return DAMAGED
        latents, digests = batch.get(_LATENTS), batch.get(_DIGESTS)
        pictures = min(self._facts.batch_size, self._facts.count - first)
        if latents is None or latents.ndim != 4 or latents.dtype != torch.float16 or len(latents) != pictures:
            return DAMAGED
        if digests is None or digests.shape != (pictures, 32) or digests.dtype != torch.uint8:
            return DAMAGED
        return batch if bool(latents.isfinite().all()) else DAMAGED


def open_drawn(folder: Path) -> DrawnSet | None:
    """Returns the latents of a drawn data set; None for another folder, or a set without latents.

    Raises:
        DataError: the set is not finished, or its manifest cannot be read.
    """
    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        raise DataError(error.what, where=error.where, expected=error.expected) from error
    if manifest is None:
        if any(folder.glob(_PATTERN)):
            raise DataError(
                "is a drawn data set that is not finished", where=folder, hint="the same `data generate` command"
            )
        return None
    if manifest.kind != DATASET or not manifest.config.get(_LATENTS):
        return None
    try:
        facts = _Facts.model_validate(manifest.config | {"pipeline": None} | manifest.inputs)
    except ValidationError as error:
        fault = shorten(faults_of(error, _Facts, "entry"))
        raise DataError(
            f"has a manifest that is not a drawn data set's ({fault})",
            where=folder / MANIFEST_NAME,
            hint="draw the set again",
        ) from error
    return DrawnSet(folder, facts, manifest.files)


def describe_latents(drawn: int, not_drawn: Mapping[str, int]) -> str:
    """Returns in words how many pictures of a drawn set have the teacher's own latents, and why others do not."""
    encoded = [f"{count:,} {reason}" for reason, count in not_drawn.items()]
    return f"{drawn:,} with the teacher's own latents" + (f" (encoded: {'; '.join(encoded)})" if encoded else "")
