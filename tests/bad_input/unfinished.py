"""Calls that stop in their middle, one alone and hundreds at once.

A call whose message the server waits for ends within `max_idle_s`, and what it has sent so far is bounded for all
connections together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from tests.bad_input.compressed import GZIP, member_of_zeros, methods
from tests.bad_input.inputs import REQUESTS
from tests.bad_input.target import Case, Target, path_of
from tests.support.monitoring import RuleViolation
from tests.support.raw_http2 import RawConnection, StreamOver, connect, prefixed

MIB = 2**20
MARGIN_S = 5.0  # beyond `max_idle_s`, for a busy machine
HANDSHAKE_S = 10.0  # of `main.server_options`
CROWD = 200  # connections
DRIP_S = 0.05  # between two bytes of a dripping sender
# A refusal of either kind is right: it was too slow, or there was no room to wait.
SLOW = ("SLOW_SENDER", "SERVER_BUSY", "RESOURCE_EXHAUSTED")


def _stops(message: bytes, limits: Limits) -> Mapping[str, bytes]:
    """The bytes of a message up to each boundary."""
    whole, largest = prefixed(message), limits.max_message_bytes
    return {
        "after its headers": b"",
        "in the prefix": whole[:3],
        "after the prefix": whole[:5] if message else prefixed(b"", length=1),
        "in the middle": whole[: 5 + len(message) // 2] if message else prefixed(b"x", length=3),
        "before the last byte": whole[:-1] if message else prefixed(b"x", length=2),
        "after the prefix of a largest message": prefixed(b"", length=largest),
        "in a largest message": prefixed(bytes(largest // 2), length=largest),
        "before the last byte of a largest message": prefixed(bytes(largest - 1), length=largest),
    }


def cases(limits: Limits) -> Iterator[Case]:
    """Every method, stopped at every boundary; and crowds."""
    idle_s = limits.max_idle_s + MARGIN_S
    for path, messages in methods().items():
        stops = _stops(messages[-1], limits)
        yield _stop_case(path, stops, idle_s)
        yield _ended_case(path, stops)
        yield _above_case(path, limits)
    crowds: Mapping[str, bytes] = {
        "after their headers": b"",
        "after the prefix of a largest message": prefixed(b"", length=limits.max_message_bytes),
        "before the last byte of a largest message": prefixed(
            bytes(limits.max_message_bytes - 1), length=limits.max_message_bytes
        ),
        "in a compressed bomb": prefixed(
            member_of_zeros(100 * limits.max_message_bytes)[:-1],
            compressed=True,
            length=len(member_of_zeros(100 * limits.max_message_bytes)),
        ),
    }
    for method in ("Stylize", "StylizeInteractive", "UploadImage", "GetServerInfo"):
        for stop, data in crowds.items():
            yield _crowd_case(f"{CROWD} {method} {stop}", method, data, limits, idle_s)
    for method in REQUESTS:
        yield _drip_case(method, idle_s)
    yield _second_message_case(idle_s)
    yield _many_streams_case(limits, idle_s)
    yield _silent_connections_case(limits)


def _stop_case(path: str, stops: Mapping[str, bytes], idle_s: float) -> Case:
    """Calls that stop at every boundary, side by side."""

    async def play(target: Target) -> None:
        async def stop(what: str, data: bytes) -> None:
            async with target.connection() as raw:
                stream = raw.open_stream(path)
                with contextlib.suppress(StreamOver):
                    await stream.send(data, patience_s=idle_s)
                with _naming(what):
                    target.check(await stream.answer(idle_s), SLOW)

        async with asyncio.TaskGroup() as group:
            for what, data in stops.items():
                group.create_task(stop(what, data))

    return Case("unfinished", f"{_method(path)} at every boundary", play, idle_s + 10)


def _ended_case(path: str, stops: Mapping[str, bytes]) -> Case:
    """Clients that end their stream in the middle of a message."""

    async def play(target: Target) -> None:
        async with target.connection() as raw:
            for what, data in stops.items():
                stream = raw.open_stream(path)
                with contextlib.suppress(StreamOver):
                    await stream.send(data, end=True)
                with _naming(what):
                    answer = await stream.answer(within_s=10)
                    if answer.code not in ("INTERNAL", "RESET"):  # gRPC's own words for a message without its end
                        target.check(answer)

    return Case("unfinished", f"{_method(path)} ended at every boundary", play, 20)


def _above_case(path: str, limits: Limits) -> Case:
    """The prefix of a message that is too large is answered at once, and nothing is kept for it."""

    async def play(target: Target) -> None:
        async with target.connection() as raw:
            for length in (limits.max_message_bytes + 1, 2**31 - 1, 2**31, 2**32 - 1):
                stream = raw.open_stream(path)
                await stream.send(prefixed(b"", length=length))
                with _naming(f"with a prefix of {length} bytes"):
                    target.check(await stream.answer(within_s=5), ("RESOURCE_EXHAUSTED",))

    return Case("unfinished", f"{_method(path)} with prefixes above the limit", play, max_rise=4 * MIB)


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Names the call of a violation inside of the block."""
    try:
        yield
    except TimeoutError:
        raise RuleViolation(f"a call {what} was not answered in time") from None
    except RuleViolation as error:
        raise RuleViolation(f"a call {what}: {error}") from None


