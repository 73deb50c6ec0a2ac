"""Bytes of JPEG, PNG and WebP -> sRGB pixels. Images that are too large are refused before they are decoded.

Without torch, because `decoder_process` runs it in small processes of their own.
"""

from __future__ import annotations

import io
from typing import NamedTuple

# All plugins that a request can need are imported here: an import during a request takes time and file descriptors.
from PIL import Image, ImageCms, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from gramophone_server.config import DECODER_BYTES, DECODING_BYTES_PER_PIXEL, Limits, env_variable
from gramophone_server.domain.picture_size import MIN_SIDE, style_size
from gramophone_server.images import dimensions, metadata_stripping
from gramophone_server.images.containers import UnusableImage
from gramophone_server.images.metadata_stripping import MAX_PROFILE_BYTES
from gramophone_server.images.shortages import Shortage, shortage_behind

__all__ = ["BYTES_PER_PIXEL", "Header", "Pixels", "decode", "read_header", "upright_size"]

assert JpegImagePlugin and TiffImagePlugin and WebPImagePlugin  # TIFF is the format of EXIF
Image.preinit()

# Pillow's own pixel limit only warns up to twice its value. `read_header` applies the server's limit instead.
Image.MAX_IMAGE_PIXELS = None
# Bytes that Pillow inflates of a PNG's profile, which `metadata_stripping` checks, and of its texts, which it removes.
PngImagePlugin.MAX_TEXT_MEMORY = PngImagePlugin.MAX_TEXT_CHUNK = MAX_PROFILE_BYTES

BYTES_PER_PIXEL = 3  # of a decoded image
MAX_PROFILE_TAGS = 100  # LittleCMS refuses profiles with more
CONVERSION_BYTES = 2**24  # for the tables of a conversion between colour profiles; measured: 3 MB
TABLES_BYTES = 2**23  # of a decoder, at any image size
PROFILE_COPIES = 6  # of a colour profile, by Pillow and LittleCMS; measured: 4 to 6
MOST_INFLATED = 1032  # bytes that deflate can make of one
# Bytes of tables that libwebp builds for each byte of a lossless file: 1,200 measured, with a code for every block.
WEBP_TABLES = 2048
# Bytes of these tables, as they are counted, that take as long as a pixel. With 512 MiB an image of a megapixel took
# 0.44 s: as long as a PNG of 32 megapixels.
TABLES_OF_A_PIXEL = 16
JPEG_SCALES = (8, 4, 2, 1)  # by which libjpeg can reduce while it decodes


class Header(NamedTuple):
    """What is known of an image before it is decoded."""

    format: str  # "JPEG", "PNG" or "WEBP"
    width: int  # in pixels, before EXIF orientation
    height: int
    file_bytes: int
    has_tables: bool = False  # a WebP that is lossless, or may have lossless transparency

    @property
    def pixels(self) -> int:
        """The number of pixels before any reduction."""
        return self.width * self.height

    @property
    def work(self) -> int:
        """How long it takes to decode, in pixels. A byte of the file counts as one: a JPEG takes 10 ms for a megapixel
        and 12 ms for a megabyte. The tables of a lossless WebP count for what they may take, at most 34 megapixels."""
        return self.pixels + self.file_bytes + self.tables_bytes // TABLES_OF_A_PIXEL

    @property
    def tables_bytes(self) -> int:
        """Upper bound of the tables of codes that libwebp builds while it decodes; more do not fit into a process."""
        return min(DECODER_BYTES, WEBP_TABLES * self.file_bytes) if self.has_tables else 0

    @property
    def decoding_bytes(self) -> int:
        """Upper bound of the memory that `decode` takes at any time, besides the file itself."""
        profile = min(MAX_PROFILE_BYTES, MOST_INFLATED * self.file_bytes) if self.format == "PNG" else self.file_bytes
        tables = max(TABLES_BYTES + PROFILE_COPIES * profile, self.tables_bytes)  # one after the other
        return DECODING_BYTES_PER_PIXEL * self.pixels + tables

    def decoded_bytes(self, needed: int) -> int:
        """The bytes of the picture that `decode` makes of it."""
        width, height = _decoded_size(self, needed)
        return width * height * BYTES_PER_PIXEL


class Pixels(NamedTuple):
    """A decoded picture."""

    width: int
    height: int
    planes: tuple[bytes, bytes, bytes]  # red, green and blue, each [height, width]


def read_header(data: bytes, limits: Limits) -> Header:
    """The format and size of an image. Takes microseconds, and at most 3 ms for a file made to take long.

    Raises `UnusableImage` if `decode` would do so because of the header.
    """
    if len(data) > limits.max_image_bytes:
        raise UnusableImage(
            f"has {len(data)} bytes; at most {limits.max_image_bytes} are allowed "
            f"(server setting {env_variable('max_image_bytes')}); send a smaller or more compressed image"
        )
    image_format = _format(data)
    if image_format is None:
        raise UnusableImage(_other_format(data))
    size = dimensions.size(data)
    if size is None:
        raise UnusableImage(_damaged(image_format))
    has_tables = image_format == "WEBP" and data[12:16] != b"VP8 "
    header = Header(image_format, *size, len(data), has_tables)
    if header.pixels > limits.max_image_pixels:
        raise UnusableImage(
            f"is {header.width}x{header.height}, {header.pixels} pixels; at most {limits.max_image_pixels} are allowed "
            f"(server setting {env_variable('max_image_pixels')}); send a smaller image"
        )
    if min(size) < MIN_SIDE:
        raise UnusableImage(
            f"is {header.width}x{header.height}; each side must have at least {MIN_SIDE} pixels; enlarge or pad it"
        )
    return header


