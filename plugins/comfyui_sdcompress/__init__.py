"""ComfyUI custom node: a UNet engine built by sdcompress, as a MODEL.

`sdcompress install comfyui PATH ENGINE` puts this folder into `custom_nodes`, a copy of `sdcompress_engines` inside it,
and the engines into `models/sdcompress`. It needs torch and numpy, which ComfyUI has, and the runtime of its engines.
"""

from .node import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
