"""LoRA files: read, write in both namings that are in use, remap to a student, fuse into weights.

diffusers names a layer `unet.down_blocks.0…to_q.lora_A.weight`; kohya's scripts, which the WebUIs read,
`lora_unet_down_blocks_0…to_q` with `.lora_down.weight`, `.lora_up.weight` and `.alpha`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import ModelError, UsageError
from sdcompress_engines.manifest import storage_errors

from sdcompress.prune.plan import BlockPlan

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
_ENDS = {
    "lora_A.weight": "down",
    "lora.down.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora.up.weight": "up",
    "lora_up.weight": "up",
    "alpha": "alpha",
}
_KEY = re.compile(rf"(.*?)\.({'|'.join(re.escape(end) for end in _ENDS)})$")


@dataclass(frozen=True)
class LoraLayer:
    """What is added to one layer's weight: `up @ down · alpha / rank`.

    Attributes:
        down: (rank, in) or, of a convolution, (rank, in, k, k). up: (out, rank) or (out, rank, 1, 1).
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self, shape: torch.Size) -> torch.Tensor:
        """The change of a weight of this shape, float32."""
        return (self.up.float().flatten(1) @ self.down.float().flatten(1)).view(shape) * (self.alpha / self.rank)


Layers = dict[tuple[str, str], LoraLayer]


def unet_modules(unet: Any) -> list[str]:
    """The names of the layers of a UNet that can be adapted."""
    return [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]


def clip_modules(layers: int = 32) -> list[str]:
    """The names of the layers of a CLIP text encoder that can be adapted, of one as deep as any in use."""
    kinds = [*(f"self_attn.{n}_proj" for n in "qkv"), "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    return [f"text_model.encoder.layers.{i}.{kind}" for i in range(layers) for kind in kinds]


def read_lora(path: Path, modules: Iterable[str]) -> Layers:
    """(component, layer name) → layer, from a file in either naming.

    Args:
        modules: of the UNet the file was made for; kohya's names, where every dot is an underscore, are told apart by
            them.

    Raises:
        UsageError: no such file. ModelError: no LoRA, a kind of adapter that is not one (LoHa, LoKr, DoRA), or made for
            another UNet.
    """
    if not path.is_file():
        raise UsageError("does not exist", where=path, expected="a LoRA, .safetensors")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"is no readable safetensors file ({str(error).splitlines()[0]})",
            where=path,
            hint="copy or download it again",
        ) from error
    known = {"unet": {name.replace(".", "_"): name for name in modules}}
    known["text_encoder"] = known["text_encoder_2"] = {name.replace(".", "_"): name for name in clip_modules()}
    parts: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        name = _place(match[1], known) if match else None
        if match is None or name is None:
            strange.append(key)
        else:
            parts.setdefault(name, {})[_ENDS[match[2]]] = tensor
    if not parts:
        raise ModelError(
            "is no LoRA" if tensors else "is empty",
            where=path,
            expected="layers named as diffusers or kohya's scripts name them",
        )
    if strange:
        raise ModelError(
            f"has {len(strange)} of {len(tensors)} tensors that belong to no layer here, such as {strange[0]}",
            where=path,
            expected="a plain LoRA made for this UNet's family",
        )
    broken = next((name for name, found in parts.items() if not {"down", "up"} <= found.keys()), None)
    if broken:
        raise ModelError(f"has only one half of the layer {broken[1]}", where=path, hint="copy or download it again")
    return {
        name: LoraLayer(
            found["down"], found["up"], float(found["alpha"]) if "alpha" in found else float(len(found["down"]))
        )
        for name, found in parts.items()
    }


def _place(key: str, known: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    for component, prefix in KOHYA.items():
        if key.startswith(prefix):
            name = known[component].get(key.removeprefix(prefix))
            return (component, name) if name else None
        if key.startswith(f"{component}."):
            return component, key.removeprefix(f"{component}.").removesuffix(".default")
    return None


def write_lora(layers: Layers, path: Path, naming: str, metadata: Mapping[str, str] | None = None) -> None:
    """Write layers as `diffusers` or `kohya` name them, by one rename. diffusers' form has no alpha: it is multiplied
    in.
    """
    tensors: dict[str, torch.Tensor] = {}
    for (component, name), layer in layers.items():
        if naming == "kohya":
            prefix = KOHYA[component] + name.replace(".", "_")
            tensors |= {
                f"{prefix}.lora_down.weight": layer.down,
                f"{prefix}.lora_up.weight": layer.up,
                f"{prefix}.alpha": torch.tensor(layer.alpha),
            }
        else:
            tensors |= {
                f"{component}.{name}.lora_A.weight": layer.down,
                f"{component}.{name}.lora_B.weight": layer.up * (layer.alpha / layer.rank),
            }
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"} | dict(metadata or {})
        )
        os.replace(temporary, path)


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:WEIGHT` as typed.

    Raises:
        UsageError: the weight is no number.
    """
    name, colon, weight = text.rpartition(":")
    is_drive = len(name) == 1 and name.isalpha() and weight.startswith(("\\", "/"))
    if not colon or weight.endswith(".safetensors") or is_drive:
        return Path(text), 1.0
    try:
        return Path(name), float(weight)
    except ValueError as error:
        raise UsageError(f"--lora {text!r}", expected="FILE or FILE:WEIGHT, such as style.safetensors:0.8") from error


@dataclass(frozen=True)
class Remapped:
    """A LoRA for a student: its layers, and the names of the teacher's layers that have no place in it."""

    layers: Layers
    dropped: list[str]


def remap_lora(layers: Layers, plan: BlockPlan, student_modules: Iterable[str]) -> Remapped:
    """A LoRA made for the plan's teacher as one for its student.

    Layers of blocks that are gone are dropped and named.
    """
    places = {plan.teacher_key(name): name for name in student_modules}
    kept: Layers = {}
    dropped = []
    for (component, name), layer in layers.items():
        if component != "unet":
            kept[component, name] = layer
        elif name in places:
            kept[component, places[name]] = layer
        else:
            dropped.append(name)
    return Remapped(kept, dropped)


@torch.no_grad()
def fuse_lora(pipeline: Any, layers: Layers, weight: float = 1.0) -> None:
    """Add a LoRA to the pipeline's weights, in place, `weight` times.

    Raises:
        ModelError: a layer the pipeline does not have, or has in another shape.
    """
    for (component, name), layer in layers.items():
        network = getattr(pipeline, component, None)
        names = dict(network.named_modules()) if network is not None else {}
        module = names.get(name) or names.get(name.removeprefix("text_model."))
        if module is None:
            raise ModelError(
                f"the LoRA changes {name}, which the {component} does not have",
                expected="a LoRA made for this model",
                hint="sdcompress lora remap LORA --plan PLAN, for one made for the teacher",
            )
        target: Any = module.weight
        if layer.up.shape[0] != target.shape[0] or layer.down.flatten(1).shape[1] != target.flatten(1).shape[1]:
            raise ModelError(
                f"the LoRA's {name} is made for a layer of {layer.up.shape[0]} x {layer.down.flatten(1).shape[1]}",
                expected=f"{target.shape[0]} x {target.flatten(1).shape[1]}, as the {component} has",
            )
        target += (weight * layer.delta(target.shape)).to(target)
