"""Calls of gRPC's own services, health checks and reflection: their limits, which are apart from those of the service's
calls, so that health checks are answered while those are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self, TypeVar

from google.protobuf.message import Message

from gramophone.recipe import Violation
from gramophone_server.errors import GramophoneError, InvalidRequest, ServerBusy
from gramophone_server.rpc.receiving import Context, Receiver, Room, parse
from gramophone_server.rpc.status import abort_status

__all__ = ["MAX_PER_CONNECTION", "StandardCalls"]

M = TypeVar("M", bound=Message)

MAX_PER_CONNECTION = 64  # a proxy sends the health checks of all its clients on one connection
BUSY_S = 1.0


class StandardCalls:
    """The active calls of one of these services: at most `max_calls`, whose messages arrive in `room`."""

    def __init__(self, receiver: Receiver, room: Room, max_calls: int) -> None:
        self.receiver, self.room, self.max_calls = receiver, room, max_calls
        self.by_connection: Counter[str] = Counter()

    def call(self, context: Context) -> StandardCall:
        """A call, for `async with` around everything that its handler does."""
        return StandardCall(self, context)


class StandardCall:
    """One call. An error of the server's own in its `async with` block becomes its status."""

    def __init__(self, calls: StandardCalls, context: Context) -> None:
        self._calls, self._context = calls, context
        self._connection = context.peer()
        self._admitted = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._admitted:
            self._calls.by_connection[self._connection] -= 1
            if not self._calls.by_connection[self._connection]:
                del self._calls.by_connection[self._connection]
        if isinstance(error, GramophoneError):
            code, message, trailers = abort_status(error)
            await self._context.abort(code, message, trailing_metadata=trailers)

    async def receive(self, kind: type[M]) -> M:
        """The client's first message. Raises `ServerBusy`, `SlowSender` and `InvalidRequest`."""
        self._admit()
        message = await self._receive_next(kind)
        if message is None:
            raise InvalidRequest([Violation("request", f"is missing; it must be a {kind.DESCRIPTOR.full_name}")])
        return message

    async def messages(self, kind: type[M]) -> AsyncIterator[M]:
        """All messages of the client. Raises as `receive` does."""
        self._admit()
        while (message := await self._receive_next(kind)) is not None:
            yield message

    async def _receive_next(self, kind: type[M]) -> M | None:
        received = await self._calls.receiver.read(self._context, self._calls.room, self._connection)
        if received is None:
            return None
        with received.share:
            return parse(received.data, kind)

    def _admit(self) -> None:
        calls = self._calls.by_connection
        if calls[self._connection] >= MAX_PER_CONNECTION or calls.total() >= self._calls.max_calls:
            raise ServerBusy("too many calls of this kind are open", BUSY_S)
        calls[self._connection] += 1
        self._admitted = True
