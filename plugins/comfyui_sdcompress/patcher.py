"""ComfyUI's `ModelPatcher` around an engine.

ComfyUI patches the parameters of torch modules, and an engine has none. So the patches of the MODEL that is loaded are
handed to the engine, which exchanges its weights before the next call. What is loaded is one for all copies of a MODEL,
and is noted at the engine.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .library import errors
from .loras import Calculate


def refuse_saving(*args: Any, **options: Any) -> Any:
    """Refuse to save or to merge the model.

    Raises:
        EngineError: always.
    """
    raise errors.EngineError(
        "an engine has no weights to save or to merge",
        hint="save the model it was exported from: sdcompress export MODEL --ldm -o FILE.safetensors",
    )


def _refuse_hooks(patches: Any, strength: float) -> list[Any]:
    """Returns the keys of the UNet, if a LoRA hook of this strength changes nothing.

    Raises:
        EngineError: it would change the weights between two calls of one step.
    """
    own = [key for key in patches if str(key if isinstance(key, str) else key[0]).startswith("diffusion_model.")]
    if own and strength != 0:
        raise errors.EngineError(
            f"a LoRA hook changes {len(own)} of the UNet's weights for a part of each step, and an engine exchanges"
            " its weights between samplings only",
            expected="strength_model 0, or no LoRA hook on this model",
            hint="use Load LoRA on the MODEL, or bake it in: sdcompress export MODEL --trt --signature comfyui"
            " --lora FILE:STRENGTH -o DIR",
        )
    return own


def _find_calculate(patcher: Any) -> Calculate:
    """Returns ComfyUI's `calculate_weight`, which was a method of the patcher before August 2024."""
    import comfy

    found: Calculate | None = getattr(getattr(comfy, "lora", None), "calculate_weight", None)
    return found or patcher.calculate_weight


class _Patches:
    """The part of a patcher that takes patches. `self` is ComfyUI's `ModelPatcher`, too."""

    model: Any
    patches: Any

    def clone(self, *args: Any, **options: Any) -> Any:
        copied = super().clone(*args, **options)  # type: ignore[misc]
        copied.__class__ = type(self)  # ComfyUI before December 2024 returns a plain ModelPatcher
        return copied

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        self.model.diffusion_model.loras.check(patches, strength_patch, strength_model)
        return super().add_patches(patches, strength_patch, strength_model)  # type: ignore[misc]

    def add_hook_patches(
        self, hook: Any, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        return _refuse_hooks(patches, strength_patch)

    def get_key_patches(self, filter_prefix: str | None = None) -> Any:
        return refuse_saving()

    def patch_weight_to_device(self, *args: Any, **options: Any) -> None:
        """Do nothing: ComfyUI before August 2024 calls it for each key of `patches`."""

    def _choose_patches(self) -> None:
        patches = {key: list(found) for key, found in self.patches.items()}
        self.model.diffusion_model.loras.choose(patches, _find_calculate(self))


class _Loading(_Patches):
    """The part that loads and unloads. The engine itself is opened at the next call."""

    def load(self, device_to: Any = None, **options: Any) -> Any:
        # Called only if weights are to be applied: at first, for other patches, or after they were taken back.
        # An engine cannot be loaded in part.
        result = super().load(device_to, **{**options, "full_load": True})  # type: ignore[misc]
        self._choose_patches()
        return result

    def partially_load(self, *args: Any, **options: Any) -> Any:
        engine = self.model.diffusion_model
        engine.is_switching = True
        try:
            return super().partially_load(*args, **options)  # type: ignore[misc]
        except BaseException:
            engine.loras.choose({})
            engine.close()
            raise
        finally:
            engine.is_switching = False

    def partially_unload(self, *args: Any, **options: Any) -> int:
        return 0  # nothing was freed, so ComfyUI unloads all of it

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        result = super().unpatch_model(device_to, unpatch_weights=unpatch_weights)  # type: ignore[misc]
        engine = self.model.diffusion_model
        if unpatch_weights and not engine.is_switching:  # while it switches, other patches follow
            engine.loras.choose({})
            engine.close()
        return result


class _LoadingBeforeAugust2024(_Loading):
    def patch_model(self, device_to: Any = None, patch_weights: bool = True) -> Any:
        result = super().patch_model(device_to, patch_weights)  # type: ignore[misc]
        if patch_weights:
            self._choose_patches()
        return result


@cache
def patcher_class(base: type) -> type:
    """Returns ComfyUI's `ModelPatcher` for an engine. All of its memory is the engine's.

    Args:
        base: `ModelPatcher`, of any version.
    """
    return type("EnginePatcher", (_Loading if hasattr(base, "load") else _LoadingBeforeAugust2024, base), {})
