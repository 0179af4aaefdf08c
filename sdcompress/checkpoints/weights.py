"""The tensors of a single-file checkpoint by LDM key; opening a file runs no code from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ModelError, shorten
from sdcompress_engines.json_files import parse_json

from sdcompress.checkpoints.ldm_keys import METADATA_KEY, UNET, VAE
from sdcompress.checkpoints.tensor_files import is_dense, one_error, open_safetensors, read_pickle

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
}

_CONFIG_NAME = re.compile(r"(model_index\.json|[a-z0-9_]+/[A-Za-z0-9_]+\.(json|txt))")
_REQUIRED_CONFIGS = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")

_MOST_NESTED = 4  # a pickle may contain itself

_EMA = "model_ema.diffusion_model"
# The keys of an EMA copy are written without dots; this matches the parts between the dots.
_EMA_PART = re.compile(
    r"(input_blocks|output_blocks)(\d+)(\d)|(label_emb)(\d)(\d)"
    r"|(middle_block|time_embed|in_layers|out_layers|emb_layers|transformer_blocks|to_out|net|out)(\d+)"
    r"|(skip_connection|attn[12]|norm[123]?|proj_in|proj_out|proj|to_[qkv]|ff|conv|op|weight|bias)"
)


@dataclass(frozen=True)
class Weights:
    """An open weight file: the content of its header, and a function that reads its tensors.

    Attributes:
        path: the file.
        shapes: key → shape, of all tensors. Keys are in the LDM layout, whichever dialect of it the file uses.
        dtypes: key → dtype, in torch's names (`float16`).
        metadata: of a safetensors file; empty for pickles.
        read: key → the tensor, in the file's dtype, on the CPU.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str] = field(repr=False)
    read: Callable[[str], torch.Tensor] = field(repr=False)

    @cached_property
    def configs(self) -> dict[str, Any] | None:
        """Relative path → content of the configs that `write_ldm` put into the file, or None where it has none.

        The content of a JSON file is decoded; other files are text.

        Raises:
            ModelError: the configs are broken.
        """
        if METADATA_KEY not in self.metadata:
            return None
        try:
            content = parse_json(self.metadata[METADATA_KEY], self.path, ModelError)
            files = {
                str(name): parse_json(text, f"{self.path}/{name}", ModelError) if name.endswith(".json") else str(text)
                for name, text in content.items()
            }
        except (TypeError, AttributeError) as error:
            raise ModelError(f"carries broken configs ({shorten(error, 120)})", where=self.path) from error
        unsafe = [name for name in files if not _CONFIG_NAME.fullmatch(name)]
        missing = [name for name in _REQUIRED_CONFIGS if not isinstance(files.get(name), dict)]
        if unsafe or missing:
            fault = f"the name {unsafe[0]!r}" if unsafe else f"no {missing[0]}"
            raise ModelError(f"carries broken configs ({fault})", where=self.path)
        return files


def open_weights(path: Path, *, ldm: bool = True) -> Weights:
    """Open a weight file.

    Of a `.safetensors` file only the header is read. A pickle is read whole, and only tensors are accepted
    (`weights_only`).

    Args:
        path: of the file.
        ldm: map the keys to the LDM layout; else they stay as they are.

    Raises:
        ModelError: the kind of file is not supported, the file is broken or cut, or a pickle contains code.
    """
    map_keys = _map_to_ldm if ldm else _keep
    if path.suffix == ".safetensors":
        return _open_safetensors(path, map_keys)
    if path.suffix in PICKLE_SUFFIXES:
        return _open_pickle(path, map_keys)
    raise ModelError(
        "is a folder" if path.is_dir() else f"is a {path.suffix} file" if path.suffix else "has no suffix",
        where=path,
        expected=f"a file that ends in .safetensors, {' or '.join(PICKLE_SUFFIXES[:2])}",
    )


_MapKeys = Callable[[Iterable[str]], dict[str, str]]


def _open_safetensors(path: Path, map_keys: _MapKeys) -> Weights:
    file = open_safetensors(path)
    names = map_keys(file.keys())
    views = {key: file.get_slice(name) for key, name in names.items()}
    shapes = {key: tuple(view.get_shape()) for key, view in views.items()}

    def read(key: str) -> torch.Tensor:
        with one_error(path, "safetensors file"):
            tensor: torch.Tensor = file.get_tensor(names[key])
            return tensor

    return Weights(
        path,
        shapes,
        {key: _DTYPES.get(view.get_dtype(), view.get_dtype()) for key, view in views.items()},
        file.metadata() or {},
        read,
    )


def _open_pickle(path: Path, map_keys: _MapKeys) -> Weights:
    tensors = _collect_tensors(read_pickle(path), path, map_keys)
    if not tensors:
        raise ModelError("holds no tensors", where=path, expected="the weights of a model by their names")
    return Weights(
        path,
        {key: tuple(value.shape) for key, value in tensors.items()},
        {key: str(value.dtype).removeprefix("torch.") for key, value in tensors.items()},
        {},
        tensors.__getitem__,
    )


def _collect_tensors(content: object, path: Path, map_keys: _MapKeys) -> dict[str, torch.Tensor]:
    """Returns key → tensor of an unpickled checkpoint, which may nest its weights under `state_dict`."""
    state = content
    for _ in range(_MOST_NESTED):
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
    if not isinstance(state, dict):
        return {}
    stored = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if sparse := next((key for key, value in stored.items() if not is_dense(value)), None):
        raise ModelError(f"does not hold all numbers of {shorten(sparse, 120)}", where=path, expected="dense tensors")
    return {key: stored[name] for key, name in map_keys(stored).items()}


def _keep(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def _map_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """Returns key in the LDM layout → key in the file.

    A training checkpoint holds the model and an EMA copy of it. As in A1111, ComfyUI and diffusers, the model is taken,
    and the copy only where the file holds no model.
    """
    names = list(names)
    ema_alone = not any(name.startswith(UNET) for name in names)
    mapped = {}
    for name in names:
        key = name
        if name.startswith("vae."):
            key = VAE + name.removeprefix("vae.")
        elif ema_alone and name.startswith(_EMA):
            key = UNET + ".".join(
                part
                for match in _EMA_PART.finditer(name.removeprefix(_EMA))
                for part in match.groups()
                if part is not None
            )
        mapped[key] = name
    return mapped
