"""Writes the samples that fuzzing starts from: real artifacts, as small as they get.

    python -m tests.fuzz.samples

The files `crash-…` and `slow-…` beside them are findings, which stay as tests.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).parents[2]


def manifest(folder: Path) -> bytes:
    from sdcompress_engines.manifest import MANIFEST_NAME, write_manifest

    (folder / "weights.bin").write_bytes(b"weights")
    write_manifest(folder, "engine", config={"name": "a"}, inputs={"teacher": "0" * 64}, seed=1)
    return (folder / MANIFEST_NAME).read_bytes()


def record(folder: Path) -> bytes:
    from sdcompress.hosts.entry import Entry
    from sdcompress.hosts.record import Record, write_record

    files = {"extensions/sdcompress/install.py": Entry("0" * 64), "models/sdcompress/a/unet.engine": Entry("1" * 64)}
    write_record(folder / "record.json", Record(files, ("extensions/sdcompress",), "0.1.0", "2026-01-01T00:00:00"))
    return (folder / "record.json").read_bytes()


def plan(folder: Path) -> bytes:
    from sdcompress.families.registry import SD1
    from sdcompress.prune.presets import make_plan

    return make_plan(SD1.read_config("unet/config.json"), "bk-tiny").to_json().encode()


def recipe(folder: Path) -> bytes:
    return (ROOT / "sdcompress/recipes/nano.yaml").read_bytes()


def suite(folder: Path) -> bytes:
    return (ROOT / "bench/scenarios/nano.yaml").read_bytes()


def results(folder: Path) -> bytes:
    """The committed measurement of nano without most of its raw samples."""
    content = json.loads((ROOT / "bench/results/bench-nano.json").read_text(encoding="utf-8"))
    content["latency"] = content["latency"][:2]
    content["backends"], content["losses"] = content["backends"][:1], {}
    return json.dumps(shorten(content)).encode()


def shorten(value: object) -> object:
    """Returns JSON with at most three entries in each list of numbers."""
    if isinstance(value, dict):
        return {key: shorten(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shorten(each) for each in (value[:3] if value and isinstance(value[0], int | float) else value)]
    return value


def safetensors(folder: Path) -> bytes:
    from safetensors.torch import save

    return bytes(save({"a.weight": torch.ones(2, 3), "b": torch.zeros(1, dtype=torch.float16)}, {"format": "pt"}))


def pickle(folder: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"model.diffusion_model.a": torch.ones(2)}}, buffer)
    return buffer.getvalue()


def header(content: bytes) -> bytes:
    """The header of a safetensors file."""
    return content[8 : 8 + struct.unpack("<Q", content[:8])[0]]


def single_file(folder: Path) -> bytes:
    from safetensors.torch import save

    keys = {
        "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (4, 8),
        "model.diffusion_model.out.2.weight": (4, 4, 3, 3),
        "first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (7, 8),
    }
    return header(save({key: torch.zeros(shape, dtype=torch.float16) for key, shape in keys.items()}))


def lora(folder: Path) -> bytes:
    from safetensors.torch import save

    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {"lora_down.weight": torch.zeros(2, 8), "lora_up.weight": torch.zeros(8, 2), "alpha": torch.tensor(1.0)}
    return header(save({f"{name}.{end}": value for end, value in tensors.items()}, {"ss_base_model": "sd1"}))


def onnx(folder: Path) -> bytes:
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    far = helper.make_tensor("far", TensorProto.FLOAT, [2], bytes(8), raw=True)
    far.ClearField("raw_data")
    far.data_location = TensorProto.EXTERNAL
    entries = {"location": "unet.onnx", "offset": "0", "length": "8"}
    for key, value in entries.items():
        far.external_data.add(key=key, value=value)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    nodes = [helper.make_node("Add", ["x", "w"], ["z"]), helper.make_node("Mul", ["z", "far"], ["y"])]
    graph = helper.make_graph(nodes, "unet", [given], [result], [weight, far])
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]).SerializeToString())


def package(folder: Path) -> bytes:
    from sdcompress_engines.runners.aot_package import AxisRange, Facts, TensorSpec

    specs = (TensorSpec("sample", ("batch", 4, 16, 16), torch.float32),)
    facts = Facts("2.13.0", "linux-x86_64", "cpu", (), ("AVX512",), specs, specs, {"batch": AxisRange(1, 2)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("unet/data/aotinductor/model/a_metadata.json", json.dumps(facts.metadata()))
    return buffer.getvalue()


def shard(folder: Path) -> bytes:
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {"é1.png": picture.getvalue(), "é1.txt": b"a cat", "é1.json": b'{"width": 8}'}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def unet_config(folder: Path) -> bytes:
    return (ROOT / "sdcompress/assets/configs/sd1/unet/config.json").read_bytes()


def model_index(folder: Path) -> bytes:
    return (ROOT / "sdcompress/assets/configs/sd1/model_index.json").read_bytes()


SAMPLES: dict[str, Callable[[Path], bytes]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        manifest, record, plan, recipe, suite, results, safetensors, pickle, single_file, lora, onnx, package, shard,
        unet_config, model_index,
    )
}  # fmt: skip


def main() -> None:
    """Write one sample a target."""
    import tempfile

    for name, make in SAMPLES.items():
        with tempfile.TemporaryDirectory() as folder:
            (CORPUS / name).mkdir(parents=True, exist_ok=True)
            (CORPUS / name / "sample").write_bytes(make(Path(folder)))


if __name__ == "__main__":
    main()
