"""The parts of files, and that no step of a walk looks at many bytes."""

import itertools
import struct

import pytest
from PIL import Image

from gramophone_server.images import containers
from gramophone_server.images.containers import EOI, MAX_HEAD_PARTS, SCAN, SOS, UnusableImage
from tests.support.bad_pictures import LARGE, SIZE, chunk, encoded, in_jpeg, in_png, in_webp, segment

RED = Image.new("RGB", SIZE, "red")
JPEG = encoded(RED, "JPEG")
HEAD, PIXELS = JPEG[: JPEG.index(b"\xff\xda")], JPEG[JPEG.index(b"\xff\xda") : -2]
SCAN_HEAD = PIXELS[: 2 + int.from_bytes(PIXELS[2:4])]


def in_scan(pixels):
    return HEAD + SCAN_HEAD + pixels + b"\xff\xd9"


def test_the_parts_of_a_jpeg_are_adjacent_up_to_its_end():
    data = encoded(RED, "JPEG", progressive=True, exif=Image.Exif(), comment=b"x" * 99)
    parts = list(containers.jpeg_segments(data + b"more"))
    assert parts[0].start == 2 and parts[-1][:] == (EOI, len(data) - 2, len(data), len(data))
    assert all(part.end == following.start for part, following in itertools.pairwise(parts))
    assert [part.marker for part in parts].count(SOS) > 1


def test_the_chunks_of_a_png_end_with_iend():
    data = in_png(chunk(b"tEXt", b"abc"))
    chunks = list(containers.png_chunks(data + chunk(b"tEXt")))
    assert [found.name for found in chunks] == [b"IHDR", b"tEXt", b"IDAT", b"IEND"]
    assert data[chunks[1].content : chunks[1].content_end] == b"abc" and chunks[-1].end == len(data)


def test_the_chunks_of_a_webp_are_at_even_offsets_within_its_size():
    data = in_webp((b"EXIF", b"abc"), (b"ABCD", b"12"))
    *_, exif, last = containers.webp_chunks(data + b"EXIF\0\0\0\0")
    assert data[exif.content : exif.content_end] == b"abc" and exif.end + 1 == last.start
    assert (last.name, last.end) == (b"ABCD", len(data))


@pytest.mark.parametrize("filled", [b"\xff\0", b"\xff\xd0", b"\xff\xff", b"\0\0"], ids=bytes.hex)
@pytest.mark.parametrize("odd", [0, 1])
def test_a_scan_ends_at_its_marker_wherever_slices_end(monkeypatch, filled, odd):
    monkeypatch.setattr(containers, "SLICE_BYTES", 16)
    for length in range(20):
        data = in_scan(b"\0" * odd + filled * length) + b"\xff\xd9"
        *_, scan, end = containers.jpeg_segments(data)
        assert (scan.marker, end.marker, end.end) == (SCAN, EOI, len(data) - 2)


def test_fill_bytes_end_at_the_marker():
    for length in (*range(50), 255, 256, 4095, 4096, 4097, 10_000):
        data = JPEG[:2] + b"\xff" * length + JPEG[2:]
        assert len(list(containers.jpeg_segments(data))) == len(list(containers.jpeg_segments(JPEG)))
        with pytest.raises(UnusableImage, match="is truncated or damaged; send the whole file again"):
            list(containers.jpeg_segments(b"\xff\xd8\xff" + b"\xff" * length))


class Searches:
    """A pattern that notes how many bytes each search may look at."""

    def __init__(self, pattern):
        self._pattern, self.spans = pattern, []

    def search(self, data, start, end):
        self.spans.append(min(end, len(data)) - start)
        return self._pattern.search(data, start, end)


@pytest.mark.parametrize("pixels", [b"\xff\0", b"\xff\xff"], ids=bytes.hex)
def test_no_step_holds_the_interpreter_for_long(monkeypatch, pixels):
    """The search of 10 MiB took 75 ms, in which no other thread ran."""
    searches = Searches(containers.SCAN_END)
    monkeypatch.setattr(containers, "SCAN_END", searches)
    assert list(containers.jpeg_segments(in_scan(pixels * (LARGE // 2))))[-1].marker == EOI
    assert sum(searches.spans) > LARGE - 10 and max(searches.spans) <= containers.SLICE_BYTES + 1 <= 2**19


def test_long_fill_bytes_take_few_steps():
    """They are compared in blocks. A search of 10 MiB took 75 ms, for six images of a request of 474 bytes."""
    compared = []

    class File(bytes):
        def startswith(self, prefix, at):
            compared.append(len(prefix))
            return super().startswith(prefix, at)

    assert list(containers.jpeg_segments(File(in_jpeg(b"\xff" * LARGE))))[-1].marker == EOI
    assert len(compared) < LARGE / 2000


def test_a_header_of_many_parts_is_refused():
    comments = segment(0xFE) * (MAX_HEAD_PARTS - 20)
    assert list(containers.jpeg_segments(JPEG[:2] + comments + JPEG[2:]))[-1].marker == EOI
    with pytest.raises(UnusableImage) as caught:
        list(containers.jpeg_segments(JPEG[:2] + segment(0xFE) * MAX_HEAD_PARTS + JPEG[2:]))
    assert str(caught.value) == "has more than 1024 segments before its pixels; save it with an ordinary encoder"


def test_between_scans_there_may_be_more_parts():
    data = JPEG[:-2] + segment(0xFE) * 8000 + JPEG[-2:]
    assert list(containers.jpeg_segments(data))[-1].marker == EOI
    with pytest.raises(UnusableImage, match="has more than 16384 segments; save it with an ordinary encoder"):
        list(containers.jpeg_segments(JPEG[:-2] + segment(0xFE) * 20_000 + JPEG[-2:]))


def test_a_scan_is_searched_only_when_what_follows_is_asked_for(monkeypatch):
    monkeypatch.setattr(containers, "SCAN_END", None)
    assert next(part for part in containers.jpeg_segments(JPEG) if part.marker == SOS).marker == SOS


def test_values_behind_the_end_are_damage():
    assert containers.unpacked(">H", b"\1\2", 0) == (258,)
    with pytest.raises(UnusableImage, match="truncated or damaged"):
        containers.unpacked(">H", b"\1\2", 1)
    with pytest.raises(UnusableImage, match="truncated or damaged"):
        list(containers.jpeg_segments(JPEG[:2] + segment(0xE0, b"JFIF\0") + struct.pack(">HB", 0xFFE1, 0)))
