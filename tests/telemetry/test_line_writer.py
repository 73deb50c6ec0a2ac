"""A queue of lines whose reader may be slow, stopped or gone."""

import os
import threading

import pytest

from gramophone_server.telemetry.line_writer import CHUNK_BYTES, LineWriter, write_all
from tests.support.clock import WITHIN_S, until


class Reader:
    """Where lines are written: a test holds it, and makes it fail."""

    def __init__(self):
        self.chunks = []
        self.error = None
        self.may_write = threading.Event()
        self.may_write.set()

    def write(self, data):
        self.may_write.wait(WITHIN_S)
        if self.error is not None:
            raise self.error
        self.chunks.append(data)

    @property
    def text(self):
        return b"".join(self.chunks).decode()


@pytest.fixture
def reader():
    reader = Reader()
    yield reader
    reader.may_write.set()


def gap(number):
    return b"%d missing\n" % number


def put(writer, numbers):
    for number in numbers:
        writer.put(b"line %d\n" % number)


async def held(reader, writer):
    """The reader stops, with one chunk on its way."""
    reader.may_write.clear()
    writer.put(b"on its way\n")
    await until(lambda: not writer.drain(0) and not writer.waiting)


def test_lines_arrive_in_order_and_as_whole_chunks(reader):
    writer = LineWriter("test", reader.write)
    put(writer, range(3000))
    assert writer.close(5)
    assert reader.text == "".join(f"line {number}\n" for number in range(3000))
    assert all(len(chunk) <= CHUNK_BYTES and chunk.endswith(b"\n") for chunk in reader.chunks)
    assert writer.dropped == 0


async def test_the_oldest_lines_are_dropped_and_their_place_says_how_many(reader):
    writer = LineWriter("test", reader.write, gap=gap, max_bytes=100)
    await held(reader, writer)
    put(writer, range(100, 200))  # 9 bytes each, of which eleven have room
    assert writer.dropped == 89
    reader.may_write.set()
    assert writer.close(5)
    assert reader.text.splitlines() == ["on its way", "89 missing", *(f"line {number}" for number in range(189, 200))]


async def test_an_entry_of_several_lines_is_kept_or_dropped_as_a_whole(reader):
    writer = LineWriter("test", reader.write, gap=gap, max_bytes=100)
    await held(reader, writer)
    writer.put(b"traceback\n" * 5)
    writer.put(b"x" * 99 + b"\n")
    reader.may_write.set()
    assert writer.close(5)
    assert reader.text.splitlines() == ["on its way", "5 missing", "x" * 99]


async def test_an_entry_that_has_no_room_at_all_is_dropped(reader):
    writer = LineWriter("test", reader.write, gap=gap, max_bytes=100)
    writer.put(b"y" * 200 + b"\n")
    writer.put(b"last\n")
    assert writer.close(5)
    assert reader.text.splitlines() == ["1 missing", "last"]


async def test_losses_are_reported_once_until_a_line_is_written_again(reader):
    reports = []
    writer = LineWriter(
        "test",
        reader.write,
        on_loss=lambda error, lines: reports.append((error, lines)),
        on_recovery=lambda number: reports.append(number),
    )
    reader.error = OSError(28, "No space left on device")
    for number in range(3):
        put(writer, [number])
        assert writer.drain(5)
    reader.error = None
    put(writer, [3])
    assert writer.close(5)
    (error, lines), recovered = reports
    assert (error.errno, lines, recovered) == (28, b"line 0\n", 3)
    assert (reader.text, writer.dropped) == ("line 3\n", 3)


async def test_a_writer_whose_reader_has_stopped_does_not_hold_its_end(reader):
    writer = LineWriter("test", reader.write)
    await held(reader, writer)
    assert not writer.close(0.01)


def test_a_finaliser_may_write_while_a_line_is_added(reader):
    """The garbage collector may run it inside of `put`, on the same thread."""

    class Line(bytes):
        def __len__(self):
            if not nested:
                nested.append(True)
                writer.put(b"nested\n")
            return bytes.__len__(self)

    nested = []
    writer = LineWriter("test", reader.write)
    writer.put(Line(b"outer\n"))
    assert writer.close(5)
    assert sorted(reader.text.splitlines()) == ["nested", "outer"]


def test_all_is_written_to_a_descriptor_that_is_not_blocking():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    data, received = os.urandom(1_000_000), []

    def read():
        while part := os.read(reading, 65536):
            received.append(part)

    thread = threading.Thread(target=read)
    thread.start()
    write_all(writing, data)
    os.close(writing)
    thread.join()
    os.close(reading)
    assert b"".join(received) == data
