"""The LoRAs of a model: found and checked before anything is measured, and timed as they are swapped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .scenario import ChosenLora, ModelUnderTest

if TYPE_CHECKING:
    from sdcompress.support.pipeline import TextToImagePipeline

_WEIGHT_STEP = 1e-3
"""By which share the LoRAs of a swap are stronger than those of the swap before."""
_LEAST_SWAPS = 3


def find_loras(texts: Sequence[str], model: ModelUnderTest) -> tuple[ChosenLora, ...]:
    """Returns the LoRAs of a model, with the hashes of their files.

    Args:
        texts: FILE or FILE:WEIGHT of each, as `parse_lora` accepts them.
        model: that they are put into; one with random weights need not exist yet.

    Raises:
        UsageError: there is no such file.
        ModelError: it is no LoRA, or not for this model.
    """
    if not texts:
        return ()
    from sdcompress_engines.manifest import sha256_file
    from sdcompress_engines.paths import expand_user

    from sdcompress.lora.fuse import parse_lora, shapes_of
    from sdcompress.lora.model_lora import LORA_COMPONENTS, read_model_lora
    from sdcompress.models.locate import locate_pipeline
    from sdcompress.models.random import family_configs
    from sdcompress.models.student_plan import find_plan, infer_plan

    from .work import build_on_meta, read_pipeline_configs

    if model.random:
        configs: Any = family_configs(model.random.family, model.random.plan)
        plan = infer_plan(configs["unet"])
    else:
        configs = read_pipeline_configs(model.path)
        plan = find_plan(locate_pipeline(model.path), configs["unet"])
    parts = build_on_meta({name: config for name, config in configs.items() if name in LORA_COMPONENTS})
    networks = {name: shapes_of(parts.get(name)) for name in LORA_COMPONENTS}
    found = []
    for text in texts:
        file, weight = parse_lora(text)
        file = expand_user(file)
        read_model_lora(file, networks, plan)
        found.append(ChosenLora(file, weight, sha256_file(file)))
    return tuple(found)


def read_lora_sampling(loras: Sequence[ChosenLora]) -> dict[str, Any]:
    """Returns the entries of `model_index.json` that few-step LoRAs set: the last one's, or none.

    Raises:
        ModelError: a file does not say how to draw.
    """
    if not loras:
        return {}
    from sdcompress.lora.sampling import read_sampling

    entries: dict[str, Any] = {}
    for lora in loras:
        if lora.weight and (sampling := read_sampling(lora.file)) is not None:
            entries |= sampling[0]
    return entries


def time_swaps(
    pipeline: TextToImagePipeline, loras: Sequence[tuple[str, float]], device: str, count: int, budget_s: float
) -> dict[str, list[float]]:
    """Returns the milliseconds of the swaps of a pipeline's LoRAs, by the wall clock, in the order of the swaps.

    | key | from | to |
    |---|---|---|
    | `set` | no LoRA | LoRAs that the pipeline has not had |
    | `reset` | these LoRAs | no LoRA |
    | `again` | no LoRA | the same LoRAs; next to nothing where a backend has kept the weights |

    So that the LoRAs of `set` are new each time, they are 0.1% stronger each time. Their files have been read. On a GPU
    a swap ends when the device has done its work.

    Args:
        pipeline: warm, with these LoRAs; in the end it has none.
        loras: files with their weights.
        device: that the pipeline runs on.
        count: at most this many swaps of each kind.
        budget_s: ends them earlier, but not below three.
    """
    import torch

    samples: dict[str, list[float]] = {"set": [], "reset": [], "again": []}

    def swap(kind: str, chosen: Sequence[tuple[str, float]]) -> None:
        synchronize()
        started = time.perf_counter()
        pipeline.set_loras(chosen)
        synchronize()
        samples[kind].append(1000 * (time.perf_counter() - started))

    def synchronize() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    pipeline.set_loras([])
    started = time.perf_counter()
    for number in range(1, count + 1):
        if number > _LEAST_SWAPS and time.perf_counter() - started > budget_s:
            break
        chosen = [(file, weight * (1 + number * _WEIGHT_STEP)) for file, weight in loras]
        swap("set", chosen)
        swap("reset", [])
        swap("again", chosen)
        pipeline.set_loras([])
    return samples
