"""Reads the messages of clients, so that whatever they send takes a bounded amount of memory and time.

gRPC keeps at most the window of a stream, 64 KiB, until the server asks for its message. So a message is asked for only
when a budget has room for the largest one, and its fields are counted before protobuf makes objects of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from gramophone.recipe import Violation
from gramophone_server.config import METADATA_BYTES, PROBE_READS, SMALL_READS, Limits, env_variable
from gramophone_server.errors import GramophoneError, InvalidRequest, ServerBusy, SlowSender
from gramophone_server.rpc.byte_budget import OF_ONE_CONNECTION, ByteBudget, Share
from gramophone_server.rpc.event_loop import call_after_events
from gramophone_server.rpc.field_counts import check_fields
from gramophone_server.rpc.inflating import GZIP_START, Inflater
from gramophone_server.rpc.send_timeout import READING_S
from gramophone_server.rpc.timeouts import Timeouts

__all__ = ["MAX_SMALL_BYTES", "Context", "Headers", "Received", "Receiver", "Room", "check_headers", "parse"]

M = TypeVar("M", bound=Message)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Headers: TypeAlias = "Iterable[tuple[str, str | bytes]]"

# Of a message without images. gRPC has one limit for all methods, so each may take `max_message_bytes` until it is
# complete.
MAX_SMALL_BYTES = 2**16
# Honest messages without images come with their call. So one that has not come after this time makes room if others
# wait: the crowd of 2000 calls that never send theirs has made room after 1.3 s.
SMALL_REPLACEABLE_AFTER_S = 0.02
CONTROLLERS_OF_ONE = 7 / 8  # of the places for controllers that others leave; as for jobs, see `Scheduler.reserve`
# For a place: those who read nothing are told to leave after `READING_S`, and disconnected after as much again.
CONTROLLER_WAIT_S = 2.5 * READING_S
HEADER_BYTES = 32  # of each header, beside its name and value, as HTTP/2 counts them


class Room(NamedTuple):
    """Where messages of one kind arrive: their budget, and the largest one; by default one without images."""

    budget: ByteBudget
    max_bytes: int = MAX_SMALL_BYTES


class Received(NamedTuple):
    """The bytes of a message, and the share that they are counted in."""

    data: bytes
    share: Share


class Receiver:
    """The rooms in which the messages of one server arrive, and what decompresses them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        largest = limits.max_message_bytes
        self.requests = Room(
            ByteBudget(
                limits.max_receiving_bytes,
                "the room for messages that arrive or are not handled yet is used up "
                f"(server setting {env_variable('max_receiving_bytes')})",
                of_one=OF_ONE_CONNECTION,
            ),
            largest,
        )
        self.small = Room(_small_budget(SMALL_READS * largest, "too many messages are arriving"))
        self.probes = Room(_small_budget(PROBE_READS * largest, "too many health checks are arriving"))
        self.commands = Room(
            ByteBudget(
                limits.max_controllers * largest,
                "too many clients control a job (server settings "
                f"{env_variable('max_running')} and {env_variable('max_queued')})",
                of_one=CONTROLLERS_OF_ONE,
                replaceable_after_s=READING_S,
                max_wait_s=CONTROLLER_WAIT_S,
            )
        )
        self._idle: Timeouts[_Wait] = Timeouts(limits.max_idle_s, _Wait.expire)
        self._inflater = Inflater()

    def close(self) -> None:
        """Stops the thread."""
        self._idle.close()
        self._inflater.close()

    async def read(self, context: Context, room: Room, owner: str, kept: Share | None = None) -> Received | None:
        """The next message of a client, decompressed; None if it will send no further one.

        ``owner`` is its connection, ``kept`` what the call already holds in this room. Raises `ServerBusy`,
        `SlowSender` and `InvalidRequest`.
        """
        size = self._limits.max_message_bytes
        with _Wait(self._idle) as wait:
            share = room.budget.try_take(size, owner)
            if share is None:
                if kept is not None:
                    kept.replaceable_at_last(wait.replace)
                try:
                    share = await room.budget.take(size, owner)
                finally:
                    if kept is not None:
                        kept.keep()
            try:
                share.replaceable(partial(wait.replace, share))
                data = await wait.message(context)
                share.keep()
                if data is None:
                    share.give_back()
                    return None
                share.was_prompt()
                if data.startswith(GZIP_START):
                    data = await self._inflate(data, room, owner)
                _check_size(data, room)
                share.shrink_to(len(data))
            except BaseException:
                share.give_back()
                raise
        return Received(data, share)

    async def read_command(self, context: Context, owner: str) -> bytes | None:
        """The next command of a controller, which may take any time to send it; None if it will send no further one.
        The caller has a share of `command_share`. ``owner`` is its connection."""
        data = await _read(context)
        if data is not None:
            if data.startswith(GZIP_START):
                data = await self._inflate(data, self.commands, owner)
            _check_size(data, self.commands)
        return data

    async def command_share(self, owner: str) -> Share:
        """What one controller may send while nothing else is read from it. Raises `ServerBusy`."""
        return await self.commands.budget.take(self._limits.max_message_bytes, owner)

    @contextlib.contextmanager
    def giving_way(self, share: Share) -> Iterator[None]:
        """Others may have this share while the body waits. The body is cancelled then. Raises `ServerBusy`."""
        with _Wait(self._idle) as wait:
            share.replaceable(wait.replace)
            try:
                yield
            finally:
                share.keep()

    async def _inflate(self, data: bytes, room: Room, owner: str) -> bytes:
        """The content of a compressed message. Raises `InvalidRequest`."""
        if room.max_bytes == MAX_SMALL_BYTES:
            _check_size(data, room)
            most = "which is the most of a message without images; shorten its fields"
        else:
            setting = f"server setting {env_variable('max_message_bytes')}"
            most = f"which is the most ({setting}); upload images, in chunks, and name them by their digests"
        return await self._inflater.inflate(data, room.max_bytes, most, owner)