def _method(path: str) -> str:
    return path.rpartition("/")[2]


def _crowd_case(name: str, method: str, data: bytes, limits: Limits, idle_s: float) -> Case:
    async def play(target: Target) -> None:
        async def stop(raw: RawConnection) -> None:
            headers = GZIP if data[:1] == b"\1" else ()
            stream = raw.open_stream(path_of(method), headers)
            with contextlib.suppress(StreamOver, TimeoutError):
                await stream.send(data, patience_s=2 * idle_s)
            target.check(await stream.answer(2 * idle_s), SLOW)

        await _crowd(target, CROWD, stop)

    # What arrives is inside of the budget; besides it each connection has its window and its buffers.
    rise = limits.max_receiving_bytes + CROWD * MIB // 4 + 32 * MIB
    return Case("unfinished", name, play, 3 * idle_s + 10, rise)


def _drip_case(method: str, idle_s: float) -> Case:
    """One byte at a time is as slow as none."""

    async def play(target: Target) -> None:
        async with target.connection() as raw:
            stream = raw.open_stream(path_of(method))
            with contextlib.suppress(StreamOver):
                await stream.send(prefixed(b"", length=100_000))
                while True:
                    await stream.send(b"\0")
                    await asyncio.sleep(DRIP_S)
            target.check(await stream.answer(1), SLOW)

    return Case("unfinished", f"{method} one byte at a time", play, idle_s + 5)


def _second_message_case(idle_s: float) -> Case:
    """An upload whose second piece never comes."""

    async def play(target: Target) -> None:
        async with target.connection() as raw:
            stream = raw.open_stream(path_of("UploadImage"))
            await stream.send(prefixed(pb.UploadImageRequest(chunk=bytes(MIB)).SerializeToString()))
            target.check(await stream.answer(idle_s), SLOW)

    return Case("unfinished", "UploadImage after a piece", play, idle_s + 5)


def _many_streams_case(limits: Limits, idle_s: float) -> Case:
    """As many calls as one connection may have, and some more, that all stop after their headers."""
    count = limits.max_calls_per_connection

    async def play(target: Target) -> None:
        async with target.connection() as raw:
            await asyncio.sleep(0.2)  # until the server's own settings have arrived
            streams = [raw.open_stream(path_of("GetServerInfo")) for _ in range(min(count, _most_streams(raw)))]
            for stream in streams:
                target.check(await stream.answer(idle_s), SLOW)

    return Case("unfinished", f"{count} calls of one connection", play, idle_s + 30, max_rise=64 * MIB)


def _most_streams(raw: RawConnection) -> int:
    return raw.h2.remote_settings.max_concurrent_streams or 2**31


def _silent_connections_case(limits: Limits) -> Case:
    """More connections than allowed, which say nothing, do not shut out another one for longer than a handshake may
    take."""
    count, within_s = limits.max_connections + 50, HANDSHAKE_S + MARGIN_S

    async def play(target: Target) -> None:
        host, _, port = target.address.rpartition(":")
        opened = [await asyncio.open_connection(host, int(port)) for _ in range(count)]
        try:
            async with asyncio.timeout(within_s):
                while not await _is_let_in(target):
                    await asyncio.sleep(0.5)
        finally:
            for _, writer in opened:
                writer.transport.abort()

    return Case("unfinished", f"{count} silent connections", play, within_s + 10, max_rise=count * MIB // 8)


async def _is_let_in(target: Target) -> bool:
    with contextlib.suppress(TimeoutError, OSError, StreamOver):
        async with target.connection() as raw:
            stream = raw.open_stream(path_of("GetServerInfo"))
            await stream.send(prefixed(b""), end=True)
            return (await stream.answer(within_s=2)).code == "OK"
    return False


async def _crowd(target: Target, count: int, play: Callable[[RawConnection], Awaitable[None]]) -> None:
    """So many connections at once."""
    opened = await asyncio.gather(*(connect(target.address) for _ in range(count)))
    try:
        async with asyncio.TaskGroup() as group:
            for raw in opened:
                group.create_task(play(raw))
    finally:
        for raw in opened:
            raw.abort()
