"""The bytes of what a caller gives: images of every form that `ImageInput` names, and files.

Functions raise `MisfitError` with a text that follows the name of the argument: what fits, and what came. They raise
OSError if a file cannot be read.
"""

from __future__ import annotations

import ctypes
import inspect
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from gramophone.values import MisfitError, shown
from gramophone_client.types.options import UploadedImage
from gramophone_client.types.picture import Picture
from gramophone_client.types.updates import Frame, Result

__all__ = ["check_file", "check_image", "file_bytes", "image_bytes"]

FITS = "must be an image: a path, the bytes of a file, an open binary file, a uint8 array, a PIL image or an upload"
ARRAY_FITS = "must be a uint8 array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels
PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}
URL = re.compile(r"(?:[a-z][a-z0-9+.-]+://|data:)", re.IGNORECASE)
MAX_PATH = 4096  # characters; no longer path can be opened
DTYPES = {"b": "bool", "u": "uint", "i": "int", "f": "float", "c": "complex"}  # by the kind of a typestr


def check_image(image: Any) -> None:
    """Raises `MisfitError` if the value cannot be an image. Reads nothing."""
    if isinstance(image, UploadedImage):
        return
    if isinstance(image, Image.Image):
        if not (image.width and image.height):
            raise MisfitError(f"must have pixels, got a PIL image of {image.width}x{image.height}")
        if image.mode in ("I", "F"):  # PIL itself would clip their values to 255
            hint = "if its values are 0 to 255, convert it: image.convert('L')"
            raise MisfitError(f"must be a PIL image of 8 or 16 bits, got one of mode {image.mode}; {hint}")
    elif hasattr(image, "__array_interface__") and not isinstance(image, type):
        _check_array(image)
    else:
        hint = ""
        if type(image).__module__.partition(".")[0] == "torch":
            hint = _tensor_conversion(image)
        elif hasattr(image, "__array__"):
            hint = "; convert it: numpy.asarray(...)"
        elif isinstance(image, Picture | Frame | Result):
            hint = f"; give its {'data' if isinstance(image, Picture) else 'picture.data'}"
        elif isinstance(image, list | tuple):
            hint = "; give one image"
        check_file(image, FITS, hint)


def image_bytes(image: Any) -> bytes:
    """The bytes of an image file. PIL images and arrays become PNG; a file is read from its current position."""
    check_image(image)
    if isinstance(image, UploadedImage):
        return image.data
    if isinstance(image, Image.Image):
        return _as_png(image)
    if hasattr(image, "__array_interface__"):
        return _as_png(_array_image(image))
    return file_bytes(image)


def check_file(source: Any, fits: str, hint: str = "") -> None:
    """Raises `MisfitError` if the value is not a path, bytes, or an open binary file. Reads nothing.

    `fits` states what the value must be, and `hint` what to do.
    """
    if isinstance(source, str | os.PathLike):
        if isinstance(source, str) and URL.match(source):
            raise MisfitError(f"must be a path, got the URL {shown(source)}; download it, and give the bytes")
        if len(os.fspath(source)) > MAX_PATH:
            raise MisfitError(f"must be a path, got a text of {len(os.fspath(source))} characters; decode base64 first")
        if os.path.isdir(source):
            raise MisfitError(f"must be a file, got the folder {os.fsdecode(source)!r}")
        if not os.fspath(source):
            raise MisfitError("must be the path of a file, got ''")
        if "\0" in os.fsdecode(source):
            raise MisfitError(f"must be a path, got one with a NUL character, {shown(os.fsdecode(source))}")
    elif isinstance(source, bytes | bytearray | memoryview):
        try:
            if isinstance(source, memoryview) and source.ndim != 1:
                raise MisfitError(f"must be the bytes of a file, got {shown(source)}; give the array itself")
            if not len(source):
                raise MisfitError("must be the bytes of a file, got 0 bytes")
        except ValueError as error:
            if isinstance(error, MisfitError):
                raise
            raise MisfitError("must be the bytes of a file, got a memoryview that was released") from None
    elif not callable(read := getattr(source, "read", None)) or isinstance(source, type):
        raise MisfitError(f"{fits}, got {shown(source)}{hint}")
    elif isinstance(source, io.TextIOBase):
        raise MisfitError(f"must be a binary file, got {shown(source)}; open it with mode 'rb'")
    elif inspect.iscoroutinefunction(read):
        raise MisfitError(f"must be a binary file, got an asynchronous one, {shown(source)}; give `await file.read()`")


