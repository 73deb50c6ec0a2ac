"""The messages of one call's client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

from gramophone.recipe import Violation
from gramophone_server.errors import InvalidRequest
from gramophone_server.rpc.byte_budget import Share
from gramophone_server.rpc.call_places import CallPlaces
from gramophone_server.rpc.event_loop import events_handled
from gramophone_server.rpc.receiving import Context, Headers, Receiver, check_headers, parse

__all__ = ["Incoming"]

M = TypeVar("M", bound=Message)

# The longest time between the end of a cancelled call's messages and the cancellation of its handler. Without it, such
# a call would sometimes end as one whose client has sent no message.
CANCELLATION_S = 0.05
WITH_IMAGES = {"Stylize", "StylizeStream", "StylizeInteractive", "UploadImage"}  # whose messages may be large


class Incoming:
    """The messages of one call's client. The call takes a place, and nothing is read, before the first is asked for."""

    def __init__(
        self,
        receiver: Receiver,
        places: CallPlaces,
        method: str,
        context: Context,
        headers: Headers,
        connection: str,
        on_received: Callable[[], None],
    ) -> None:
        """``on_received`` is called for each message that has arrived."""
        self._receiver, self._places = receiver, places
        self._room = receiver.requests if method in WITH_IMAGES else receiver.small
        self._context, self._headers, self._connection = context, headers, connection
        self._on_received = on_received
        self._has_place = False
        self._share: Share | None = None  # of all messages so far
        self.commands: Share | None = None  # what a controller may send

    async def receive(self, kind: type[M]) -> M:
        """The one message of a method whose client sends one. Raises as `receive_next` does."""
        message = await self.receive_next(kind)
        if message is None:
            await asyncio.sleep(CANCELLATION_S)
            await events_handled()
            description = f"is missing: the client has ended its side of the call without a {kind.DESCRIPTOR.full_name}"
            raise InvalidRequest([Violation("request", description)])
        return message

    async def receive_next(self, kind: type[M]) -> M | None:
        """The next message; None if the client has ended its side. The bytes of all messages so far count as received
        until `release`. Raises `SlowSender`, `InvalidRequest`, and `ServerBusy`, also if there is no place for a call.
        """
        if not self._has_place:
            check_headers(self._headers)
            self._headers = ()
            self._places.take(self._connection)
            self._has_place = True
        received = await self._receiver.read(self._context, self._room, self._connection, self._share)
        if received is None:
            return None
        if self._share is None:
            self._share = received.share
        else:
            self._share.absorb(received.share)
        self._on_received()
        return parse(received.data, kind)

    async def receive_command(self, kind: type[M]) -> M | None:
        """The next command of a controller; None if the client has ended its side. It may take any time."""
        data = await self._receiver.read_command(self._context, self._connection)
        if data is None:
            return None
        self._on_received()
        return parse(data, kind)

    async def reserve_commands(self) -> None:
        """Reserves the memory for what a client may send as a command, when it is its turn. Raises `ServerBusy`."""
        with self.giving_way():
            self.commands = await self._receiver.command_share(self._connection)

    @contextlib.contextmanager
    def giving_way(self) -> Iterator[None]:
        """While its body waits for others than this client, these may have the room of its messages so far. If they
        need it, the body is cancelled. Raises `ServerBusy` then."""
        if self._share is None:
            yield
        else:
            with self._receiver.giving_way(self._share):
                yield

    @property
    def received_bytes(self) -> int:
        """The bytes of the messages so far, until they are released or their share is taken."""
        return 0 if self._share is None else self._share.bytes

    def take_share(self) -> Share | None:
        """The share of the messages so far. The caller gives it back, when they are handled."""
        share, self._share = self._share, None
        return share

    def release(self) -> None:
        """The messages so far are handled, and the caller has dropped them."""
        if self._share is not None:
            self._share.give_back()
            self._share = None

    def close(self) -> None:
        """The call has ended."""
        self.release()
        if self.commands is not None:
            self.commands.give_back()

    def give_back_place(self) -> None:
        """Nothing of the call is left in gRPC. Further calls change nothing."""
        if self._has_place:
            self._has_place = False
            self._places.give_back(self._connection)
