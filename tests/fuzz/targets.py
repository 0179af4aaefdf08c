"""The readers that are fuzzed: one function each, from the bytes of a file to what the reader makes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import SdCompressError
from sdcompress_engines.manifest import MANIFEST_NAME, canonical, faults

CONFIGS = Path(__file__).parents[2] / "sdcompress/assets/configs"
LONGEST_MESSAGE = 1500
Reader = Callable[[Path, bytes], Any]


def run_target(name: str, folder: Path, data: bytes) -> bool:
    """Let a reader read a file with these bytes. Returns whether it accepts them.

    Args:
        name: of the target, in `TARGETS`.
        folder: where the file is written.
        data: the file's content.

    Raises:
        Exception: whatever the reader raises that is no `SdCompressError`: a finding.
        AssertionError: the reader's message is no readable line.
    """
    try:
        TARGETS[name](folder, data)
    except SdCompressError as error:
        message = str(error)
        if "\n" in message or not 5 < len(message) < LONGEST_MESSAGE:
            raise AssertionError(f"no readable line of {len(message)} characters: {message[:300]!r}") from error
        return False
    return True


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def reseal(data: bytes) -> bytes:
    """Returns sealed JSON with a seal that fits its content, as a forger would write it; other bytes as they are."""
    try:
        raw = json.loads(data)
        if not isinstance(raw, dict) or "seal" not in raw:
            return data
        content = {name: value for name, value in raw.items() if name != "seal"}
        return json.dumps(content | {"seal": hashlib.sha256(canonical(content)).hexdigest()}).encode()
    except (ValueError, RecursionError):
        return data


def with_header(data: bytes) -> bytes:
    """Returns a safetensors file with this header, whose length is right, and zeros as its tensors."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(data).items() if name != "__metadata__"]
        payload = int(min(max(0, *ends), 2**20))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        payload = 64
    return len(data).to_bytes(8, "little") + data + bytes(payload)


def read_manifest(folder: Path, data: bytes) -> Any:
    write(folder, MANIFEST_NAME, reseal(data))
    return faults(folder)


def read_record(folder: Path, data: bytes) -> Any:
    from sdcompress.hosts.record import read_record

    record, fault = read_record(
        write(folder, "record.json", reseal(data)), ("extensions/sdcompress", "models/sdcompress")
    )
    assert (record is None) or (fault is None)
    return record


def read_plan(folder: Path, data: bytes) -> Any:
    from sdcompress.families.registry import SD1
    from sdcompress.prune.presets import read_plan

    return read_plan(str(write(folder, "plan.json", data)), SD1.read_config("unet/config.json"))


def read_recipe(folder: Path, data: bytes) -> Any:
    from sdcompress.train.config import DistillConfig
    from sdcompress.train.recipes import load_config

    return load_config(DistillConfig, write(folder, "recipe.yaml", data), {})


def read_suite(folder: Path, data: bytes) -> Any:
    from sdcompress_bench.suite_file import read_suite

    return read_suite(write(folder, "suite.yaml", data))


def read_results(folder: Path, data: bytes) -> Any:
    from sdcompress_bench.results import read_results

    return read_results(write(folder, "results.json", data)).rows()


def read_safetensors(folder: Path, data: bytes) -> Any:
    from sdcompress.checkpoints.weights import open_weights

    return open_weights(write(folder, "weights.safetensors", data)).shapes


def read_pickle(folder: Path, data: bytes) -> Any:
    from sdcompress.checkpoints.weights import open_weights

    return open_weights(write(folder, "weights.ckpt", data)).shapes


def read_single_file(folder: Path, data: bytes) -> Any:
    from sdcompress.models.describe import describe_model

    return describe_model(str(write(folder, "model.safetensors", with_header(data))))


def read_lora(folder: Path, data: bytes) -> Any:
    from sdcompress.lora.files import read_lora

    return read_lora(write(folder, "lora.safetensors", with_header(data)), teacher_modules())


@cache
def teacher_modules() -> list[str]:
    import torch
    from diffusers import UNet2DConditionModel

    from sdcompress.families.registry import SD1
    from sdcompress.lora.names import unet_modules

    with torch.device("meta"):
        return unet_modules(UNet2DConditionModel.from_config(SD1.read_config("unet/config.json")))


def read_graph(folder: Path, data: bytes) -> Any:
    from sdcompress_engines.graph import read_graph

    return read_graph(write(folder, "unet.onnx", data))


def read_package(folder: Path, data: bytes) -> Any:
    from sdcompress_engines.runners.aot_package import read_facts

    return read_facts(write(folder, "unet.pt2", data))


def read_shard(folder: Path, data: bytes) -> Any:
    from sdcompress.data.skipped import Skipped
    from sdcompress.data.sources import open_source

    return [record.key for record in open_source(write(folder, "shard.tar", data)).read_unit(0, Skipped())]


def read_unet_config(folder: Path, data: bytes) -> Any:
    from sdcompress.models.describe import describe_model

    write(folder, "model_index.json", (CONFIGS / "sd1/model_index.json").read_bytes())
    (folder / "unet").mkdir(exist_ok=True)
    write(folder / "unet", "config.json", data)
    return describe_model(str(folder))


def read_model_index(folder: Path, data: bytes) -> Any:
    from sdcompress.models.load import load_pipeline

    write(folder, "model_index.json", data)
    return load_pipeline(folder)


TARGETS: dict[str, Reader] = {
    "manifest": read_manifest,
    "record": read_record,
    "plan": read_plan,
    "recipe": read_recipe,
    "suite": read_suite,
    "results": read_results,
    "safetensors": read_safetensors,
    "pickle": read_pickle,
    "single-file": read_single_file,
    "lora": read_lora,
    "onnx": read_graph,
    "package": read_package,
    "shard": read_shard,
    "unet-config": read_unet_config,
    "model-index": read_model_index,
}