def file_bytes(source: Any) -> bytes:
    """The bytes of a path, of bytes, or of an open binary file from its current position on."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        try:
            data = Path(os.fsdecode(source)).read_bytes()
        except UnicodeError:  # half of a character, as of damaged JSON
            raise MisfitError(f"must be a path, got {os.fsdecode(source)!a}, which is not Unicode") from None
        if not data:
            raise MisfitError(f"must be a file with contents, got the empty file {os.fsdecode(source)!r}")
        return data
    try:
        data = source.read()
    except ValueError as error:  # closed, or not open for reading
        raise MisfitError(f"must be a readable file: {error}") from None
    except OSError:
        raise
    except Exception as error:  # of another kind of file, as zipfile.ZipFile; a StopIteration would stop asyncio
        raise MisfitError(f"must be a readable file, got {shown(source)}: {type(error).__name__}: {error}") from error
    if data is None:
        raise MisfitError(f"must be a file that waits for its bytes, got a non-blocking one, {shown(source)}")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise MisfitError(f"must be a binary file, got one whose read() returns {shown(data)}; open it with mode 'rb'")
    if not len(data):
        at = _position(source)
        hint = f"; it is at its end, byte {at}: call seek(0) first" if at else ""
        raise MisfitError(f"must be a file with contents, got {shown(source)} without any{hint}")
    return bytes(data)


def _position(file: Any) -> int:
    """The position of a file; 0 if it has none."""
    tell: Callable[[], int] | None = getattr(file, "tell", None)
    try:
        return tell() if tell is not None else 0
    except OSError:  # a pipe or a socket
        return 0


def _check_array(array: Any) -> None:
    try:
        interface = array.__array_interface__
        shape, kind = tuple(interface["shape"]), interface["typestr"][1:]
        if min(shape, default=0) < 0:
            raise ValueError(f"negative sides, {shape}")
    except (KeyError, TypeError, ValueError) as error:
        raise MisfitError(f"{ARRAY_FITS}, got {shown(array)}, whose __array_interface__ is not one: {error}") from None
    if hasattr(array, "filled") and getattr(array, "mask", None) is not None and array.mask.any():
        raise MisfitError("must be an array without a mask, got a masked one; convert it: array.filled(0)")
    if kind == "u1" and len(shape) in (2, 3) and all(shape) and (len(shape) == 2 or shape[2] in MODES):
        return
    dtype = DTYPES.get(kind[0], kind)
    if kind[0] in "uifc":
        dtype += str(8 * int(kind[1:]))
    raise MisfitError(f"{ARRAY_FITS}, got {dtype} of shape {shape}{_conversion(shape, kind)}")


def _tensor_conversion(tensor: Any) -> str:
    """The same as `_conversion`, for a tensor of torch."""
    if not hasattr(tensor, "shape"):
        return ""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if "float" in dtype:  # numpy has no bfloat16
        return _conversion(tuple(tensor.shape), "f4", "tensor.detach().float().cpu().numpy()")
    kind = {"uint8": "u1", "bool": "b1"}.get(dtype, "i8")
    return _conversion(tuple(tensor.shape), kind, "tensor.cpu().numpy()")


def _conversion(shape: tuple[int, ...], kind: str, pixels: str = "array") -> str:
    """The end of an error with the expression that makes an image of an array; "" if none is known to.

    `pixels` is how the array is written there.
    """
    if kind == "u1" and len(shape) == 1 and shape[0]:
        return f"; if these are the bytes of an image file, give {pixels}.tobytes()"
    if len(shape) == 4 and shape[0] == 1:
        pixels, shape = f"{pixels}[0]", shape[1:]
    if len(shape) == 3 and shape[2] not in MODES and shape[0] in MODES:
        pixels, shape = f"{pixels}.transpose(1, 2, 0)", (*shape[1:], shape[0])
    if not all(shape) or len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in MODES):
        return ""
    match kind:
        case "u1":
            return f"; convert it: {pixels}"
        case "b1":
            return f"; convert it: {pixels}.astype('uint8') * 255"
        case "u2":
            return f"; convert it: ({pixels} // 257).astype('uint8')"
        case _ if kind[0] == "f":
            return f"; if its values are 0 to 1, convert it: ({pixels}.clip(0, 1) * 255).round().astype('uint8')"
        case _ if kind[0] in "ui":
            return f"; if its values are 0 to 255, convert it: {pixels}.astype('uint8')"
    return ""


def _array_image(array: Any) -> Image.Image:
    interface = array.__array_interface__
    height, width, *channels = interface["shape"]
    mode = MODES[channels[0] if channels else 1]
    return Image.frombytes(mode, (width, height), _array_bytes(array, interface, height * width * len(mode)))


def _array_bytes(array: Any, interface: dict[str, Any], count: int) -> bytes:
    """The bytes of an array in the order of its axes: of its buffer, else of the memory that its interface names."""
    try:
        return memoryview(array).tobytes()
    except TypeError:  # it has no buffer
        pass
    if interface.get("strides") is not None or not isinstance(interface.get("data"), tuple):
        raise MisfitError(f"must have its pixels in one piece, got {shown(array)}; convert it: numpy.array(...)")
    return ctypes.string_at(interface["data"][0], count)


def _as_png(image: Image.Image) -> bytes:
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16") and upright.mode != "I;16":
            upright = upright.convert("I").convert("I;16")  # directly to RGB, PIL would clip the values to 255
        if upright.mode not in PNG_MODES:
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        out = io.BytesIO()
        upright.save(out, "png", compress_level=1)  # level 6 takes four times as long for a tenth less
    except (OSError, SyntaxError, ValueError) as error:  # its file or its EXIF is damaged, or it is closed
        raise MisfitError(f"must be an image that PIL can read: {error}") from error
    return out.getvalue()
