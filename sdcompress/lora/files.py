"""Read and write LoRA files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sdcompress_engines.errors import ModelError, UsageError
from sdcompress_engines.ldm_keys import ldm_unet_keys
from sdcompress_engines.output_folders import staged_file

from sdcompress.lora.names import clip_modules, find_layer, kohya_prefix, split_key


@dataclass(frozen=True)
class LoraLayer:
    """The change of one layer's weight: `up @ down · alpha / rank`.

    Attributes:
        down: (rank, in) or, of a convolution, (rank, in, k, k). up: (out, rank) or (out, rank, 1, 1).
        alpha: scales the change.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner dimension of the two matrices."""
        return len(self.down)

    def delta(self, shape: torch.Size) -> torch.Tensor:
        """Returns the change of a weight of this shape, float32."""
        return (self.up.float().flatten(1) @ self.down.float().flatten(1)).view(shape) * (self.alpha / self.rank)


Layers = dict[tuple[str, str], LoraLayer]
"""(component, module name) → layer."""


def read_lora(path: Path, modules: Iterable[str]) -> Layers:
    """Returns the layers of a LoRA file in either naming.

    Args:
        path: a `.safetensors` file.
        modules: the layers of the UNet that the file was made for. kohya's names have an underscore for every dot, and
            are matched against these, by the names of diffusers or of the LDM layout.

    Raises:
        UsageError: there is no such file.
        ModelError: the file is no LoRA, is another kind of adapter (LoHa, LoKr, DoRA), or was made for another UNet.
    """
    if not path.is_file():
        raise UsageError("does not exist", where=path, expected="a LoRA, .safetensors")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"is not a readable safetensors file ({str(error).splitlines()[0]})",
            where=path,
            hint="copy or download it again",
        ) from error
    parts = _group_by_layer(tensors, modules, path)
    broken = next((name for name, layer in parts.items() if not {"down", "up"} <= layer.keys()), None)
    if broken:
        raise ModelError(f"has only one half of the layer {broken[1]}", where=path, hint="copy or download it again")
    return {
        name: LoraLayer(layer["down"], layer["up"], float(layer["alpha"] if "alpha" in layer else len(layer["down"])))
        for name, layer in parts.items()
    }


def _group_by_layer(
    tensors: Mapping[str, torch.Tensor], modules: Iterable[str], path: Path
) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Returns (component, module name) → role → tensor.

    Raises:
        ModelError: no tensor, or not every one, belongs to a layer of the model.
    """
    known = {"unet": _unet_names(list(modules))}
    known["text_encoder"] = known["text_encoder_2"] = {name.replace(".", "_"): name for name in clip_modules()}
    parts: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        split = split_key(key)
        layer = find_layer(split[0], known) if split else None
        if split is None or layer is None:
            unknown.append(key)
        else:
            parts.setdefault(layer, {})[split[1]] = tensor
    if not parts:
        raise ModelError(
            "is not a LoRA" if tensors else "is empty",
            where=path,
            expected="layers named as diffusers or kohya's scripts name them",
        )
    if unknown:
        raise ModelError(
            f"has {len(unknown)} of {len(tensors)} tensors that belong to no layer here, such as {unknown[0]}",
            where=path,
            expected="a plain LoRA made for this UNet's family",
        )
    return parts


def _unet_names(modules: list[str]) -> dict[str, str]:
    """Returns a UNet layer's name in kohya's files → its module name.

    kohya's scripts take the names of SD1's and SD2's layers from diffusers, and those of SDXL's from the LDM layout.

    Args:
        modules: all of the UNet's layers.
    """
    ldm = ldm_unet_keys(f"{name}.weight" for name in modules)
    names = {key.removesuffix(".weight"): name.removesuffix(".weight") for name, key in ldm.items() if key is not None}
    return {key.replace(".", "_"): name for key, name in names.items()} | {m.replace(".", "_"): m for m in modules}


def write_lora(layers: Layers, path: Path, naming: str, metadata: Mapping[str, str] | None = None) -> None:
    """Write a LoRA file; it appears by one rename.

    Args:
        layers: of the LoRA.
        path: of the file.
        naming: `diffusers` or `kohya`. diffusers' has no alpha, so it is multiplied into the `up` matrix.
        metadata: further entries for the file; values are text.

    Raises:
        StorageError: there is no space or no permission.
    """
    tensors: dict[str, torch.Tensor] = {}
    components = {component for component, _ in layers}
    for (component, name), layer in layers.items():
        if naming == "kohya":
            prefix = kohya_prefix(component, components) + name.replace(".", "_")
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
    entries = {"format": "pt"} | dict(metadata or {})
    with staged_file(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=entries)
