"""Bytes of JPEG, PNG and WebP <-> uint8 RGB tensors. Images that are too large are refused before they are decoded."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from PIL import ExifTags, Image, ImageCms, PngImagePlugin
from torch import Tensor

from gramophone.recipe import Violation
from gramophone_server.config import Limits, env_variable
from gramophone_server.domain.picture_size import MIN_SIDE, fit
from gramophone_server.errors import InvalidRequest
from gramophone_server.images import dimensions, metadata_stripping
from gramophone_server.images.metadata_stripping import UnusableImage

T = TypeVar("T")

__all__ = ["METADATA_KEY", "Encoded", "Encoding", "Format", "decode", "encode", "size"]

# The key of a picture's recipe: the name of a PNG text chunk. JPEG and WebP have the text in the EXIF field
# ImageDescription, and this name in the EXIF field Software.
METADATA_KEY = "gramophone"

# Pillow's own pixel limit only warns up to twice its value. `_require_size` applies the server's limit to the size in
# the header instead.
Image.MAX_IMAGE_PIXELS = None
# Bytes of texts that Pillow inflates for one PNG. `metadata_stripping` removes all texts; this is a second safeguard.
PngImagePlugin.MAX_TEXT_MEMORY = PngImagePlugin.MAX_TEXT_CHUNK = 2**20

MAX_PROFILE_TAGS = 100  # LittleCMS refuses profiles with more


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


def decode(data: bytes, field: str, limits: Limits, needed: int) -> Tensor:
    """The picture in `data` as sRGB: uint8 [3, height, width].

    EXIF orientation is applied, an embedded colour profile is converted to sRGB, transparency becomes white. A picture
    that is larger than `needed`, in pixels of the longest side, is reduced by a whole factor to a longest side of at
    least `needed`; this bounds the memory of a waiting job. Raises `InvalidRequest` with a violation of `field`.
    """
    image, orientation = _opened(data, field, limits)
    with image:
        # A thin picture is reduced less, so that its shorter side does not become too small.
        needed = max(needed, -(-MIN_SIDE * max(image.size) // min(image.size)))
        image.draft(None, (fit(*image.size, needed)))  # JPEG only: decodes at 1/2, 1/4 or 1/8 if that is enough
        plain = _attempt(partial(_loaded, image, needed), field, _damaged(image.format))
        profile = image.info.get("icc_profile")
    del image  # a WebP image holds 16 bytes per pixel
    rgb = _to_srgb(_oriented(plain, orientation), profile)
    # `bytearray`, because a tensor must own writable memory.
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous()


def size(data: bytes, field: str, limits: Limits) -> tuple[int, int]:
    """(width, height) in pixels of the picture in `data`, after EXIF orientation, from its header.

    Raises `InvalidRequest` with a violation of `field` if `decode` would do so because of the header.
    """
    image, orientation = _opened(data, field, limits)
    with image:
        width, height = image.size
        return (height, width) if orientation in SWAPS_SIDES else (width, height)


def encode(picture: Tensor, format: Format, quality: int, max_side: int = 0, metadata: str | None = None) -> Encoded:
    """Encodes `picture`, uint8 [height, width, 3] on the CPU.

    `quality` is 1 to 100 for JPEG and WebP; PNG ignores it. A picture whose longest side is above `max_side` pixels is
    reduced to it; 0 means no limit. `metadata` is ASCII text for the file, see `METADATA_KEY`.
    """
    assert picture.dtype == torch.uint8 and picture.device.type == "cpu" and picture.is_contiguous()
    height, width, _ = picture.shape
    # Without numpy, which torch does not need. `frombytes` copies, and `picture` is valid until then.
    image = Image.frombytes("RGB", (width, height), ctypes.string_at(picture.data_ptr(), picture.numel()))
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


def _opened(data: bytes, field: str, limits: Limits) -> tuple[Image.Image, int]:
    """The picture with only its header read, and its EXIF orientation. Raises `InvalidRequest`."""
    if len(data) > limits.max_image_bytes:
        raise _refusal(
            field,
            f"has {len(data)} bytes; at most {limits.max_image_bytes} are allowed "
            f"(server setting {env_variable('max_image_bytes')}); send a smaller or more compressed image",
        )
    header_size = dimensions.size(data)
    if header_size is not None:  # before Pillow opens it, because that allocates the canvas of a WebP
        _require_size(*header_size, field, limits)
    try:
        stripped = metadata_stripping.strip(data)
    except UnusableImage as error:
        raise _refusal(field, str(error) if _format(data) else _other_format(data)) from None
    if stripped.frames > 1:
        raise _refusal(field, f"is an animation of {stripped.frames} pictures; send a single picture")
    damaged = _damaged(_format(data))
    image = _attempt(lambda: Image.open(io.BytesIO(stripped.data), formats=tuple(Format)), field, damaged)
    _require_size(*image.size, field, limits)
    return image, stripped.orientation


def _refusal(field: str, description: str) -> InvalidRequest:
    return InvalidRequest([Violation(field, description)])


def _attempt(step: Callable[[], T], field: str, description: str) -> T:
    """Returns what `step` returns; raises `InvalidRequest` if it fails. For damaged data Pillow raises OSError,
    SyntaxError, ValueError, struct.error and others. Their texts describe Pillow's internals and are not passed on."""
    try:
        return step()
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001
        raise _refusal(field, description) from None


