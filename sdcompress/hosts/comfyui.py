"""ComfyUI: a custom node, and engines in a model folder of their own."""

from __future__ import annotations

from sdcompress.hosts.host import Host

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
