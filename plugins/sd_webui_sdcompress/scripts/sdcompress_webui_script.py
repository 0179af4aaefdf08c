"""The extension's callbacks, which A1111 and Forge load at start.

Nothing heavy is imported, and nothing is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from modules import script_callbacks, scripts

_HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_HERE))  # `sdcompress install` has put `sdcompress_engines` there
try:
    from sdcompress_webui import a1111, forge, pages

    problem = None
except ImportError as error:
    problem = (
        f"sdcompress cannot start ({error}). Install the extension again with: sdcompress install webui WEBUI ENGINE"
    )
    print(f"*** {problem}")
finally:
    sys.path.remove(str(_HERE))  # the packages are loaded, and the host must not import the folder's other files


if problem is None:
    _FORGE = forge.Forge() if forge.is_forge() else None

    class Script(scripts.Script):  # type: ignore[misc, name-defined]
        sorting_priority = 1000
        """Last on Forge, so that no other script replaces the wrapper."""

        def title(self) -> str:
            return "sdcompress"

        def show(self, is_img2img: bool) -> Any:
            return scripts.AlwaysVisible

        def ui(self, is_img2img: bool) -> list[Any]:
            if _FORGE is None:
                return []
            import gradio

            with gradio.Accordion("sdcompress", open=False):
                choice = gradio.Dropdown(_FORGE.choices(), value=forge.NONE, label="UNet")
                gradio.Button("Refresh").click(
                    fn=lambda: gradio.update(choices=_FORGE.choices()), inputs=[], outputs=[choice]
                )
            return [choice]

        def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
            if _FORGE is None:
                a1111.before_batch(p)

        def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
            if _FORGE is not None:
                _FORGE.before_sampling(p, args[0] if args else None)

        def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
            if _FORGE is not None:
                _FORGE.after(p, processed, args[0] if args else None)
            else:
                a1111.HOST.job = None

    def _tab() -> list[Any]:
        from modules import shared

        host = a1111.HOST if _FORGE is None else _FORGE.host
        return pages.create_tab(
            lambda: getattr(shared.opts, "sd_unet", None) if _FORGE is None else None, lambda: host.checkpoint()[1]
        )

    script_callbacks.on_ui_settings(pages.add_settings)
    script_callbacks.on_ui_tabs(_tab)
    if _FORGE is None:
        script_callbacks.on_list_unets(a1111.list_unets)
        script_callbacks.on_script_unloaded(a1111.unloaded)
    else:
        script_callbacks.on_script_unloaded(_FORGE.leave)
