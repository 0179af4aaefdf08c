"""A UNet's weights beside its engine, under LDM's names, which the WebUIs' LoRAs and `torch_unet` use."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import torch
from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.ldm_keys import UNET_PREFIX, ldm_unet_keys

PLACES = (
    "pipeline/unet/diffusion_pytorch_model.safetensors",
    "pipeline/unet/diffusion_pytorch_model.fp16.safetensors",
    "student.safetensors",
)
"""Where weights may lie in an engine's folder: a UNet as diffusers writes it, or an LDM file of `export --ldm`."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find_weights(folder: Path) -> Path | None:
    """Returns the file with the UNet's weights, or None."""
    return next((folder / place for place in PLACES if (folder / place).is_file()), None)


def read_unet(path: Path) -> dict[str, torch.Tensor]:
    """Returns LDM name, without its prefix → tensor, on the CPU and in the file's dtype.

    Raises:
        ArtifactError: the file is cut or damaged, or holds no UNet.
    """
    tensors = read_safetensors(path)
    if any(name.startswith(UNET_PREFIX) for name in tensors):
        return {
            name.removeprefix(UNET_PREFIX): value for name, value in tensors.items() if name.startswith(UNET_PREFIX)
        }
    if "input_blocks.0.0.weight" in tensors:
        return tensors
    names = ldm_unet_keys(tensors)
    if None in names.values() or "conv_in.weight" not in tensors:
        unknown = next((key for key, name in names.items() if name is None), "conv_in.weight")
        raise ArtifactError(
            f"holds no weights of a UNet ({unknown})", where=path, expected="a UNet under diffusers' or LDM's names"
        )
    return {names[key] or key: value for key, value in tensors.items()}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns name → float tensor of a safetensors file, on the CPU.

    The file begins with the length of its header in eight bytes. Then come a JSON header and the tensors' bytes.

    Raises:
        ArtifactError: the file is cut or damaged.
    """
    # Our own reader: the plugin needs only torch, numpy and a runtime (tests/plugins/test_bare_environment.py).
    try:
        with path.open("rb") as file:
            # A mapping reads only what is used. Torch wants memory that it could write to, hence ACCESS_COPY.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(content[:8], "little")
        tensors = {}
        for name, entry in json.loads(content[8:start]).items():
            if name == "__metadata__" or entry["dtype"] not in _DTYPES:
                continue
            begin, end = entry["data_offsets"]
            dtype, values = _DTYPES[entry["dtype"]], torch.empty(0)
            if end > begin:
                count = (end - begin) // dtype.itemsize
                values = torch.frombuffer(content, dtype=dtype, count=count, offset=start + begin)
            tensors[name] = values.reshape(entry["shape"])
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"is not a readable safetensors file ({type(error).__name__}: {str(error)[:120]})",
            where=path,
            hint="copy it again",
        ) from error
