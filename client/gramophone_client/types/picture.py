"""Encoded pictures, the recipe metadata inside them, and writing them to disk."""

from __future__ import annotations

import io
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import ExifTags, Image, PngImagePlugin

__all__ = ["Format", "Picture", "format_of", "metadata_of", "write_atomically"]

Format = Literal["jpeg", "png", "webp"]

SUFFIXES: dict[str, Format] = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
# The metadata is the PNG text chunk with this key; in JPEG and WebP the EXIF ImageDescription, with this as Software.
METADATA_KEY = "gramophone"


def format_of(path: str | os.PathLike[str]) -> Format:
    """The picture format of a file name, by its suffix. Raises ValueError for any other suffix."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{os.fspath(path)}: the name must end in {', '.join(SUFFIXES)}, got {suffix or 'no suffix'!r}"
        )
    return SUFFIXES[suffix]


@dataclass(frozen=True)
class Picture:
    """An encoded picture."""

    format: Format
    width: int  # pixels
    height: int
    data: bytes = field(repr=False)

    def image(self) -> Image.Image:
        """The decoded picture."""
        image = Image.open(io.BytesIO(self.data))
        image.load()
        return image

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture atomically, replacing an existing file.

        If the suffix is that of another format, the picture is encoded again (quality 95) and keeps its metadata.
        """
        wanted = format_of(path)
        write_atomically(path, self.data if wanted == self.format else self._encoded_as(wanted))

    # Notebooks show a value by the methods `_repr_png_` and `_repr_jpeg_`; one that returns None is left out.

    def _repr_png_(self) -> bytes | None:
        if self.format == "jpeg":
            return None
        return self.data if self.format == "png" else self._encoded_as("png")

    def _repr_jpeg_(self) -> bytes | None:
        return self.data if self.format == "jpeg" else None

    def _encoded_as(self, wanted: Format) -> bytes:
        out, image = io.BytesIO(), self.image()
        text, exif = PngImagePlugin.PngInfo(), Image.Exif()
        if metadata := metadata_of(image):
            text.add_text(METADATA_KEY, metadata)
            exif[ExifTags.Base.ImageDescription] = metadata
            exif[ExifTags.Base.Software] = METADATA_KEY
        image.save(out, wanted, quality=95, exif=exif, pnginfo=text)
        return out.getvalue()


def metadata_of(image: Image.Image) -> str:
    """The JSON text about its recipe that the server wrote into a picture; "" if there is none."""
    exif = image.getexif()
    in_exif = exif.get(ExifTags.Base.ImageDescription) if exif.get(ExifTags.Base.Software) == METADATA_KEY else ""
    return str(image.info.get(METADATA_KEY) or in_exif or "")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file atomically: into a temporary file in the same folder, which is then renamed to `path`.

    Raises OSError with `path` as its `filename`, which the system leaves out when the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = os.fspath(path), None
        raise