def upright_size(data: bytes, header: Header) -> tuple[int, int]:
    """(width, height) in pixels of an image, after EXIF orientation, without decoding it. Raises `UnusableImage` for
    what a walk through the file shows."""
    surveyed = metadata_stripping.survey(data)
    _require_one_frame(surveyed.frames)
    return (header.height, header.width) if surveyed.orientation in SWAPS_SIDES else (header.width, header.height)


def decode(data: bytes, limits: Limits, needed: int) -> Pixels:
    """The picture in ``data`` as sRGB.

    EXIF orientation is applied, an embedded colour profile is converted to sRGB, transparency becomes white. A picture
    that is larger than ``needed``, in pixels of the longest side, is reduced by a whole factor to a longest side of at
    least ``needed``. One that is so thin that its shorter side would then have less than `MIN_SIDE` pixels is reduced
    to ``needed`` x `MIN_SIDE`, the size at which a style is used. So a decoded picture has at most 4 needed^2 pixels.

    Raises `UnusableImage` if the file cannot be used, and `Shortage` if the server is what lacks something.
    """
    header = read_header(data, limits)
    try:
        return _decode(data, header, needed)
    except (UnusableImage, Shortage):
        raise
    except Exception as error:  # noqa: BLE001
        # For damaged data Pillow raises OSError, SyntaxError, ValueError, struct.error and others; some of them also if
        # memory runs out. Their texts describe Pillow's internals and are not passed on.
        shortage = shortage_behind(error, header.decoding_bytes)
        if shortage is not None:
            raise Shortage(shortage) from None
        raise UnusableImage(_damaged(header.format)) from None


def _decode(data: bytes, header: Header, needed: int) -> Pixels:
    stripped = metadata_stripping.strip(data)
    _require_one_frame(stripped.frames)
    image = Image.open(io.BytesIO(stripped.data), formats=(header.format,))
    with image:
        if image.size != (header.width, header.height):  # two sizes; the first was checked against the limits
            raise UnusableImage(_damaged(header.format))
        if header.format == "JPEG":
            image.draft(None, _used_size(header, needed))  # decodes at 1/2, 1/4 or 1/8 if that is enough
        image.load()
        reduced = _reduced(_plain(image), needed)
        if reduced is image:
            reduced = image.copy()
        profile = image.info.get("icc_profile")
    del image  # a WebP image holds 16 bytes per pixel
    rgb = _to_srgb(_oriented(reduced, stripped.orientation), profile)
    red, green, blue = (band.tobytes() for band in rgb.split())
    return Pixels(rgb.width, rgb.height, (red, green, blue))


def _require_one_frame(frames: int) -> None:
    if frames > 1:
        raise UnusableImage(f"is an animation of {frames} pictures; send a single picture")


def _damaged(image_format: str) -> str:
    return f"is a {image_format} image that is truncated or damaged; send the whole file again"


def _format(data: bytes) -> str | None:
    """The format, from the first bytes; None for any other one."""
    for offset, magic, image_format in ((0, b"\xff\xd8\xff", "JPEG"), (0, b"\x89PNG", "PNG"), (8, b"WEBP", "WEBP")):
        if data.startswith(magic, offset):
            return image_format
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


def _used_size(header: Header, needed: int) -> tuple[int, int]:
    """The largest size at which a job uses the image."""
    return style_size(header.width, header.height, needed, 1.0)


def _decoded_size(header: Header, needed: int) -> tuple[int, int]:
    """(width, height) of the picture that `decode` makes, before EXIF orientation."""
    size = header.width, header.height
    if header.format == "JPEG":
        used = _used_size(header, needed)
        possible = min(size[0] // used[0], size[1] // used[1])
        scale = next((scale for scale in JPEG_SCALES if possible >= scale), 1)
        size = -(-size[0] // scale), -(-size[1] // scale)
    factor, thin_size = _reduction(*size, needed)
    return thin_size or (-(-size[0] // factor), -(-size[1] // factor))


def _reduction(width: int, height: int, needed: int) -> tuple[int, tuple[int, int] | None]:
    """The factor by which a picture is reduced; for a thin one, the size instead."""
    longest = max(width, height)
    if longest > needed and min(width, height) * needed < MIN_SIDE * longest:
        return 1, (needed, MIN_SIDE) if width > height else (MIN_SIDE, needed)
    return max(1, longest // needed), None


def _reduced(image: Image.Image, needed: int) -> Image.Image:
    factor, thin_size = _reduction(*image.size, needed)
    if thin_size is not None:
        return image.resize(thin_size, Image.Resampling.BOX)
    return image.reduce(factor) if factor > 1 else image


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
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        shortage = shortage_behind(error, CONVERSION_BYTES)
        if shortage is not None:
            raise Shortage(shortage) from None
        return image.convert("RGB")  # the profile is damaged, or for another colour space than the picture's
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
