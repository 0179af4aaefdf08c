"""The settings page and the tab: what a WebUI shows of the plugin.

Gradio and the host are imported where they are used.
"""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import SdCompressError

from .library import Artifact, Model, Traits, Unreadable, find, models
from .panel import page
from .unet import Settings

SECTION = ("sdcompress", "sdcompress")
FOLDER, FALLBACK, CUDA_GRAPH = "sdcompress_folder", "sdcompress_fallback", "sdcompress_cuda_graph"
FALLBACKS = ("error", "torch")


def default_folder() -> Path:
    """`models/sdcompress` of the host."""
    from modules import paths

    return Path(paths.models_path) / "sdcompress"


def add_settings() -> None:
    """Settings → sdcompress."""
    import gradio
    from modules import shared

    shared.opts.add_option(
        FOLDER, shared.OptionInfo("", f"Folder of the engines (empty: {default_folder()})", section=SECTION)
    )
    told = (
        "error: the picture is refused, with the command that builds what is missing; torch: the engine's own weights"
        " run in torch, where they lie beside it, and a comment under the picture says so"
    )
    shared.opts.add_option(
        FALLBACK,
        shared.OptionInfo(
            "error",
            "Where no engine serves: a size, a prompt length, a LoRA",
            gradio.Radio,
            {"choices": list(FALLBACKS)},
            section=SECTION,
        ).info(told),
    )
    shared.opts.add_option(
        CUDA_GRAPH,
        shared.OptionInfo(True, "Replay CUDA graphs for sizes that come again", section=SECTION).info(
            "faster; takes effect when an engine is chosen anew"
        ),
    )


def settings() -> Settings:
    """As they are now."""
    from modules import shared

    fallback = getattr(shared.opts, FALLBACK, None)
    return Settings(fallback if fallback in FALLBACKS else "error", bool(getattr(shared.opts, CUDA_GRAPH, True)))


def folder() -> Path:
    """Where engines are looked for."""
    from modules import shared

    chosen = str(getattr(shared.opts, FOLDER, None) or "").strip()
    return Path(chosen).expanduser() if chosen else default_folder()


def look(wanted: str | None = None) -> tuple[list[Artifact | Unreadable], list[Model], list[str]]:
    """What is in the folder, as the menu's entries, and what is amiss with the folder itself.

    Args:
        wanted: what the settings have chosen.
    """
    try:
        found = find(folder())
    except SdCompressError as error:
        return [], models([], wanted), [str(error)]
    return found, models(found, wanted), []


def missing_runtimes() -> list[str]:
    """A line where the host has nothing at all to run an engine with; nothing is imported to find out."""
    if any(util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx", "onnxruntime")):
        return []
    return [
        f"No runtime is installed: {sys.executable} -m pip install tensorrt (or tensorrt-rtx-cu13, or onnxruntime), in"
        " the version the engines were built with, then restart."
    ]


def tab(wanted: str | None, traits: Any) -> list[Any]:
    """The tab: the table, and a button that reads the folder anew.

    Args:
        traits: gives the loaded checkpoint's `Traits`, or None.
    """
    import gradio

    def show() -> str:
        found, entries, amiss = look(wanted)
        loaded: Traits | None = traits()
        return page(folder(), found, entries, loaded, [*amiss, *missing_runtimes()])

    with gradio.Blocks(analytics_enabled=False) as blocks:
        table = gradio.HTML(value=show())
        gradio.Button("Look again").click(fn=show, inputs=[], outputs=[table])
    return [(blocks, "sdcompress", "sdcompress_tab")]
