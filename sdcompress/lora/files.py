"""LoRA files, read and written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import ModelError, UsageError
from sdcompress_engines.files import replace_file
from sdcompress_engines.manifest import storage_errors

from sdcompress.lora.names import _ENDS, _KEY, KOHYA, _place, clip_modules


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
        replace_file(temporary, path)
