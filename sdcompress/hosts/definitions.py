"""The supported hosts: one `Host` each. To support another host, add it here."""

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
        "Settings → Stable Diffusion → SD Unet: choose the engine; the sdcompress tab lists the details of each",
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
    # The folder of the desktop application holds `user`, but not the program itself.
    marks=(("custom_nodes",), ("models",), ("comfy/sd.py", "user", "comfy/cmd")),
    programs=("main.py",),
    signatures=("comfyui", "webui"),
    steps=(
        "restart ComfyUI (if the node is already there, press R in the browser instead)",
        "double-click the canvas, type sdcompress, and add the node Load sdcompress engine",
        "choose the engine, and connect MODEL to the KSampler; CLIP and VAE come from a checkpoint of the same family",
    ),
)


def hosts() -> dict[str, Host]:
    """Returns the supported hosts by name."""
    return {host.name: host for host in (WEBUI, FORGE, COMFYUI)}
