"""The settings page and the tab: what a WebUI shows of the plugin.

Gradio and the host are imported inside the functions that use them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

from sdcompress_engines.errors import SdCompressError

from .consent import NONE, find_waiting, give_consent
from .engine_folders import Artifact, Unreadable, find_artifacts
from .host import Settings
from .menu import Model, group_models
from .panel import tab_html
from .traits import Traits

SECTION = ("sdcompress", "sdcompress")
FOLDER, FALLBACK, CUDA_GRAPH = "sdcompress_folder", "sdcompress_fallback", "sdcompress_cuda_graph"
FALLBACKS = ("error", "torch")


def default_folder() -> Path:
    """Returns `models/sdcompress` of the host."""
    from modules import paths

    return Path(paths.models_path) / "sdcompress"


def add_settings() -> None:
    """Add the page Settings → sdcompress."""
    import gradio
    from modules import shared

    shared.opts.add_option(
        FOLDER, shared.OptionInfo("", f"Folder of the engines (empty: {default_folder()})", section=SECTION)
    )
    explanation = (
        "error: the picture is refused, with the command that builds what is missing; torch: the engine's own weights"
        " run in torch, if they lie beside it, and a comment under the picture says so"
    )
    shared.opts.add_option(
        FALLBACK,
        shared.OptionInfo(
            "error",
            "If no engine can serve a size, a prompt length or a LoRA",
            gradio.Radio,
            {"choices": list(FALLBACKS)},
            section=SECTION,
        ).info(explanation),
    )
    shared.opts.add_option(
        CUDA_GRAPH,
        shared.OptionInfo(True, "Replay CUDA graphs for sizes that repeat", section=SECTION).info(
            "faster; takes effect when an engine is chosen again"
        ),
    )


def read_settings() -> Settings:
    """Returns the current settings."""
    from modules import shared

    fallback = getattr(shared.opts, FALLBACK, None)
    return Settings(fallback if fallback in FALLBACKS else "error", bool(getattr(shared.opts, CUDA_GRAPH, True)))


def engine_folder() -> Path:
    """Returns the folder of the engines, as the settings have it."""
    from modules import shared

    chosen = str(getattr(shared.opts, FOLDER, None) or "").strip()
    return Path(os.path.expanduser(chosen)) if chosen else default_folder()  # leaves the name of an unknown user


def list_models(chosen: str | None = None) -> list[Model]:
    """Returns the entries of the menu.

    Args:
        chosen: the entry that the settings have kept.
    """
    return _read_folder(chosen)[1]


def _read_folder(chosen: str | None) -> tuple[list[Artifact | Unreadable], list[Model], list[str]]:
    """Returns what the engine folder holds, the menu's entries, and what is wrong with the folder itself."""
    try:
        artifacts = find_artifacts(engine_folder())
    except SdCompressError as error:
        return [], group_models([], chosen), [str(error)]
    return artifacts, group_models(artifacts, chosen), []


def missing_runtimes() -> list[str]:
    """Returns a message if the host has no runtime at all. None of them is imported."""
    if any(util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx", "onnxruntime")):
        return []
    return [
        f"No runtime is installed: {sys.executable} -m pip install tensorrt (or tensorrt-rtx-cu13, or onnxruntime), in"
        " the version the engines were built with, then restart."
    ]


def create_tab(read_chosen: Callable[[], str | None], read_traits: Callable[[], Traits | None]) -> list[Any]:
    """Returns the tab as `on_ui_tabs` takes it: the table, a button that reads the folder again, and the consent.

    Args:
        read_chosen: returns the entry that the settings have now, or None.
        read_traits: returns the traits of the loaded checkpoint, or None.
    """
    import gradio

    def read(*notes: str) -> tuple[str, list[str]]:
        artifacts, entries, problems = _read_folder(read_chosen())
        notes = (*notes, *problems, *missing_runtimes())
        return tab_html(engine_folder(), artifacts, entries, read_traits(), notes), [NONE, *find_waiting(artifacts)]

    def refresh(*notes: str) -> tuple[str, Any]:
        page, waiting = read(*notes)
        return page, gradio.update(choices=waiting, value=NONE)

    def consent(choice: str) -> tuple[str, Any]:
        return refresh(give_consent(choice, _read_folder(None)[0]))

    with gradio.Blocks(analytics_enabled=False) as blocks:
        page, waiting = read()
        table = gradio.HTML(value=page)
        again = gradio.Button("Refresh")
        choice = gradio.Dropdown(waiting, value=NONE, label="Engine that was built elsewhere")
        again.click(fn=refresh, inputs=[], outputs=[table, choice])
        gradio.Button("Allow this engine to run").click(fn=consent, inputs=[choice], outputs=[table, choice])
    return [(blocks, "sdcompress", "sdcompress_tab")]
