"""Calls of gRPC's own services, health checks and reflection: their limits, which are apart from those of the service's
calls, so that health checks are answered while those are refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self, TypeVar

from google.protobuf.message import Message

from gramophone.recipe import Violation
from gramophone_server.errors import GramophoneError, InvalidRequest
from gramophone_server.rpc.call_places import CallPlaces
from gramophone_server.rpc.receiving import Context, Receiver, Room, check_headers, parse
from gramophone_server.rpc.status import abort_status

__all__ = ["MAX_PER_CONNECTION", "StandardCalls"]

M = TypeVar("M", bound=Message)

MAX_PER_CONNECTION = 64  # a proxy sends the health checks of all its clients on one connection


class StandardCalls:
    """The active calls of one of these services: at most `max_calls`, and one of each connection. Their messages arrive
    in `room`."""

    def __init__(self, receiver: Receiver, room: Room, max_calls: int, kind: str) -> None:
        """``kind``: see `CallPlaces`."""
        self.receiver, self.room = receiver, room
        self.places = CallPlaces(max_calls, MAX_PER_CONNECTION, kind)

    def call(self, context: Context) -> StandardCall:
        """A call, for `async with` around everything that its handler does."""
        return StandardCall(self, context)


class StandardCall:
    """One call. An error of the server's own in its `async with` block becomes its status."""

    def __init__(self, calls: StandardCalls, context: Context) -> None:
        self._calls, self._context = calls, context
        self._connection = context.peer()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, GramophoneError):
            code, message, trailers = abort_status(error)
            await self._context.abort(code, message, trailing_metadata=trailers)

    async def receive(self, kind: type[M]) -> M:
        """The client's first message. Raises `ServerBusy`, `SlowSender` and `InvalidRequest`."""
        self._take_place()
        message = await self._receive_next(kind)
        if message is None:
            raise InvalidRequest([Violation("request", f"is missing; it must be a {kind.DESCRIPTOR.full_name}")])
        return message

    async def messages(self, kind: type[M]) -> AsyncIterator[M]:
        """All messages of the client. Raises as `receive` does."""
        self._take_place()
        while (message := await self._receive_next(kind)) is not None:
            yield message

    async def _receive_next(self, kind: type[M]) -> M | None:
        received = await self._calls.receiver.read(self._context, self._calls.room, self._connection)
        if received is None:
            return None
        with received.share:
            return parse(received.data, kind)

    def _take_place(self) -> None:
        check_headers(self._context.invocation_metadata() or ())
        self._calls.places.take(self._connection)
        # Not at the end of the handler: gRPC keeps the response until the client reads it.
        self._context.add_done_callback(self._give_back_place)  # type: ignore[arg-type]  # the stub asks for its own class

    def _give_back_place(self, _: object) -> None:
        self._calls.places.give_back(self._connection)
