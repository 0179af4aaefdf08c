"""Pictures as bytes and as files; those of others are checked before they go into a page or to the hub."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.files import check_regular, write_atomically

if TYPE_CHECKING:
    from PIL import Image

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


def encode_picture(picture: Image.Image, suffix: str, **options: Any) -> bytes:
    """Returns a picture as the content of a file.

    Args:
        picture: in a mode that the format has.
        suffix: of the file's name, such as `.png`; it chooses the format.
        options: Pillow's, of the format.
    """
    from PIL import Image

    buffer = io.BytesIO()
    picture.save(buffer, Image.registered_extensions()[suffix.lower()], **options)
    return buffer.getvalue()


def save_picture(picture: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture by `write_atomically`. Pillow's own writer would hide why a write failed.

    Args:
        picture, options: see `encode_picture`.
        path: the file; its folder is there.

    Raises:
        OSError: no space, no permission, or the file is in use.
    """
    write_atomically(path, encode_picture(picture, path.suffix, **options))
