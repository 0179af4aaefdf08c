"""The hosts there are: one `Host` each."""

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


COMFYUI = Host(
    name="comfyui",
    title="ComfyUI",
    plugin="comfyui_sdcompress",
    extension="custom_nodes/comfyui-sdcompress",
    marks=(
        ("custom_nodes",),
        ("models",),
        ("comfy/sd.py", "user", "comfy/cmd"),
    ),  # the desktop application's folder holds no program
    programs=("main.py",),
    signatures=("comfyui", "webui"),
    steps=(
        "restart ComfyUI (where the node is there already, press R in the browser)",
        "double-click the canvas, type sdcompress, and take the node Load sdcompress engine",
        "choose the engine, and connect MODEL to the KSampler; CLIP and VAE come from a checkpoint of the same family",
    ),
)