def _damaged(format: str | None) -> str:
    return f"is a {format} image that is truncated or damaged; send the whole file again"


def _format(data: bytes) -> Format | None:
    """The format, from the first bytes; None for any other one."""
    for offset, magic, format in (
        (0, b"\xff\xd8\xff", Format.JPEG),
        (0, b"\x89PNG", Format.PNG),
        (8, b"WEBP", Format.WEBP),
    ):
        if data.startswith(magic, offset):
            return format
    return None


def _other_format(data: bytes) -> str:
    """The violation for data in another format, which is guessed from the first bytes."""
    got = f"{len(data)} bytes of something else"
    for start, name in ((b"GIF8", "GIF"), (b"BM", "BMP"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"%PDF", "PDF")):
        if data.startswith(start):
            got = f"what looks like a {name} file"
    if data[4:8] == b"ftyp":
        got = "what looks like a HEIC, AVIF or video file"
    return f"must be a JPEG, PNG or WebP image, got {got}; convert it first"


def _require_size(width: int, height: int, field: str, limits: Limits) -> None:
    """Raises `InvalidRequest` for a size in the header that is too large or too small."""
    if width * height > limits.max_image_pixels:
        raise _refusal(
            field,
            f"is {width}x{height}, {width * height} pixels; at most {limits.max_image_pixels} are allowed "
            f"(server setting {env_variable('max_image_pixels')}); send a smaller image",
        )
    if min(width, height) < MIN_SIDE:
        raise _refusal(field, f"is {width}x{height}; each side must have at least {MIN_SIDE} pixels")


def _loaded(image: Image.Image, needed: int) -> Image.Image:
    """A new image in a mode that `_plain` returns, reduced by `_reduced`. An image that loads may still be damaged, for
    example lack its palette, so both steps may raise any exception."""
    image.load()
    plain = _reduced(_plain(image), needed)
    return image.copy() if plain is image else plain


def _plain(image: Image.Image) -> Image.Image:
    """The picture in one of the modes L, LA, RGB, RGBA and CMYK, which can be reduced and colour-managed."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        # Every other byte is the high one. Pillow's own conversion to 8 bits clips at 255, so all but black becomes
        # white.
        high = image.tobytes()[image.mode != "I;16B" :: 2]
        image = Image.frombytes("L", image.size, high)
        if transparent is not None:
            image.info["transparency"] = transparent >> 8
    elif image.mode == "RGB" and transparent is not None and max(transparent) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in transparent)  # 16-bit key, 8-bit pixels
    if image.has_transparency_data:
        return image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _reduced(image: Image.Image, needed: int) -> Image.Image:
    factor = max(image.size) // needed
    return image.reduce(factor) if factor > 1 else image


TRANSPOSITIONS = {  # by EXIF orientation; 1 needs none
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = frozenset({5, 6, 7, 8})  # orientations that swap width and height


def _oriented(image: Image.Image, orientation: int) -> Image.Image:
    transposition = TRANSPOSITIONS.get(orientation)
    return image if transposition is None else image.transpose(transposition)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image.convert(image.mode.removesuffix("A")) if alpha is not None else image
    rgb = _converted(colours, profile) if profile else colours.convert("RGB")
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _converted(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(_bounded(profile)))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # damaged, or for another colour space than the picture's
        return image.convert("RGB")
    return image.convert("RGB") if converted is None else converted


def _bounded(profile: bytes) -> bytes:
    """The profile without its tags D2B0 to D2B3, so that A2B0 or the primaries apply, as for every reader that does not
    know these tags. The tags are programs of any length, which LittleCMS runs 36,000 times before the first pixel:
    3,000 steps in 24 KB took 5 s."""
    tags = min(int.from_bytes(profile[128:132]), MAX_PROFILE_TAGS)
    bounded = bytearray(profile)
    for offset in range(132, min(132 + 12 * tags, len(profile)), 12):
        if profile.startswith(b"D2B", offset):
            bounded[offset : offset + 4] = bytes(4)
    return bytes(bounded)
