"""Pictures <-> encoded images, as tensors, in this process."""

from __future__ import annotations

import io
from enum import StrEnum
from typing import NamedTuple

import torch
from PIL import ExifTags, Image, PngImagePlugin
from torch import Tensor

from gramophone_server.config import Limits
from gramophone_server.domain.byte_copies import memory_of
from gramophone_server.domain.picture_size import fit
from gramophone_server.images import decoding
from gramophone_server.images.shortages import Shortage, shortage_behind

__all__ = ["METADATA_KEY", "Encoded", "Encoding", "Format", "decode", "encode"]

# The key of a picture's recipe: the name of a PNG text chunk. JPEG and WebP have the text in the EXIF field
# ImageDescription, and this name in the EXIF field Software.
METADATA_KEY = "gramophone"
ENCODING_BYTES_PER_PIXEL = 12  # while a picture is encoded: its copy, a reduced one, and what the encoder needs


class Format(StrEnum):
    """A format of encoded pictures, with Pillow's name."""

    JPEG = "JPEG"
    PNG = "PNG"
    WEBP = "WEBP"


class Encoding(NamedTuple):
    """Options of `encode`."""

    format: Format
    quality: int  # of JPEG and WebP, 1 to 100
    max_side: int = 0  # pixels; 0: no limit


class Encoded(NamedTuple):
    """An encoded picture and its size in pixels."""

    format: Format
    width: int
    height: int
    data: bytes


def decode(data: bytes, limits: Limits, needed: int) -> Tensor:
    """The picture in ``data`` as sRGB, uint8 [3, height, width]. See `decoding.decode`."""
    width, height, planes = decoding.decode(data, limits, needed)
    # `bytearray`, because a tensor must own writable memory.
    return torch.frombuffer(bytearray().join(planes), dtype=torch.uint8).view(3, height, width)


def encode(picture: Tensor, format: Format, quality: int, max_side: int = 0, metadata: str | None = None) -> Encoded:
    """Encodes `picture`, uint8 [height, width, 3] on the CPU.

    `quality` is 1 to 100 for JPEG and WebP; PNG ignores it. A picture whose longest side is above `max_side` pixels is
    reduced to it; 0 means no limit. `metadata` is ASCII text for the file, see `METADATA_KEY`. Raises `Shortage`.
    """
    assert picture.dtype == torch.uint8 and picture.device.type == "cpu" and picture.is_contiguous()
    try:
        return _encode(picture, format, quality, max_side, metadata)
    except Exception as error:
        # An encoder reports memory that it cannot get as an error like any other.
        shortage = shortage_behind(error, ENCODING_BYTES_PER_PIXEL * picture.numel() // 3)
        if shortage is not None:
            raise Shortage(shortage) from error
        raise


def _encode(picture: Tensor, format: Format, quality: int, max_side: int, metadata: str | None) -> Encoded:
    height, width, _ = picture.shape
    image = Image.frombytes("RGB", (width, height), memory_of(picture))  # copies it, without the interpreter's lock
    if 0 < max_side < max(width, height):
        image = image.resize(fit(width, height, max_side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    out = io.BytesIO()
    if format is Format.PNG:
        text = PngImagePlugin.PngInfo()
        if metadata is not None:
            text.add_text(METADATA_KEY, metadata)
        image.save(out, "PNG", compress_level=1, pnginfo=text)  # level 6 takes 4 times as long for 1 % at 1024 px
    else:
        exif = Image.Exif()
        if metadata is not None:
            exif[ExifTags.Base.ImageDescription] = metadata
            exif[ExifTags.Base.Software] = METADATA_KEY
        # `method` is WebP's effort: 0 takes 78 ms at 1024 px. JPEG ignores it.
        image.save(out, format.value, quality=quality, method=0, exif=exif)
    return Encoded(format, image.width, image.height, out.getvalue())
