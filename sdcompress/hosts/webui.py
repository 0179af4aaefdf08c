"""AUTOMATIC1111's Stable Diffusion WebUI, and Forge, which is grown from it: an extension, and engines in a model
folder of their own.
"""

from __future__ import annotations

from dataclasses import replace

from sdcompress.hosts.host import Host

WEBUI = Host(
    name="webui",
    title="SD-WebUI",
    plugin="sd_webui_sdcompress",
    extension="extensions/sd-webui-sdcompress",
    marks=(("webui.py",), ("modules/sd_unet.py",)),
    absent={"modules_forge": "forge"},
    programs=("launch.py", "webui.py"),
    signatures=("webui",),
    steps=(
        "restart the WebUI (Settings → Reload UI is not enough the first time)",
        "load a checkpoint of the engine's family",
        "Settings → Stable Diffusion → SD Unet: choose the engine; the tab sdcompress tells of each",
    ),
)
FORGE = replace(
    WEBUI,
    name="forge",
    title="Forge",
    marks=(("webui.py",), ("modules_forge",)),
    absent={},
    steps=(
        "restart Forge",
        "load a checkpoint of the engine's family",
        "in txt2img or img2img, open the panel sdcompress and choose the engine",
    ),
)
