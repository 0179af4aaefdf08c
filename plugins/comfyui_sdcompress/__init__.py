"""ComfyUI custom node: a UNet engine made by sdcompress, as a MODEL.

`sdcompress install comfyui PATH ENGINE` puts this folder into `custom_nodes`, a copy of `sdcompress_engines` inside it,
and the engines into `models/sdcompress`. Besides torch and numpy, which ComfyUI has, it needs the runtime of its
engines and nothing else.
"""

from .node import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
