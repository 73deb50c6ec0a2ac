"""A raw HTTP/2 client for calls that no gRPC client makes: any headers, any bytes, any window, and a stop anywhere.

    async with connection(address) as raw:
        stream = raw.open_stream("/gramophone.v1.StyleTransferService/GetJob")
        await stream.send(prefixed(b"", length=100))    # the prefix of a message that never comes
        answer = await stream.answer(within_s=30)        # Answer("ABORTED", "...", reason="SLOW_SENDER")

One event loop serves hundreds of connections. A connection reads and gives the server's windows back by itself, unless
`pause_reading` stops it, or a stream is opened with ``hold=True``. It never sends a byte that a test has not asked for,
apart from what HTTP/2 itself answers (acknowledgements, window updates).
"""

from __future__ import annotations

import asyncio
import base64
import socket
import struct
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import grpc
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from google.rpc import error_details_pb2, status_pb2

WINDOW = 65_535  # bytes; HTTP/2's own
PREFIX = 5  # bytes of gRPC's prefix of a message: whether it is compressed, and its length
CODES = {code.value[0]: code.name for code in grpc.StatusCode}

Headers = Sequence[tuple[str, str]]


class StreamOver(Exception):
    """The server has ended the stream or the connection, so it takes no more bytes."""


@dataclass(frozen=True)
class Answer:
    """How the server ended a stream."""

    code: str  # name of the gRPC status; RESET or CLOSED if the stream or its connection ended without one
    message: str = ""
    reason: str = ""  # of google.rpc.ErrorInfo
    retry_after_s: float | None = None  # of google.rpc.RetryInfo
    violations: tuple[tuple[str, str], ...] = ()  # of google.rpc.BadRequest: field, description
    messages: tuple[bytes, ...] = ()  # of the server, complete ones


def prefixed(message: bytes, *, compressed: bool = False, length: int | None = None) -> bytes:
    """A message as it is on the wire. ``length``: what the prefix claims, if that is not the truth."""
    return struct.pack(">BI", compressed, len(message) if length is None else length) + message


