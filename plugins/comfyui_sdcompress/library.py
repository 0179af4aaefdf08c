"""The engine package: the copy that `sdcompress install` has put beside this file, in a checkout the installed one."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdcompress_engines import (
        calls,
        engine_files,
        errors,
        export_folder,
        few_steps,
        flavour,
        graph,
        graph_weights,
        manifest,
        noise,
        paths,
        runners,
        signature,
        trust,
        unet,
        verified,
    )

__all__ = [
    "calls",
    "engine_files",
    "errors",
    "export_folder",
    "few_steps",
    "flavour",
    "graph",
    "graph_weights",
    "manifest",
    "noise",
    "paths",
    "runners",
    "signature",
    "trust",
    "unet",
    "verified",
]

if not TYPE_CHECKING:
    # Imported from its place beside this file, never by sys.path: another plugin may carry another version.
    _BESIDE = (Path(__file__).parent / "sdcompress_engines").is_dir()
    _ROOT = f"{__package__}.sdcompress_engines" if _BESIDE else "sdcompress_engines"
    globals().update({name: importlib.import_module(f"{_ROOT}.{name}") for name in __all__})
