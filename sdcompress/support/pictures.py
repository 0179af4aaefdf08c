"""Pictures as bytes and as files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image


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
