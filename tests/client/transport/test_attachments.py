"""Which images and checkpoints travel in a request, and which are named by digest."""

import hashlib

import pytest

from gramophone.options import INLINE_BYTES
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.transport.attachments import detach, named

MIB = 2**20


def digest(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def spec_of(content=b"", styles=(), start=None, resume=None):
    spec = pb.JobSpec(content=pb.ImageSource(data=content))
    for data in styles:
        spec.styles.add().image.data = data
    if start is not None:
        spec.start_image.data = start
    if resume is not None:
        spec.resume = resume
    return spec


def file(size, letter=b"a"):
    return letter * size


def carried(spec):
    """Bytes of images and checkpoints in a spec."""
    images = (spec.content, spec.start_image, *(style.image for style in spec.styles))
    return sum(len(image.data) for image in images) + len(spec.resume)


def test_a_small_job_is_not_changed():
    spec = spec_of(file(INLINE_BYTES - 100, b"c"), [file(100, b"s")])
    before = spec.SerializeToString()
    assert detach(spec) == {} and spec.SerializeToString() == before
    assert named(spec) == set()


def test_the_largest_files_are_named_until_the_rest_fits():
    content, first, second = file(2 * MIB, b"c"), file(3 * MIB, b"f"), file(2 * MIB, b"s")
    spec = spec_of(content, [first, second])
    attachments = detach(spec)
    assert attachments == {digest(first): ("spec.styles[0].image.data", first)}
    assert spec.styles[0].image.digest == digest(first)
    assert (spec.content.data, spec.styles[1].image.data) == (content, second)
    assert named(spec) == {digest(first)}
    spec.styles.add().image.data = b"1"  # one byte more than fits
    assert [field for field, _ in detach(spec).values()] == ["spec.content.data"]
    assert carried(spec) == 2 * MIB + 1


def test_every_kind_of_file_can_be_named():
    content, style, start = file(5 * MIB, b"c"), file(4 * MIB + 1, b"s"), file(6 * MIB, b"i")
    spec = spec_of(content, [style], start)
    assert [field for field, _ in detach(spec).values()] == [
        "spec.start_image.data",
        "spec.content.data",
        "spec.styles[0].image.data",
    ]
    assert named(spec) == {digest(content), digest(style), digest(start)} and carried(spec) == 0
    checkpoint = file(20 * MIB, b"k")
    spec = spec_of(b"small", resume=checkpoint)
    assert detach(spec) == {digest(checkpoint): ("spec.resume", checkpoint)}
    assert not spec.HasField("resume") and spec.resume_digest == digest(checkpoint)
    assert spec.content.data == b"small" and named(spec) == {digest(checkpoint)}


def test_equal_files_are_named_together():
    same, other = file(3 * MIB, b"x"), file(2 * MIB, b"y")
    spec = spec_of(same, [same, other])
    assert detach(spec) == {digest(same): ("spec.content.data", same)}
    assert spec.content.digest == spec.styles[0].image.digest == digest(same)
    assert spec.styles[1].image.data == other


def test_a_limit_of_zero_leaves_nothing():
    spec = spec_of(b"c", [b"s", b"t"], resume=b"k")
    assert len(detach(spec, 0)) == 4 and carried(spec) == 0


@pytest.mark.parametrize("extra", [0, 1])
def test_only_files_count(extra):
    """A recipe and options do not: every server's messages have room for them beside the files."""
    spec = spec_of(file(INLINE_BYTES + extra))
    spec.recipe.size = 512
    spec.result_quality = 90
    assert len(detach(spec)) == extra
