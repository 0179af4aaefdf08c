"""The pipelines that are compared: backends of others and ours, each with its precision and options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REFERENCE = "diffusers fp32"
STUDENTS = {"sd15": None, "bk-base": "bk-base", "bk-small": "bk-small", "bk-tiny": "bk-tiny"}
"""Model → plan, of the models with random weights."""
PROMPTS = {"nano": "a 3d render of a red apple"}
PROMPT = "a photo of a lighthouse at dusk"


@dataclass(frozen=True)
class PeerSetup:
    """A backend with its precision and options.

    Attributes:
        kind: `diffusers`, `optimum` or `torch_tensorrt`, or our backend `compile`, `aot`, `onnxruntime` or `tensorrt`.
        precision: fp32, bf16 or fp16.
        channels_last: memory format of the UNet.
        compile: options of `UNet.compile`; None does not compile.
        install: requirements of its own environment; empty runs in ours.
        note: for the results.
        runs_on: devices.
    """

    kind: str
    precision: str
    channels_last: bool = False
    compile: dict[str, Any] | None = None
    install: tuple[str, ...] = ()
    note: str = ""
    runs_on: tuple[str, ...] = field(default=("cpu", "cuda"))


TENSORRT = ("torch-tensorrt", "diffusers", "transformers", "accelerate")
SETUPS = {
    "cpu": {
        REFERENCE: PeerSetup("diffusers", "fp32"),
        "diffusers fp32 channels_last": PeerSetup("diffusers", "fp32", True),
        "diffusers bf16 channels_last": PeerSetup("diffusers", "bf16", True),
        "torch.compile fp32": PeerSetup("diffusers", "fp32", compile={}),
        "torch.compile bf16 channels_last": PeerSetup("diffusers", "bf16", True, {}),
        "optimum-onnx fp32": PeerSetup(
            "optimum",
            "fp32",
            install=("optimum-onnx[onnxruntime]", "diffusers"),
            note="ONNX Runtime, its own export and pipeline",
        ),
        "torch-tensorrt fp16": PeerSetup(
            "torch_tensorrt", "fp16", compile={"backend": "torch_tensorrt"}, install=TENSORRT, runs_on=("cuda",)
        ),
        "ours: ort fp32": PeerSetup("onnxruntime", "fp32", note="`sdcompress export`, `--backend ort`"),
        "ours: aot bf16": PeerSetup("aot", "bf16", note="`--backend aot`: the UNet by AOTInductor, the rest in torch"),
    },
    "cuda": {
        REFERENCE: PeerSetup("diffusers", "fp32"),
        "diffusers fp16": PeerSetup("diffusers", "fp16"),
        "diffusers fp16 channels_last": PeerSetup("diffusers", "fp16", True),
        "torch.compile fp16 channels_last": PeerSetup("diffusers", "fp16", True, {}),
        "torch.compile fp16 channels_last reduce-overhead": PeerSetup(
            "diffusers", "fp16", True, {"mode": "reduce-overhead"}, note="CUDA graphs"
        ),
        "torch.compile fp16 channels_last max-autotune": PeerSetup(
            "diffusers", "fp16", True, {"mode": "max-autotune"}, note="CUDA graphs"
        ),
        "optimum-onnx fp16": PeerSetup(
            "optimum",
            "fp16",
            install=("optimum-onnx[onnxruntime-gpu]", "diffusers"),
            note="ONNX Runtime CUDA, its own export and pipeline",
        ),
        "torch-tensorrt fp16": PeerSetup(
            "torch_tensorrt",
            "fp16",
            compile={"backend": "torch_tensorrt", "dynamic": False, "options": {"truncate_double": True}},
            install=TENSORRT,
            note="CUDA graphs",
        ),
        "ours: ort fp16": PeerSetup(
            "onnxruntime", "fp16", note="`sdcompress export --precision fp16`, `--backend ort`"
        ),
        "ours: compile fp16": PeerSetup("compile", "fp16", note="`--backend compile`: torch.compile in a CUDA graph"),
        "ours: aot fp16": PeerSetup("aot", "fp16", note="`--backend aot`, in a CUDA graph"),
        "ours: trt fp16": PeerSetup("tensorrt", "fp16", note="`sdcompress export --trt`, CUDA graphs"),
    },
}


@dataclass(frozen=True)
class Run:
    """What all setups of one run share; sizes are the model's own.

    Attributes:
        model: `nano`, or a key of `STUDENTS`.
        device: `cpu` or `cuda`.
        work: folder for environments, exports and outputs.
        steps: sampling steps of a picture.
        rounds: new processes of each setup.
        samples: timed UNet calls in a round.
        pictures: timed pictures in a round.
    """

    model: str
    device: str
    work: Path
    steps: int
    rounds: int
    samples: int
    pictures: int

    @property
    def folder(self) -> Path:
        return self.work / self.model

    def case(self, task: str, name: str = "") -> dict[str, Any]:
        """Returns the argument of a child process: plain values."""
        shared = {
            "task": task,
            "way": name,
            "device": self.device,
            "work": str(self.work),
            "folder": str(self.folder),
            "model": self.model,
        }
        return shared | {
            "steps": self.steps,
            "samples": self.samples,
            "pictures": self.pictures,
            "prompt": PROMPTS.get(self.model, PROMPT),
        }


def artifact_of(setup: PeerSetup, folder: Path) -> Path:
    """Returns the folder that a setup runs from: the model's own for torch, else what `prepare` writes."""
    if setup.kind in ("diffusers", "torch_tensorrt", "compile"):
        return folder / "model"
    return folder / f"{setup.kind}-{setup.precision}"


def output_of(name: str, folder: Path) -> Path:
    """Returns the file of a setup's outputs."""
    return folder / f"{''.join(c if c.isalnum() or c in '.-' else '_' for c in name)}.npz"