def check_headers(headers: Headers) -> None:
    """Raises `InvalidRequest` if the headers of a call are too large. gRPC itself refuses them only from a client that
    has acknowledged the server's settings, and lets others send 16 MiB."""
    size = sum(len(name) + len(value) + HEADER_BYTES for name, value in headers)
    if size > 2 * METADATA_BYTES:
        raise _refusal(f"must have at most {2 * METADATA_BYTES} bytes of headers, got {size}")


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
    """For `with` around all that one message of a client needs. Raises there why it has ended, if it was ended."""

    def __init__(self, idle: Timeouts[_Wait]) -> None:
        self._idle = idle
        self._error: GramophoneError | None = None  # why it ends
        self._is_over = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a handler runs in a task"
        self._task = task
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over = True
        if self._error is not None and kind is asyncio.CancelledError and self._task.uncancel() == 0:
            raise self._error from None

    async def message(self, context: Context) -> bytes | None:
        """The bytes of the message; None if the client will send none."""
        self._idle.start(self)
        try:
            return await _read(context)
        finally:
            self._idle.stop(self)

    def expire(self) -> None:
        """The client has taken too long."""
        self._end(SlowSender(self._idle.after_s))

    def replace(self, share: Share | None = None) -> None:
        """Others need the room. A message that has already come is taken nevertheless: the server was slow, not the
        client. ``share``: what the client has kept idle."""
        call_after_events(partial(self._make_room, share))

    def _make_room(self, share: Share | None) -> None:
        error = ServerBusy("the room that this call had for a message was needed for others", retry_after_s=1.0)
        if self._end(error) and share is not None:
            share.was_slow()

    def _end(self, error: GramophoneError) -> bool:
        if self._error is not None or self._is_over:
            return False
        self._error = error
        self._task.cancel()
        return True


async def _read(context: Context) -> bytes | None:
    data: Any = await context.read()
    if data is grpc.aio.EOF:
        return None
    assert isinstance(data, bytes), "the handlers are registered without a deserializer"
    return data


def _check_size(data: bytes, room: Room) -> None:
    """Raises `InvalidRequest`."""
    if len(data) > room.max_bytes:
        raise _refusal(f"must have at most {room.max_bytes} bytes, because it carries no image, got {len(data)}")


def _refusal(description: str) -> InvalidRequest:
    return InvalidRequest([Violation("request", description)])


def _small_budget(max_bytes: int, what: str) -> ByteBudget:
    return ByteBudget(max_bytes, what, of_one=OF_ONE_CONNECTION, replaceable_after_s=SMALL_REPLACEABLE_AFTER_S)
