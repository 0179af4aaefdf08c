"""The UNet of a WebUI, run by sdcompress's engines.

`engine_folders` finds the engines, `menu` groups them, `calls` chooses the one that serves a call, `unet` runs it, and
`fallback` runs the same weights in torch. These modules do not depend on a host. `a1111`, `forge` and `pages` connect
them to one.
"""
