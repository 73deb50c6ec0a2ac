"""The store of uploaded images: what is kept, and what is evicted."""

import hashlib

import pytest

from gramophone_server.config import Limits
from gramophone_server.errors import ImageNotFound, InvalidRequest
from gramophone_server.images.upload_store import Upload, UploadStore


def test_the_least_recently_used_image_is_evicted():
    uploads = UploadStore(10)
    for name in "abc":
        uploads.keep(name, name.encode() * 3)
    assert uploads.find("a") == b"aaa"
    uploads.keep("b", b"bbb")  # uploaded again, which counts as a use
    uploads.keep("d", b"dddd")
    with pytest.raises(
        ImageNotFound, match="this server keeps no image 'c'; upload it with UploadImage, and send the job"
    ):
        uploads.find("c")
    assert [uploads.find(name) for name in "abd"] == [b"aaa", b"bbb", b"dddd"]
    assert uploads.counts == (4, 1, 10, 10)


def test_an_upload_consists_of_its_chunks():
    upload = Upload(Limits())
    for piece in (b"abc", b"", b"def"):
        upload.add(piece)
    assert (upload.digest, upload.data) == (f"sha256:{hashlib.sha256(b'abcdef').hexdigest()}", b"abcdef")


@pytest.mark.parametrize(
    ("limits", "pieces", "words"),
    [
        (Limits(), [2**20 + 1], "has 1048577 bytes, at most 1048576 are allowed; send the image in smaller chunks"),
        (
            Limits(max_image_bytes=1024),
            [1000, 25],
            (
                "makes an image of 1025 bytes or more; at most 1024 are allowed "
                "(server setting GRAMOPHONE_MAX_IMAGE_BYTES)"
            ),
        ),
        (
            Limits(max_uploads_bytes=1024),
            [1000, 25],
            "at most 1024 are allowed (server setting GRAMOPHONE_MAX_UPLOADS_BYTES); send a smaller or more compressed",
        ),
    ],
)
def test_an_upload_that_becomes_too_large_is_refused(limits, pieces, words):
    upload = Upload(limits)
    with pytest.raises(InvalidRequest) as caught:
        for size in pieces:
            upload.add(bytes(size))
    (violation,) = caught.value.violations
    assert violation.field == "chunk" and words in violation.description


def test_a_server_that_keeps_no_images_refuses_uploads():
    with pytest.raises(InvalidRequest, match=r"GRAMOPHONE_MAX_UPLOADS_BYTES is 0\); send them with the job as `data`"):
        Upload(Limits(max_uploads_bytes=0))
