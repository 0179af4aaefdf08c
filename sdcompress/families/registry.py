"""The families, one `Family` each. To add one, write it in a file of its own and add it to `_BUILT_IN`."""

from __future__ import annotations

from sdcompress_engines.errors import UsageError

from sdcompress.families.family import Family, UNetConfig
from sdcompress.families.sdxl import SDXL
from sdcompress.families.stable_diffusion import NANO, SD1, SD2

OTHER = Family("other", "another UNet", recognizes=lambda config: True, bf16_vae=False)
"""The family of a UNet that no other family recognizes: it runs, but nothing is known about it."""
_BUILT_IN = (NANO, SD1, SD2, SDXL)  # the first that recognizes a config is its family
_REGISTERED: dict[str, Family] = {family.name: family for family in _BUILT_IN}


def families() -> dict[str, Family]:
    """Returns the known families by name."""
    return dict(_REGISTERED)


def published_families() -> dict[str, Family]:
    """Returns the families whose configs the package holds, by name."""
    return {name: family for name, family in _REGISTERED.items() if family.published}


def register(family: Family) -> Family:
    """Add a family for this process, as a plugin or a test does; returns it.

    It is asked before all others whether it recognizes a UNet.

    Raises:
        UsageError: its name is taken.
    """
    if family.name in (*_REGISTERED, OTHER.name):
        raise UsageError(f"the family {family.name!r} exists already", hint="give it another name")
    others = dict(_REGISTERED)
    _REGISTERED.clear()
    _REGISTERED.update({family.name: family, **others})
    return family


def unregister(name: str) -> None:
    """Remove a family that `register` added; does nothing for an unknown name."""
    if name not in {family.name for family in _BUILT_IN}:
        _REGISTERED.pop(name, None)


def family_of(unet_config: UNetConfig) -> Family:
    """Returns the family that recognizes a UNet config, of a teacher or a student; `OTHER` where none does."""
    return next((family for family in _REGISTERED.values() if family.recognizes(unet_config)), OTHER)


def family_of_pipeline(class_name: str, unet_config: UNetConfig) -> Family:
    """Returns the family of a diffusers pipeline, by its UNet; else the first published family of its class; else
    `OTHER`.

    Args:
        class_name: of the pipeline, such as `StableDiffusionPipeline`.
        unet_config: decides where several families share the class.
    """
    recognized = family_of(unet_config)
    if recognized.pipeline_class == class_name and recognized is not OTHER:
        return recognized
    return next((family for family in published_families().values() if family.pipeline_class == class_name), OTHER)


def find_family(name: str) -> Family:
    """Returns the published family of a name.

    Raises:
        UsageError: there is no such family.
    """
    published = published_families()
    if name not in published:
        raise UsageError(f"no family {name!r}", expected=" or ".join(published))
    return published[name]
