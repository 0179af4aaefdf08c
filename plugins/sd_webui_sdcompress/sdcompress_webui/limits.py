"""What an engine does not support, for the tab."""

from __future__ import annotations

from html import escape

LIMITS = (
    (
        "LoRA",
        "A LoRA in the prompt goes into the engine's weights. A student lacks some of the checkpoint's layers: the page"
        " says how much of the LoRA is left. Engines in int8 or fp8, and those built with --no-lora or without their"
        ' card, take none. With the setting "error" the picture is then refused, and the message has the command that'
        ' bakes the LoRA in; with "torch" the engine\'s own weights draw it in torch, with the LoRA. A LoRA that'
        " changes only the text encoder always works.",
    ),
    (
        "ControlNet, IP-Adapter, reference",
        "They work inside the checkpoint's own UNet. They are refused with the reason, whatever the settings are. Set"
        " SD Unet to None for such pictures.",
    ),
    ("Hypernetworks, tiling", "They are refused too, because both change layers inside the UNet."),
    (
        "Refiner, another checkpoint for hires fix",
        "An engine replaces the UNet of the checkpoint that a picture was started with. From the step at which another"
        " checkpoint is loaded, the picture is refused (on Forge the refiner runs with its own UNet).",
    ),
    (
        "AnimateDiff, FreeU and other extensions that rebuild the UNet",
        "They have no effect on an engine. Forge lists what they patch, so there they are refused. A1111 does not: set"
        " SD Unet to None for them.",
    ),
    (
        "Token merging, HyperTile",
        "They make the checkpoint's UNet faster and less exact. On A1111 they have no effect on an engine. On Forge"
        " they count as patches of the UNet and are refused.",
    ),
    (
        "Prompts",
        "Any number of 77-token parts that the engine was built for. A prompt and a negative prompt of different"
        " lengths run one after the other.",
    ),
    (
        "Sizes",
        "Those that the engine was built for, in the steps that its levels allow: 64 px, or 32 px for bk-tiny and"
        " SDXL. Hires fix needs one engine, or several of one model, that take both sizes.",
    ),
)
"""(feature, what happens to it)."""


def limits_html() -> str:
    """Returns the list as HTML."""
    items = "".join(f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in LIMITS)
    return f"<h3>What an engine does not support</h3><ul>{items}</ul>"
