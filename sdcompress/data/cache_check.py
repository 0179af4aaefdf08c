"""Checks the tensors of a cache: what was edited or damaged is named before a training uses it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

PICTURE_COLUMNS = ("unit", "bucket", "row", "first", "count")
CAPTION_COLUMNS = ("caption_row", "caption_share")
_WHOLE = (torch.int32, torch.int64)


def find_index_fault(index: Mapping[str, torch.Tensor]) -> str:
    """Returns what is wrong with the index of a cache, see `LatentCache.index`; "" where nothing is."""
    for name in (*PICTURE_COLUMNS, *CAPTION_COLUMNS):
        column = index.get(name)
        if column is None:
            return f"has no column {name}"
        fits = column.is_floating_point() if name == "caption_share" else column.dtype in _WHOLE
        if column.ndim != 1 or not fits:
            return f"has a column {name} of {_describe(column)}"
        if len(column) != len(index[PICTURE_COLUMNS[0] if name in PICTURE_COLUMNS else CAPTION_COLUMNS[0]]):
            return f"has a column {name} of another length"
        if not len(column):
            return f"has an empty column {name}"
        if not (column.isfinite().all() and column.min() >= 0):
            return f"has wrong numbers in the column {name}"
    ends = index["first"].long() + index["count"].long()
    if index["count"].min() < 1 or ends.max() > len(index["caption_row"]):
        return "has pictures without captions"
    return ""


def find_unit_fault(
    unit: Mapping[str, torch.Tensor], index: Mapping[str, torch.Tensor], number: int, views: int
) -> str:
    """Returns what is wrong with a unit of a cache; "" where nothing is. No numbers are read.

    Args:
        unit: its tensors.
        index: of the cache, without faults.
        number: of the unit.
        views: of each picture.
    """
    if fault := find_text_fault(unit):
        return fault
    mine = index["unit"] == number
    for bucket in index["bucket"][mine].unique().tolist():
        mean, logvar, time_ids = (unit.get(f"{name}.{bucket}") for name in ("mean", "logvar", "time_ids"))
        if mean is None or logvar is None or time_ids is None:
            return f"lacks latents of the shape {bucket}"
        if (
            mean.ndim != 4
            or mean.shape != logvar.shape
            or not (mean.is_floating_point() and logvar.is_floating_point())
        ):
            return f"has latents of {_describe(mean)} and {_describe(logvar)}"
        if time_ids.shape != (len(mean), 6) or time_ids.is_complex():
            return f"has time_ids of {_describe(time_ids)}"
        rows = index["row"][mine & (index["bucket"] == bucket)]
        if int(rows.max()) + views > len(mean):
            return f"has {len(mean)} latents of the shape {bucket}, fewer than the index says"
    firsts, counts = index["first"][mine].long(), index["count"][mine].long()
    last = int((firsts + counts).max()) if len(firsts) else 0
    rows = index["caption_row"][int(firsts.min()) : last] if len(firsts) else index["caption_row"][:0]
    if len(rows) and int(rows.max()) >= len(unit["text"]):
        return f"has {len(unit['text'])} captions, fewer than the index says"
    return ""


def describe_layout(unit: Mapping[str, torch.Tensor]) -> str:
    """Returns the sizes that all units of a cache share: latent channels, and those of an embedded caption."""
    parts = {name.partition(".")[0]: tensor for name, tensor in unit.items()}
    sizes = {name: tuple(parts[name].shape[1:]) for name in ("text", "pooled", "ids") if name in parts}
    channels = {tensor.shape[1] for name, tensor in unit.items() if name.startswith("mean.") and tensor.ndim == 4}
    return f"{sorted(channels)} channels, captions of {sizes}"


def find_text_fault(texts: Mapping[str, torch.Tensor]) -> str:
    """Returns what is wrong with the embeddings of captions, `text` and perhaps `pooled` and `ids`; or ""."""
    text = texts.get("text")
    if text is None or text.ndim != 3 or not len(text) or not text.is_floating_point():
        return "has no embeddings of captions"
    pooled, ids = texts.get("pooled"), texts.get("ids")
    if pooled is not None and (pooled.ndim != 2 or len(pooled) != len(text) or not pooled.is_floating_point()):
        return f"has pooled embeddings of {_describe(pooled)}"
    if ids is not None and (ids.ndim != 2 or len(ids) != len(text) or ids.dtype not in _WHOLE):
        return f"has tokens of {_describe(ids)}"
    return ""


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)[:6]}"
