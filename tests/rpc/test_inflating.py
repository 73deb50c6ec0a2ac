"""Gzip data in slices and in turns, against Python's gzip."""

import asyncio
import contextlib
import gzip
import random
import zlib

import pytest

from gramophone_server.errors import InvalidRequest
from gramophone_server.rpc.inflating import OVERHEAD_BYTES, QUICK_BYTES, SLICE_BYTES, SLICE_CONTENT_BYTES, Inflater
from tests.support.clock import until

KIB, MIB = 2**10, 2**20
NOISE = random.Random(1).randbytes(4 * MIB)  # does not compress, so that its slices are many


@contextlib.asynccontextmanager
async def an_inflater():
    inflater = Inflater()
    try:
        yield inflater
    finally:
        inflater.close()


async def content(inflater, data, owner="a", max_bytes=8 * MIB):
    return await inflater.inflate(data, max_bytes, "which is the most of the test", owner)


def flushed(message, piece, mode=zlib.Z_SYNC_FLUSH, level=6):
    """Gzip data of a compressor that ends a block after each so many bytes."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, 31)
    pieces = (message[at : at + piece] for at in range(0, len(message), piece))
    return b"".join(compressor.compress(part) + compressor.flush(mode) for part in pieces) + compressor.flush()


def with_strategy(message, strategy, memory):
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31, memory, strategy)
    return compressor.compress(message) + compressor.flush()


CONTENTS = {
    "nothing": b"",
    "a byte": b"x",
    "noise": NOISE,
    "noise, a slice": NOISE[: SLICE_BYTES - 100],
    "zeros": bytes(5 * MIB),
    "zeros, a slice": bytes(SLICE_CONTENT_BYTES),
    "zeros, a byte more": bytes(SLICE_CONTENT_BYTES + 1),
    "zeros and noise": (bytes(100 * KIB) + NOISE[: 50 * KIB]) * 10,
}
COMPRESSORS = {
    **{f"level {level}": lambda message, level=level: gzip.compress(message, level) for level in (0, 1, 6, 9)},
    "blocks of a kilobyte": lambda message: flushed(message, KIB),
    "blocks of a kilobyte each alone": lambda message: flushed(message, KIB, zlib.Z_FULL_FLUSH, 1),
    "fixed codes": lambda message: with_strategy(message, zlib.Z_FIXED, 8),
    "little memory": lambda message: with_strategy(message, zlib.Z_DEFAULT_STRATEGY, 1),
    "a name of a file": lambda message: _named(gzip.compress(message)),
}


def _named(data):
    return data[:3] + b"\x08" + data[4:10] + b"pictures/request.binpb\0" + data[10:]


@pytest.mark.parametrize("how", COMPRESSORS)
async def test_what_any_compressor_makes_is_inflated(how):
    async with an_inflater() as inflater:
        for name, message in CONTENTS.items():
            data = COMPRESSORS[how](message)
            assert gzip.decompress(data) == message
            assert await content(inflater, data) == message, name
            assert await content(inflater, data, max_bytes=len(message)) == message, name


@pytest.mark.parametrize("name", CONTENTS)
async def test_no_content_is_longer_than_the_limit(name):
    message, limit = CONTENTS[name] + b"!", len(CONTENTS[name])
    async with an_inflater() as inflater:
        with pytest.raises(InvalidRequest, match=f"expands to more than {limit} bytes, which is the most of the test"):
            await content(inflater, gzip.compress(message), max_bytes=limit)


@pytest.mark.parametrize("at", ["the start", "the end"])
async def test_bytes_without_content_are_refused_when_they_show(at):
    """Blocks without content take the time of others, and no compressor makes many of them."""
    empty = b"\0\0\0\xff\xff"  # a stored block
    head, body = gzip.compress(NOISE[:MIB], 0)[:10], gzip.compress(NOISE[:MIB], 0)[10:]
    few, many = empty * (OVERHEAD_BYTES // len(empty) - 20), empty * MIB
    whole = head + few + body if at == "the start" else flushed(NOISE[:MIB], 4 * MIB)[:-10] + few + b"\3\0" + body[-8:]
    assert gzip.decompress(whole) == NOISE[:MIB]
    async with an_inflater() as inflater:
        assert await content(inflater, whole) == NOISE[:MIB]
        with pytest.raises(InvalidRequest) as refused:
            await content(inflater, whole.replace(few, many))
    read, size = (SLICE_BYTES, 0) if at == "the start" else (10 * SLICE_BYTES, MIB)
    words = (
        f"has {read} bytes of gzip data with {size} bytes of content, more than a compressor makes of them; compress"
    )
    assert words in str(refused.value)


async def test_a_short_message_has_its_turn_between_the_slices_of_long_ones():
    """However many messages, and from however many connections; and the long ones of one end in their order."""
    ended = []
    long, short = gzip.compress(NOISE), gzip.compress(NOISE[: 20 * KIB])
    assert len(long) > 30 * SLICE_BYTES

    async def named(name, data, owner):
        await content(inflater, data, owner)
        ended.append(name)

    async with an_inflater() as inflater, asyncio.TaskGroup() as group:
        for i in range(12):
            group.create_task(named(f"long {i}", long, f"hostile {i % 3}"))
        await until(lambda: inflater.waiting == 11)
        for i in range(5):
            await named(f"short {i}", short, f"honest {i}")
    assert ended[:5] == [f"short {i}" for i in range(5)]


async def test_long_messages_of_two_connections_are_inflated_side_by_side():
    """One with ten messages and one with one have equal parts of the thread."""
    ended = []
    data = gzip.compress(NOISE)

    async def named(name, owner):
        await content(inflater, data, owner)
        ended.append(name)

    async with an_inflater() as inflater, asyncio.TaskGroup() as group:
        for i in range(10):
            group.create_task(named(i, "many"))
        await until(lambda: inflater.waiting == 9)
        group.create_task(named("one", "other"))
    assert ended.index("one") <= 2


async def test_a_call_that_has_gone_does_not_keep_the_thread():
    """Nothing of its message is inflated after the present slice."""
    data = gzip.compress(NOISE)
    async with an_inflater() as inflater:
        gone = [asyncio.create_task(content(inflater, data)) for _ in range(8)]
        await until(lambda: inflater.waiting == 7)
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
        assert inflater.waiting == 0 and all(task.cancelled() for task in gone)
        assert await content(inflater, data, "other") == NOISE


async def test_only_little_is_inflated_on_the_event_loop():
    """Health checks and commands wait for no thread, unless they have many bytes: 64 KiB can take 5 ms."""
    async with an_inflater() as inflater:
        inflater.close()
        little = gzip.compress(NOISE[: QUICK_BYTES - 100])
        assert await content(inflater, little, max_bytes=64 * KIB) == NOISE[: QUICK_BYTES - 100]
        for data, max_bytes in ((little, 8 * MIB), (gzip.compress(NOISE[:QUICK_BYTES]), 64 * KIB)):
            with pytest.raises(RuntimeError, match="after shutdown"):
                await content(inflater, data, max_bytes=max_bytes)
