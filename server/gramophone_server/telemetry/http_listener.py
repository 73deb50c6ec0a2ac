"""Short HTTP requests on one thread: many may be open, and none that says nothing holds a place that another needs.

A connection is a socket, a few hundred bytes and one descriptor. Each has one request, which ends with its headers, and
one answer. If `MAX_CONNECTIONS` are open, a new one replaces the oldest that has not sent its request; a request that
has arrived is always answered first.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["MAX_CONNECTIONS", "MAX_REQUEST_BYTES", "REQUEST_TIMEOUT_S", "Answer", "HttpListener", "Request"]

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 128  # open at a time: at 1,000 a second, a client has 128 ms to send its request
MAX_REQUEST_BYTES = 8192  # of a request's headers
REQUEST_TIMEOUT_S = 5.0  # for a whole request and its answer
# The system keeps connections that are not accepted yet; more than this are accepted in the next turn. A full turn is
# followed by a pause, so that no flood takes the interpreter from the event loop.
BACKLOG = 1024
ACCEPTS_PER_TURN = 64
FULL_TURN_PAUSE_S = 0.005
NO_DESCRIPTOR_PAUSE_S = 0.1  # without any descriptor to accept with
TURN_S = 0.5  # longest wait for an event
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Request(NamedTuple):
    """A complete request. Header names are in lower case."""

    path: str
    headers: dict[str, str]


class Answer(NamedTuple):
    """Status, as "200 OK"; headers but those of the connection; body."""

    status: str
    headers: list[tuple[str, str]]
    body: bytes


class _Connection:
    def __init__(self, accepted: socket.socket, opened_at: float) -> None:
        self.socket, self.opened_at = accepted, opened_at
        self.received = b""
        self.unsent: list[memoryview] | None = None  # None until the request has arrived


class HttpListener:
    """Listens from its construction on, and answers from `start` to `close`.

    `answer` makes the answers, on the listener's thread. `clock` is monotonic, in seconds. Raises OSError if the
    address cannot be listened on.
    """

    def __init__(
        self,
        family: socket.AddressFamily,
        address: Any,
        answer: Callable[[Request], Answer],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._answer = answer
        self._clock = clock
        self._open: dict[int, _Connection] = {}  # by descriptor, oldest first
        self._silent: dict[int, _Connection] = {}  # of those, the ones whose request has not arrived
        self._is_closing = False
        self._accepts_again_at: float | None = None  # after a pause without descriptors
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            self._socket.listen(BACKLOG)
            self._socket.setblocking(False)
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._socket, selectors.EVENT_READ)
            self._poll = select.poll()  # which takes no descriptor
            self._poll.register(self._socket, select.POLLIN)
            # With it, a process that has used up its descriptors still answers, one connection at a time.
            self._spare: int | None = os.open(os.devnull, os.O_RDONLY)
        except BaseException:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._run, name="probes", daemon=True)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        number: int = self._socket.getsockname()[1]
        return number

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._open)

    def start(self) -> None:
        """Starts to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stops answering. Blocks for up to half a second."""
        self._is_closing = True
        if self._thread.is_alive():
            self._thread.join()
        for connection in [*self._open.values()]:
            self._close(connection)
        self._selector.close()
        self._socket.close()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _run(self) -> None:
        while not self._is_closing:
            try:
                self._turn()
            except Exception:
                log.exception("the probes have a defect")
                time.sleep(NO_DESCRIPTOR_PAUSE_S)

    def _turn(self) -> None:
        ready = self._selector.select(TURN_S if self._accepts_again_at is None else NO_DESCRIPTOR_PAUSE_S)
        has_new = False
        for key, _ in ready:
            if key.fileobj is self._socket:
                has_new = True
            else:
                self._proceed(key.data)
        if has_new:
            self._accept_all()
        self._end_overdue()
        if self._accepts_again_at is not None and self._clock() >= self._accepts_again_at:
            self._accepts_again_at = None
            self._selector.register(self._socket, selectors.EVENT_READ)

    def _accept_all(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                accepted = self._accept()
            except BlockingIOError:
                return
            except ConnectionError:  # it has gone before it was accepted
                continue
            if accepted is None:
                return
            if len(self._open) >= MAX_CONNECTIONS:
                self._make_room()
            connection = _Connection(accepted, self._clock())
            accepted.setblocking(False)
            self._open[accepted.fileno()] = self._silent[accepted.fileno()] = connection
            self._selector.register(accepted, selectors.EVENT_READ, connection)
            self._proceed(connection)  # its request is often there already
        time.sleep(FULL_TURN_PAUSE_S)

    def _accept(self) -> socket.socket | None:
        """A new connection. Without a descriptor for it, the oldest silent one, or the spare, gives its own; None if
        there is none, and then nothing is accepted for a while. Raises `BlockingIOError` if none is waiting."""
        while True:
            try:
                return self._socket.accept()[0]
            except OSError as error:
                if error.errno not in NO_DESCRIPTOR:
                    raise
            if not self._poll.poll(0):  # the system asks for a descriptor before it looks for a connection
                raise BlockingIOError
            if self._silent:
                self._make_room()
            elif self._spare is not None:
                os.close(self._spare)
                self._spare = None
            else:
                # The waiting connection would wake the selector at once, over and over.
                self._selector.unregister(self._socket)
                self._accepts_again_at = self._clock() + NO_DESCRIPTOR_PAUSE_S
                return None

    def _make_room(self) -> None:
        """Closes a connection: the oldest without a request, else the oldest. One whose request has just arrived is
        answered instead, which closes it as well."""
        while self._silent:
            oldest = next(iter(self._silent.values()))
            self._proceed(oldest)
            if not oldest.unsent:
                self._close(oldest)
                return
        if self._open:
            self._close(next(iter(self._open.values())))

    def _end_overdue(self) -> None:
        """Ends connections that are too old. A timeout for each read would start anew with each byte."""
        overdue_at = self._clock() - REQUEST_TIMEOUT_S
        while self._open and (oldest := next(iter(self._open.values()))).opened_at < overdue_at:
            self._close(oldest)

    def _proceed(self, connection: _Connection) -> None:
        """Reads and answers as far as that is possible now."""
        try:
            if connection.unsent is None:
                self._read(connection)
            if connection.unsent is not None:
                self._send(connection)
        except BlockingIOError:
            pass
        except OSError:  # the client has gone
            self._close(connection)

    def _read(self, connection: _Connection) -> None:
        received = connection.socket.recv(MAX_REQUEST_BYTES + 1 - len(connection.received))
        connection.received += received
        end = connection.received.replace(b"\r\n", b"\n").find(b"\n\n")
        if end < 0 and not received:  # the client sends nothing more
            return self._close(connection)
        if end < 0 and len(connection.received) <= MAX_REQUEST_BYTES:
            return None
        del self._silent[connection.socket.fileno()]
        head, connection.received = connection.received, b""
        connection.unsent = [memoryview(part) for part in self._answered(head, is_complete=end >= 0)]
        self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)

    def _answered(self, head: bytes, *, is_complete: bool) -> tuple[bytes, bytes]:
        """Headers and body of the answer to a request. Not in one piece: many connections may share a body."""
        method = ""
        if not is_complete:
            text = f"a request may have {MAX_REQUEST_BYTES} bytes of headers\n"
            answer = Answer("431 Request Header Fields Too Large", [("Content-Type", "text/plain")], text.encode())
        elif (parsed := _parsed(head)) is None:
            answer = Answer("400 Bad Request", [("Content-Type", "text/plain")], b"this is no request of HTTP\n")
        else:
            method, request = parsed
            try:
                answer = self._answer(request)
            except Exception:
                log.exception("%s cannot be answered", request.path)
                text = "this cannot be answered; the log has the reason\n"
                answer = Answer("500 Internal Server Error", [("Content-Type", "text/plain")], text.encode())
        lines = [
            f"HTTP/1.1 {answer.status}",
            *(f"{name}: {value}" for name, value in answer.headers),
            f"Content-Length: {len(answer.body)}",
            "Connection: close",
        ]
        return "\r\n".join([*lines, "", ""]).encode(), b"" if method == "HEAD" else answer.body

    def _send(self, connection: _Connection) -> None:
        parts = connection.unsent or []
        while parts:
            sent = connection.socket.send(parts[0])
            parts[0] = parts[0][sent:]
            if not parts[0]:
                parts.pop(0)
        self._close(connection)

    def _close(self, connection: _Connection) -> None:
        number = connection.socket.fileno()
        if number < 0:
            return
        self._open.pop(number, None)
        self._silent.pop(number, None)
        with contextlib.suppress(KeyError):  # it could not be registered
            self._selector.unregister(connection.socket)
        connection.socket.close()
        connection.unsent = None
        if self._spare is None:
            with contextlib.suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY)


def _parsed(head: bytes) -> tuple[str, Request] | None:
    """Method and request; None if this is no HTTP."""
    first, *lines = head.decode("latin-1").replace("\r\n", "\n").partition("\n\n")[0].split("\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        return None
    method, target, _ = parts
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return method, Request(target.partition("?")[0], headers)
