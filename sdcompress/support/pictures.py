"""Picture files that a person or an artifact names, before they go into a page or to the hub."""

from __future__ import annotations

from pathlib import Path

from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.files import check_regular

_MOST_MIB = 64
_SIGNATURES = {
    "image/png": (0, b"\x89PNG\r\n\x1a\n"),
    "image/jpeg": (0, b"\xff\xd8\xff"),
    "image/webp": (8, b"WEBP"),
}
"""Media type → where its signature is in the file, and the signature."""


def read_picture(path: Path) -> tuple[bytes, str]:
    """Returns a picture file's bytes and its media type, as its first bytes say.

    Raises:
        ArtifactError: there is no such file, or it is too large or no PNG, JPEG or WebP.
    """
    try:
        check_regular(path)
        size = path.stat().st_size
        if size > _MOST_MIB * 2**20:
            raise ArtifactError(f"has {size / 2**20:,.0f} MiB", where=path, expected=f"at most {_MOST_MIB} MiB")
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"the picture cannot be read ({error.strerror or error})", where=path, expected="a picture"
        ) from error
    for media_type, (start, signature) in _SIGNATURES.items():
        if content[start : start + len(signature)] == signature:
            return content, media_type
    raise ArtifactError("is no picture", where=path, expected="a PNG, JPEG or WebP file")
