"""Reads the messages of clients, so that whatever they send takes a bounded amount of memory and time.

gRPC keeps at most the window of a stream, 64 KiB, until the server asks for its message. So a message is asked for only
when a budget has room for the largest one, and its fields are counted before protobuf makes objects of them.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from gramophone.recipe import Violation
from gramophone_server.config import PROBE_READS, SMALL_READS, Limits, env_variable
from gramophone_server.errors import InvalidRequest, ServerBusy, SlowSender
from gramophone_server.images.threads import started_threads
from gramophone_server.rpc.byte_budget import ByteBudget, Share
from gramophone_server.rpc.field_counts import check_fields

__all__ = ["MAX_SMALL_BYTES", "Context", "Received", "Receiver", "Room", "parse"]

M = TypeVar("M", bound=Message)
T = TypeVar("T")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# Of a message without images. gRPC has one limit for all methods, so each may take `max_message_bytes` until it is
# complete.
MAX_SMALL_BYTES = 2**16
SMALL_REPLACEABLE_AFTER_S = 0.1
GZIP_START = b"\x1f\x8b"  # no message starts so: it would be field 3 of the wire type 7, which does not exist
GZIP_FORMAT = 31  # of zlib: a gzip header and a window of 32 KiB


class Room(NamedTuple):
    """Where messages of one kind arrive: their budget, and the largest one."""

    budget: ByteBudget
    max_bytes: int


class Received(NamedTuple):
    """The bytes of a message, and the share that they are counted in."""

    data: bytes
    share: Share


class Receiver:
    """The rooms in which the messages of one server arrive, and the thread that decompresses them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        largest = limits.max_message_bytes
        self.requests = Room(
            ByteBudget(
                limits.max_receiving_bytes,
                "the room for messages that arrive or are not handled yet is used up "
                f"(server setting {env_variable('max_receiving_bytes')})",
            ),
            largest,
        )
        self.small = Room(_small_budget(SMALL_READS * largest, "too many messages are arriving"), MAX_SMALL_BYTES)
        self.probes = Room(_small_budget(PROBE_READS * largest, "too many health checks are arriving"), MAX_SMALL_BYTES)
        self.commands = Room(
            ByteBudget(
                limits.max_controllers * largest,
                "too many clients control a job (server settings "
                f"{env_variable('max_running')} and {env_variable('max_queued')})",
            ),
            MAX_SMALL_BYTES,
        )
        self._inflater = started_threads(1, "inflate")

    def close(self) -> None:
        """Stops the thread."""
        self._inflater.shutdown(wait=False, cancel_futures=True)

    async def read(self, context: Context, room: Room, owner: str, kept: Share | None = None) -> Received | None:
        """The next message of a client, decompressed; None if it will send no further one.

        ``owner`` is its connection, ``kept`` what the call already holds in this room. Raises `ServerBusy`,
        `SlowSender` and `InvalidRequest`.
        """
        wait = _Wait(self._limits.max_idle_s)
        if kept is not None:
            kept.replaceable(wait.replace)
        try:
            size = self._limits.max_message_bytes
            share = room.budget.try_take(size, owner) or await wait.share(room.budget.take(size, owner))
            share.replaceable(wait.replace)
            try:
                data = await wait.message(context)
                room.budget.forget(share)
                data = data if data is None else await self._checked(data, room)
                share.shrink_to(len(data or b""))
            except BaseException:
                share.give_back()
                raise
        finally:
            if kept is not None:
                room.budget.forget(kept)
        return None if data is None else Received(data, share)

    async def read_command(self, context: Context) -> bytes | None:
        """The next command of a controller, which may take any time to send it; None if it will send no further one.
        The caller has a share of `command_share`."""
        data = await _read(context)
        return data if data is None else await self._checked(data, self.commands)

    def command_share(self, owner: str) -> Share:
        """What one controller may send while nothing else is read from it. Raises `ServerBusy`."""
        return self.commands.budget.take_now(self._limits.max_message_bytes, owner)

    async def _checked(self, data: bytes, room: Room) -> bytes:
        """The message, decompressed if necessary. Raises `InvalidRequest`."""
        if data.startswith(GZIP_START):
            inflated = partial(_inflated, data, self._limits.max_message_bytes)
            data = await asyncio.get_running_loop().run_in_executor(self._inflater, inflated)
        if len(data) > room.max_bytes:
            raise _refusal(f"must have at most {room.max_bytes} bytes, because it carries no image, got {len(data)}")
        return data


def parse(data: bytes, kind: type[M]) -> M:
    """The message in these bytes. Raises `InvalidRequest`: it cannot be parsed, or has too many fields."""
    if violations := tuple(check_fields(data, kind)):
        raise InvalidRequest(violations)
    try:
        return kind.FromString(data)
    except DecodeError:
        name = kind.DESCRIPTOR.full_name
        description = f"must be a {name}, got {len(data)} bytes that cannot be parsed as one"
        raise InvalidRequest(
            [Violation("request", f"{description}; generate the client's stubs from this server's proto")]
        ) from None


class _Wait:
    """The wait for one message, which ends after ``max_s`` seconds, or earlier to make room for others."""

    def __init__(self, max_s: float) -> None:
        self._max_s = max_s
        self._timeout: asyncio.Timeout | None = None
        self._replaced = False

    async def share(self, taking: Awaitable[Share]) -> Share:
        """The share for the message. Raises `ServerBusy`."""
        return await self._within(None, taking)

    async def message(self, context: Context) -> bytes | None:
        """The bytes of the message; None if the client will send none. Raises `SlowSender`, and `ServerBusy` after
        `replace`."""
        return await self._within(self._max_s, _read(context))

    def replace(self) -> None:
        """Ends the wait."""
        self._replaced = True
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())

    async def _within(self, seconds: float | None, awaited: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(0.0 if self._replaced else seconds) as self._timeout:
                return await awaited
        except TimeoutError:
            if not self._replaced:
                raise SlowSender(self._max_s) from None
            what = "the room that this call had for a message was needed for others"
            raise ServerBusy(what, retry_after_s=1.0) from None
        finally:
            self._timeout = None


async def _read(context: Context) -> bytes | None:
    data: Any = await context.read()
    if data is grpc.aio.EOF:
        return None
    assert isinstance(data, bytes), "the handlers are registered without a deserializer"
    return data


def _inflated(data: bytes, max_bytes: int) -> bytes:
    """The content of a gzip file. Raises `InvalidRequest` if it is damaged, has more than one part, or is too large."""
    inflater = zlib.decompressobj(GZIP_FORMAT)
    try:
        content = inflater.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise _refusal(f"is no valid gzip data ({error})") from None
    if len(content) > max_bytes:
        raise _refusal(
            f"expands to more than {max_bytes} bytes, which is the most "
            f"(server setting {env_variable('max_message_bytes')})"
        )
    if not inflater.eof:
        raise _refusal("is gzip data that is cut off")
    if inflater.unused_data:
        raise _refusal(f"is gzip data followed by {len(inflater.unused_data)} further bytes")
    return content


def _refusal(description: str) -> InvalidRequest:
    return InvalidRequest([Violation("request", description)])


def _small_budget(max_bytes: int, what: str) -> ByteBudget:
    return ByteBudget(max_bytes, what, replaceable_after_s=SMALL_REPLACEABLE_AFTER_S)