class RawStream:
    """One stream of a connection, and all that the server has sent on it."""

    def __init__(self, owner: RawConnection, number: int, *, hold: bool) -> None:
        self._owner, self.number, self._hold = owner, number, hold
        self.headers: dict[str, str] = {}
        self.trailers: dict[str, str] = {}
        self.data = bytearray()
        self.reset: int | None = None  # code of the server's RST_STREAM
        self._held = 0  # bytes received whose window the stream has not given back
        self._over = False
        self._changed = asyncio.Event()  # something has arrived: data, a window, an end

    @property
    def is_over(self) -> bool:
        """Whether the server has ended this stream."""
        return self._over or self._owner.is_closed

    @property
    def window(self) -> int:
        """Bytes that the stream and its connection take now."""
        if self.is_over:
            return 0
        return self._owner.h2.local_flow_control_window(self.number)

    def send_now(self, data: bytes | memoryview, *, end: bool = False) -> int:
        """Sends what the windows take now and returns its size. ``end``: ends the stream if that is everything."""
        if self.is_over:
            raise StreamOver
        sent = 0
        while sent < len(data) and (room := min(self.window, self._owner.h2.max_outbound_frame_size)) > 0:
            part = bytes(data[sent : sent + room])
            sent += len(part)
            self._owner.h2.send_data(self.number, part, end_stream=end and sent == len(data))
        if end and not data:
            self._owner.h2.end_stream(self.number)
        self._owner.flush()
        return sent

    async def send(self, data: bytes, *, end: bool = False, patience_s: float = 30.0) -> None:
        """Sends all data as the windows allow. Raises `StreamOver`, or TimeoutError if no window comes in that time.

        It copies only what it sends, so hundreds of streams that send the same bytes take the memory of one.
        """
        rest = memoryview(data)
        rest = rest[self.send_now(rest, end=end) :]
        while rest:
            self._changed.clear()
            if self.window == 0 and not self.is_over:
                async with asyncio.timeout(patience_s):
                    await self._changed.wait()
            rest = rest[self.send_now(rest, end=end) :]
            await self._owner.drain(patience_s)
        await self._owner.drain(patience_s)

    def cancel(self, code: h2.errors.ErrorCodes = h2.errors.ErrorCodes.CANCEL) -> None:
        """Resets the stream, as a client does that cancels a call."""
        if not self.is_over:
            self._over = True
            self._owner.h2.reset_stream(self.number, code)
            self._owner.flush()

    def release(self, size: int | None = None) -> None:
        """Gives back the window of ``size`` bytes (default: all) that were received on a stream with ``hold=True``."""
        size = self._held if size is None else min(size, self._held)
        if size and not self.is_over:
            self._held -= size
            with suppress(h2.exceptions.StreamClosedError):  # its end was in the bytes that are being read
                self._owner.h2.increment_flow_control_window(size, self.number)
            self._owner.flush()

    async def wait_for_data(self, size: int, within_s: float) -> None:
        """Waits until so many bytes have arrived, or the stream is over."""
        async with asyncio.timeout(within_s):
            while len(self.data) < size and not self.is_over:
                self._changed.clear()
                await self._changed.wait()

    async def answer(self, within_s: float) -> Answer:
        """Waits for the end of the stream. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while not self.is_over:
                self._changed.clear()
                await self._changed.wait()
        return self._answer()

    def _answer(self) -> Answer:
        ending = self.trailers or self.headers  # a call that fails at once has its status in its only headers
        if "grpc-status" not in ending:
            return Answer("CLOSED" if self.reset is None else "RESET", f"error code {self.reset}")
        coded = ending.get("grpc-status-details-bin", "")
        status = status_pb2.Status.FromString(base64.b64decode(coded + "=" * (-len(coded) % 4)))
        info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
        retry_after_s = None
        for detail in status.details:
            for kind in (info, bad):
                detail.Unpack(kind)  # False, and nothing else, if it is another kind
            if detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
        return Answer(
            CODES.get(int(ending["grpc-status"]), ending["grpc-status"]),
            urllib.parse.unquote(ending.get("grpc-message", "")),
            info.reason,
            retry_after_s,
            tuple((violation.field, violation.description) for violation in bad.field_violations),
            tuple(self.messages()),
        )

    def messages(self) -> list[bytes]:
        """The complete messages that have arrived."""
        messages, at = [], 0
        while at + PREFIX <= len(self.data):
            end = at + PREFIX + struct.unpack_from(">I", self.data, at + 1)[0]
            if end > len(self.data):
                break
            messages.append(bytes(self.data[at + PREFIX : end]))
            at = end
        return messages

    # What the connection reports

    def received(self, event: h2.events.Event) -> None:
        """Takes an event of this stream."""
        match event:
            case h2.events.ResponseReceived():
                self.headers = dict(event.headers or ())
            case h2.events.TrailersReceived():
                self.trailers = dict(event.headers or ())
            case h2.events.DataReceived():
                self.data += event.data or b""
                if size := event.flow_controlled_length:
                    self._owner.h2.increment_flow_control_window(size)
                    self._held += size
                    if not self._hold:
                        self.release()
            case h2.events.StreamReset():
                self.reset, self._over = int(event.error_code or 0), True
            case h2.events.StreamEnded():
                self._over = True
        self._changed.set()

    def wake(self) -> None:
        """Wakes whoever waits: the connection has a larger window, or is closed."""
        self._changed.set()


class RawConnection(asyncio.Protocol):
    """One connection. Made by `connect`."""

    def __init__(self, window: int) -> None:
        config = h2.config.H2Configuration(
            client_side=True, header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.h2 = h2.connection.H2Connection(config)
        self.h2.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.streams: dict[int, RawStream] = {}
        self.closed = asyncio.Event()
        self.goaway: int | None = None  # code of the server's GOAWAY
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def is_closed(self) -> bool:
        """Whether the connection has ended, from either side."""
        return self.closed.is_set()

    @property
    def peer(self) -> str:
        """The name that gRPC gives this end, at the server."""
        host, port = self._transport.get_extra_info("sockname")
        return f"ipv4:{host}:{port}"

    def open_stream(
        self, path: str, headers: Headers = (), *, method: str = "POST", end: bool = False, hold: bool = False
    ) -> RawStream:
        """Opens a stream with these headers after gRPC's own. ``hold``: the server gets no window back on it.

        Raises `StreamOver` if the connection has ended, and h2's TooManyStreamsError above the server's own limit.
        """
        if self.is_closed:
            raise StreamOver
        own = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "localhost")]
        own += [("te", "trailers"), ("content-type", "application/grpc")]
        number = self.h2.get_next_available_stream_id()
        self.h2.send_headers(number, [*own, *headers], end_stream=end)
        stream = self.streams[number] = RawStream(self, number, hold=hold)
        self.flush()
        return stream

    def send_bytes(self, data: bytes) -> None:
        """Sends bytes past HTTP/2's state, for example a frame that is not allowed now."""
        self._transport.write(data)

    def flush(self) -> None:
        """Sends what HTTP/2 has to send."""
        if (data := self.h2.data_to_send()) and not self.is_closed:
            self._transport.write(data)

    async def drain(self, patience_s: float = 30.0) -> None:
        """Waits until the socket has taken most of what was written. Raises TimeoutError."""
        if not self._writable.is_set():
            async with asyncio.timeout(patience_s):
                await self._writable.wait()

    def pause_reading(self) -> None:
        """Reads nothing more from the socket, not even the server's acknowledgements."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Reads again."""
        self._transport.resume_reading()

    def abort(self) -> None:
        """Closes the connection with a TCP reset."""
        sock = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    async def close(self) -> None:
        """Closes the connection without a word."""
        self._transport.abort()
        await self.closed.wait()

    # asyncio's protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.h2.initiate_connection()
        self.flush()

    def data_received(self, data: bytes) -> None:
        try:
            events = self.h2.receive_data(data)
        except h2.exceptions.ProtocolError:  # answered with GOAWAY by h2
            self.flush()
            self._transport.close()
            return
        for event in events:
            number = getattr(event, "stream_id", None)
            if isinstance(event, h2.events.ConnectionTerminated):
                self.goaway = int(event.error_code or 0)
                self._transport.close()
            elif number and (stream := self.streams.get(number)) is not None:
                stream.received(event)
            else:
                for stream in self.streams.values():  # a window of the connection, or settings
                    stream.wake()
        self.flush()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set()
        self._writable.set()
        for stream in self.streams.values():
            stream.wake()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()


async def connect(address: str, *, window: int = WINDOW) -> RawConnection:
    """Opens a connection whose streams each take ``window`` unread bytes. Raises OSError."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    _, raw = await loop.create_connection(lambda: RawConnection(window), host.strip("[]"), int(port))
    return raw


@asynccontextmanager
async def connection(address: str, *, window: int = WINDOW) -> AsyncIterator[RawConnection]:
    """A connection for the length of the block."""
    raw = await connect(address, window=window)
    try:
        yield raw
    finally:
        with suppress(OSError):
            await raw.close()
