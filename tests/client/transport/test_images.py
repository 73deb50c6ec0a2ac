"""Images of every form. The reference is the picture itself, as PIL decodes it."""

import gzip
import io
import os
import re
import socket
import tempfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gramophone.values import MisfitError
from gramophone_client import Frame, Picture, UploadedImage
from gramophone_client.transport.images import check_image, image_bytes
from tests.support.fake_service import PHOTO

RNG = np.random.default_rng(5)
FILE_FORMS = (
    "bytes",
    "bytearray",
    "memoryview",
    "str",
    "path",
    "BytesIO",
    "open",
    "temporary",
    "spooled",
    "gzip",
    "zip",
)


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def file_of(form, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(PHOTO)
    match form:
        case "str":
            return str(path)
        case "path":
            return path
        case "bytes" | "bytearray" | "memoryview":
            return {"bytes": bytes, "bytearray": bytearray, "memoryview": memoryview}[form](PHOTO)
        case "BytesIO":
            return io.BytesIO(PHOTO)
        case "open":
            return path.open("rb")
        case "temporary" | "spooled":
            file = tempfile.NamedTemporaryFile() if form == "temporary" else tempfile.SpooledTemporaryFile()  # noqa: SIM115
            file.write(PHOTO)
            file.seek(0)
            return file
        case "gzip":
            path.write_bytes(gzip.compress(PHOTO))
            return gzip.open(path)
        case "zip":
            with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
                archive.writestr("photo.png", PHOTO)
            return zipfile.ZipFile(tmp_path / "photos.zip").open("photo.png")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that are left open
@pytest.mark.parametrize("form", FILE_FORMS)
def test_files_are_sent_as_they_are(form, tmp_path):
    file = file_of(form, tmp_path)
    check_image(file)
    assert image_bytes(file) == PHOTO
    if hasattr(file, "close"):
        file.close()


def test_a_socket_is_read_to_its_end():
    near, far = socket.socketpair()
    with near, far:
        near.sendall(PHOTO)
        near.shutdown(socket.SHUT_WR)
        with far.makefile("rb") as file:
            assert image_bytes(file) == PHOTO


def test_an_open_file_is_read_once_from_its_position():
    file = io.BytesIO(b"header" + PHOTO)
    file.seek(6)
    check_image(file)
    assert file.tell() == 6
    assert image_bytes(file) == PHOTO
    with pytest.raises(MisfitError, match=r"without any; it is at its end, byte \d+: call seek\(0\) first"):
        image_bytes(file)


# Arrays ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(18, 24), (18, 24, 1), (18, 24, 3), (18, 24, 4), (1, 1), (3, 4, 3)])
def test_arrays_keep_their_pixels(shape):
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(decoded(image_bytes(array)), array.squeeze(2) if shape[2:] == (1,) else array)


VIEWS = {
    "upside down": lambda array: array[::-1],
    "every second column": lambda array: array[:, ::2],
    "reversed channels": lambda array: array[::3, 1:, ::-1],
    "turned": lambda array: array.transpose(1, 0, 2),
    "without transparency": lambda array: array[..., :3],
    "one channel": lambda array: array[..., 0],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_arrays_keep_their_pixels(view):
    array = VIEWS[view](RNG.integers(0, 256, (18, 24, 4), dtype=np.uint8))
    assert np.array_equal(decoded(image_bytes(array)), array)


def test_arrays_that_cannot_be_written_keep_their_pixels():
    array = np.frombuffer(bytes(range(240)), np.uint8).reshape(8, 10, 3)
    assert np.array_equal(decoded(image_bytes(array)), array)


class Foreign:
    """An image of a package that has numpy's interface and nothing else."""

    def __init__(self, array):
        self.array = array

    @property
    def __array_interface__(self):
        return self.array.__array_interface__


def test_other_packages_with_the_interface_of_arrays_keep_their_pixels():
    array = RNG.integers(0, 256, (18, 24, 3), dtype=np.uint8)
    assert np.array_equal(decoded(image_bytes(Foreign(array))), array)
    with pytest.raises(MisfitError, match=r"in one piece, got a tests\.Foreign; convert it: numpy\.array"):
        image_bytes(Foreign(array[::2]))


@pytest.mark.parametrize(
    ("array", "what", "hint"),
    [
        (np.zeros((18, 24, 3), np.float32), "float32 of shape (18, 24, 3)", "values are 0 to 1, convert it"),
        (np.zeros((3, 18, 24)), "float64 of shape (3, 18, 24)", "values are 0 to 1, convert it"),
        (np.zeros((3, 18, 24), np.uint8), "uint8 of shape (3, 18, 24)", "; convert it"),
        (np.zeros((1, 18, 24), np.uint8), "uint8 of shape (1, 18, 24)", "; convert it"),
        (np.zeros((1, 18, 24, 3), np.uint8), "uint8 of shape (1, 18, 24, 3)", "; convert it"),
        (np.zeros((1, 3, 18, 24), np.float16), "float16 of shape (1, 3, 18, 24)", "values are 0 to 1, convert it"),
        (np.zeros((18, 24), np.uint16), "uint16 of shape (18, 24)", "; convert it"),
        (np.zeros((18, 24), np.int64), "int64 of shape (18, 24)", "values are 0 to 255, convert it"),
        (np.zeros((18, 24), bool), "bool of shape (18, 24)", "; convert it"),
        (np.zeros((18, 24, 2), np.uint8), "uint8 of shape (18, 24, 2)", None),
        (np.zeros((5, 18, 24, 3), np.uint8), "uint8 of shape (5, 18, 24, 3)", None),
        (np.zeros((0, 24, 3), np.uint8), "uint8 of shape (0, 24, 3)", None),
        (np.zeros((), np.uint8), "uint8 of shape ()", None),
        (np.zeros((18, 24), complex), "complex128 of shape (18, 24)", None),
        (np.zeros((18, 24), "U3"), "U3 of shape (18, 24)", None),
        (np.zeros((18, 24), object), "O of shape (18, 24)", None),
    ],
)
def test_other_arrays_are_refused_with_a_conversion_that_works(array, what, hint):
    with pytest.raises(MisfitError) as raised:
        check_image(array)
    text, _, conversion = str(raised.value).partition("convert it: ")
    fits = "must be a uint8 array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got "
    assert text.startswith(fits + what)
    if hint is None:
        assert text == fits + what
    else:
        assert hint in str(raised.value)
        assert decoded(image_bytes(eval(conversion))).shape[:2] == (18, 24)


def test_the_conversions_keep_what_the_values_mean():
    def converted(array):
        with pytest.raises(MisfitError) as raised:
            check_image(array)
        return eval(str(raised.value).partition("convert it: ")[2])

    array = RNG.integers(0, 256, (18, 24, 3), dtype=np.uint8)
    assert np.array_equal(converted((array / 255).astype(np.float32)), array)
    assert np.array_equal(converted(array.transpose(2, 0, 1)), array)
    assert np.array_equal(converted(array.astype(np.uint16) * 257), array)
    assert np.array_equal(converted(array.astype(int)), array)
    assert np.array_equal(converted(array > 127), (array > 127) * 255)


def test_the_bytes_of_a_file_in_an_array_have_a_hint():
    with pytest.raises(MisfitError, match=r"bytes of an image file, give array\.tobytes\(\)"):
        check_image(np.frombuffer(PHOTO, np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "uint8", "int64"])
@pytest.mark.parametrize("axes", ["HWC", "CHW", "NCHW", "NHWC"])
def test_a_tensor_is_refused_with_a_conversion_that_works(dtype, axes):
    dtype = getattr(torch, dtype)
    array = RNG.integers(0, 256, (18, 24, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1) if "CH" in axes else torch.from_numpy(array)
    tensor = (tensor / 255 if dtype.is_floating_point else tensor).to(dtype)
    tensor = tensor[None] if "N" in axes else tensor
    tensor = tensor.requires_grad_() if dtype.is_floating_point else tensor
    with pytest.raises(MisfitError, match=r"got a torch\.Tensor of shape .*convert it: ") as raised:
        check_image(tensor)
    given = eval(str(raised.value).partition("convert it: ")[2])
    assert np.abs(decoded(image_bytes(given)).astype(int) - array).max() <= (1 if dtype is torch.bfloat16 else 0)


# PIL images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "HSV", "I;16", "I;16B", "YCbCr"])
def test_pil_images_of_every_mode_can_be_sent(mode):
    with Image.open(io.BytesIO(image_bytes(Image.new(mode, (20, 16))))) as image:
        assert (image.format, image.size) == ("PNG", (20, 16))


def test_pil_images_keep_their_pixels():
    array = RNG.integers(0, 256, (18, 24, 3), dtype=np.uint8)
    assert np.array_equal(decoded(image_bytes(Image.fromarray(array))), array)


def test_pil_images_of_16_bits_keep_their_brightness():
    array = np.linspace(0, 65535, 20 * 16, dtype=np.uint16).reshape(16, 20)
    for mode, dtype in (("I;16", "<u2"), ("I;16B", ">u2")):
        data = image_bytes(Image.frombytes(mode, (20, 16), array.astype(dtype).tobytes()))
        assert np.array_equal(decoded(data), array), mode


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pil_images_whose_values_pil_would_clip_are_refused(mode):
    with pytest.raises(MisfitError, match=rf"got one of mode {mode}; if its values .*image\.convert\('L'\)"):
        check_image(Image.new(mode, (20, 16), 300))


def test_pil_images_are_sent_upright():
    turned = Image.new("RGB", (20, 16))
    turned.getexif()[0x0112] = 6  # Orientation: a quarter turn
    with Image.open(io.BytesIO(image_bytes(turned))) as image:
        assert image.size == (16, 20)


def test_pil_images_that_cannot_be_read_are_named():
    with pytest.raises(MisfitError, match="must have pixels, got a PIL image of 0x5"):
        check_image(Image.new("RGB", (0, 5)))
    with pytest.raises(MisfitError, match="must be an image that PIL can read: image file is truncated"):
        image_bytes(Image.open(io.BytesIO(PHOTO[:60])))
    damaged = Image.new("RGB", (20, 16))
    damaged.info["exif"] = b"garbage"
    with pytest.raises(MisfitError, match="must be an image that PIL can read: not a TIFF file"):
        image_bytes(damaged)


# What no program should give ------------------------------------------------------------------------------------------


class Reads:
    """A file whose `read` raises an error."""

    def __init__(self, error):
        self.error = error

    def read(self):
        raise self.error


@pytest.mark.parametrize("error", [StopIteration("x"), TypeError("x"), RuntimeError("x")])
def test_any_error_of_a_file_is_one_of_the_file(error):  # a StopIteration would never leave asyncio's thread
    with pytest.raises(MisfitError, match=rf"readable file, got a tests\.Reads: {type(error).__name__}: x"):
        image_bytes(Reads(error))


def test_files_that_are_no_files_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, pytest.raises(MisfitError, match="got a zipfile"):
        image_bytes(archive)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with open(reader, "rb") as file, pytest.raises(MisfitError, match="waits for its bytes, got a non-blocking one"):
        image_bytes(file)
    os.close(writer)
    released = memoryview(PHOTO)
    released.release()
    with pytest.raises(MisfitError, match="memoryview that was released"):
        image_bytes(released)


@pytest.mark.parametrize(("path", "problem"), [("a\0b", "NUL character, 'a.x00b'"), ("\ud800.jpg", "not Unicode")])
def test_paths_that_no_file_can_have_are_named(path, problem):
    with pytest.raises(MisfitError, match=problem):
        image_bytes(path)


@pytest.mark.parametrize(
    "interface", [{}, "x", {"shape": 4, "typestr": "|u1"}, {"shape": (-4, 4), "typestr": "|u1", "data": (1, True)}]
)
def test_interfaces_that_are_none_are_named(interface):
    with pytest.raises(MisfitError, match="whose __array_interface__ is not one: "):
        check_image(SimpleNamespace(__array_interface__=interface))


def test_masks_are_not_ignored():
    array = RNG.integers(0, 256, (18, 24, 3), dtype=np.uint8)
    with pytest.raises(MisfitError, match=r"got a masked one; convert it: array\.filled\(0\)"):
        check_image(np.ma.array(array, mask=array > 100))
    check_image(np.ma.array(array))


def test_an_upload_has_its_bytes():
    upload = UploadedImage(digest="sha256:0", width=24, height=18, data=PHOTO)
    check_image(upload)
    assert image_bytes(upload) == PHOTO


# What is no image -----------------------------------------------------------------------------------------------------


class AsyncFile:
    async def read(self):
        return PHOTO


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "must be an image: a path, .* or an upload, got None"),
        (3, "must be an image: .*, got 3"),
        (Image, "must be an image: .*, got a module"),
        (io.BytesIO, "must be an image: .*, got the class BytesIO"),
        (np.ndarray, "must be an image: .*, got the class ndarray"),
        (
            memoryview(np.ones((2, 3, 3), np.uint8)),
            r"must be the bytes of a file, got a memoryview of shape \(2, 3, 3\); give the array itself",
        ),
        (np.uint8(5), r"must be a uint8 array of shape .*, got uint8 of shape \(\)"),
        (Picture("png", 24, 18, PHOTO), "must be an image: .*, got a gramophone_client.Picture; give its data"),
        (
            Frame(iteration=1, picture=Picture("png", 24, 18, PHOTO), dropped=0),
            "must be an image: .*, got a gramophone_client.Frame; give its picture.data",
        ),
        ([PHOTO], "must be an image: .*, got a list of 1; give one image"),
        (b"", "must be the bytes of a file, got 0 bytes"),
        (bytearray(), "must be the bytes of a file, got 0 bytes"),
        ("", "must be the path of a file, got ''"),
        (".", "must be a file, got the folder '.'"),
        ("https://example.org/cat.jpg", "must be a path, got the URL 'https://example.org/cat.jpg'; download it"),
        ("data:image/png;base64,AAAA", "must be a path, got the URL 'data:image"),
        ("A" * 5000, "must be a path, got a text of 5000 characters; decode base64 first"),
        (io.StringIO("text"), "must be a binary file, got an io.StringIO; open it with mode 'rb'"),
        (AsyncFile(), r"must be a binary file, got an asynchronous one, a tests.AsyncFile; give `await file.read\(\)`"),
    ],
)
def test_what_is_no_image_is_named_before_anything_is_read(value, text):
    with pytest.raises(MisfitError, match=f"^{text}"):
        check_image(value)


def test_files_without_an_image_are_named(tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    with path.open("rb") as closed:
        pass
    with path.open("ab") as writable, tempfile.NamedTemporaryFile("w+") as text:
        for value, problem in (
            (path, "must be a file with contents, got the empty file '.*/empty.png'"),
            (io.BytesIO(), "must be a file with contents, got an io.BytesIO without any$"),
            (closed, "must be a readable file: .*closed file"),
            (writable, "must be a readable file: read"),
            (text, r"whose read\(\) returns ''; open it with mode 'rb'"),
        ):
            with pytest.raises(MisfitError, match=problem):
                image_bytes(value)


def test_a_file_that_is_missing_is_the_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "no.png"))):
        image_bytes(tmp_path / "no.png")
