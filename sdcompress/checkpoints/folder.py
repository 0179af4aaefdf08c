"""The weights of a component in a diffusers folder: a file, shards, a variant in half precision, or a pickle."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.errors import ModelError
from sdcompress_engines.json_files import read_json_object
from sdcompress_engines.paths import file_inside

from sdcompress.checkpoints.component import Source, load_parameters
from sdcompress.checkpoints.weights import Weights, open_weights
from sdcompress.families.build import build_module
from sdcompress.families.family import Family

_VARIANTS = ("", ".fp16", ".bf16")
"""In the names of weight files; a variant is taken where the whole file is not there."""
_MOST_SHARDS = 1000

# What older versions of diffusers and transformers wrote, and keys that a component does not use.
_OLD_NAMES = (
    (re.compile(r"^text_model\."), ""),
    (re.compile(r"(attentions\.\d+)\.query\."), r"\1.to_q."),
    (re.compile(r"(attentions\.\d+)\.key\."), r"\1.to_k."),
    (re.compile(r"(attentions\.\d+)\.value\."), r"\1.to_v."),
    (re.compile(r"(attentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
)
_NOT_TAKEN = re.compile(r"(.*\.)?position_ids|(text|visual)_projection\.weight|logit_scale|vision_model\..*")


def find_weight_files(folder: Path) -> list[Path]:
    """Returns the weight files of a component: its one file or its shards; nothing where it has none.

    A safetensors file goes before a pickle, and the whole file before its fp16 or bf16 variant.

    Raises:
        ModelError: an index of shards is broken, or there are shards beside the whole file. ArtifactError: it names a
            file outside the folder.
    """
    for variant in _VARIANTS:
        for name in (
            *(f"{stem}{variant}.safetensors" for stem in ("diffusion_pytorch_model", "model")),
            *(f"{stem}{variant}.bin" for stem in ("diffusion_pytorch_model", "pytorch_model")),
        ):
            stem, _, suffix = name.rpartition(".")
            # `.safetensors.index.fp16.json` is diffusers' name of a variant's index, the other one transformers'.
            indexes = (f"{name}.index.json", f"{stem.removesuffix(variant)}.{suffix}.index{variant}.json")
            index = next((folder / each for each in indexes if (folder / each).exists()), None)
            if (folder / name).exists():
                if index is not None and any(path.exists() for path in _list_shards(folder, index)):
                    raise ModelError(
                        f"has weights twice: {name}, and in the shards of {index.name}",
                        where=folder,
                        expected="one of them: diffusers takes the shards, transformers the whole file",
                        hint="delete or move away those of the earlier save",
                    )
                return [folder / name]
            if index is not None:
                return _read_shards(folder, index)
    return []


def _read_shards(folder: Path, index: Path) -> list[Path]:
    paths = _list_shards(folder, index)
    for path in paths:
        if not path.is_file():
            raise ModelError("is missing", where=path, expected=f"a shard, which {index.name} names")
    return paths


def _list_shards(folder: Path, index: Path) -> list[Path]:
    """Returns the files that an index of shards names, whether they are there or not."""
    names = read_json_object(index, ModelError).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError("holds no weight_map", where=index, expected="tensor → file, of the shards beside it")
    files = sorted({str(name) for name in names.values()})
    if len(files) > _MOST_SHARDS:
        raise ModelError(f"names {len(files):,} files", where=index, expected=f"at most {_MOST_SHARDS}")
    # The files of a hub's cache are links into its own store.
    return [file_inside(folder, name, source=index, links=True) for name in files]


def open_component(folder: Path) -> Weights:
    """Returns the open weights of a component, all shards together.

    Raises:
        ModelError: there are none, or a file is broken.
    """
    files = find_weight_files(folder)
    if not files:
        raise ModelError(
            "has no weights", where=folder, expected="a .safetensors file", hint="copy or download the model again"
        )
    shards = [open_weights(file, ldm=False) for file in files]
    if len(shards) == 1:
        return shards[0]
    owner = {key: shard for shard in shards for key in shard.shapes}
    return Weights(
        folder,
        {key: shard.shapes[key] for key, shard in owner.items()},
        {key: shard.dtypes[key] for key, shard in owner.items()},
        {},
        lambda key: owner[key].read(key),
    )


def load_component(
    folder: Path,
    name: str,
    config: dict[str, Any],
    choose_dtype: Callable[[torch.dtype], torch.dtype],
    family: Family | None = None,
) -> Any:
    """Returns a UNet, VAE or text encoder of a folder, in eval mode.

    Weights that keep their dtype stay in the memory map of the file, which writing to them does not change.

    Args:
        folder: of the component.
        name: of the component: `unet`, `vae`, `text_encoder` or `text_encoder_2`.
        config: of the component.
        choose_dtype: the dtype of a stored tensor → that of the parameter.
        family: of the model; only a text encoder needs it.

    Raises:
        ModelError: config or weights are broken, or do not fit each other.
    """
    from accelerate import init_empty_weights

    weights = open_component(folder)
    with init_empty_weights(include_buffers=False):
        component = build_module(name, config, folder / "config.json", family)
    stored = {_current_name(key): key for key in weights.shapes}
    parameters = component.state_dict()
    sources = {key: Source(stored.get(_current_name(key), key)) for key in parameters}
    taken = {source.key for source in sources.values()}
    unknown = [key for key in weights.shapes if key not in taken and not _NOT_TAKEN.fullmatch(key)]
    return load_parameters(component, name, weights, sources, choose_dtype, unknown, share=True)


def _current_name(key: str) -> str:
    for pattern, name in _OLD_NAMES:
        key = pattern.sub(name, key)
    return key
