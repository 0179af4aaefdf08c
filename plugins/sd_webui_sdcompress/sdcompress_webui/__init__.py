"""A WebUI's UNet out of sdcompress's engines: which there are, which serves a call, and what happens where none does.

`library`, `calls`, `unet`, `torch_unet`, `weights` and `panel` know of no host; `a1111`, `forge` and `pages` are what
they are to one.
"""
