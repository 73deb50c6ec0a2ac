"""Plain HTTP beside gRPC: /metrics for Prometheus, /healthz and /livez for probes.

It runs on threads of its own, so that it also answers, and says so, when the event loop does not. Whoever reaches it learns how
busy the server is, but no job's id.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler
from wsgiref.types import StartResponse, WSGIEnvironment

import prometheus_client
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import CollectorRegistry

from gramophone_server.errors import StartupError

__all__ = ["Probes"]

MOST_CONNECTIONS = 16  # at once; one more takes the place of the oldest, or is closed if all have just come
LONG_S = 1.0  # after which a connection may have to go; a scrape takes milliseconds
PATIENCE_S = 5.0  # for a whole request and its answer


class Probes:
    """Listens once it is made, and answers from `start` to `close`.

    ``ready`` and ``alive`` say what is wrong, or nothing.
    """

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, ready: Callable[[], str], alive: Callable[[], str]
    ) -> None:
        """Raises `StartupError` when the address cannot be listened on."""
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, address)
        except OSError as error:
            raise StartupError(
                f"cannot serve metrics on {host}:{port}: {error.strerror or error}; "
                "choose another port with --metrics-port (0: any free one, -1: none)"
            ) from None
        self._metrics = prometheus_client.make_wsgi_app(registry)
        self._answers = {"/healthz": ready, "/livez": alive}
        self._server.set_app(self._app)
        self._thread = threading.Thread(target=self._server.serve_forever, name="probes", daemon=True)

    @property
    def port(self) -> int:
        """That it listens on."""
        return self._server.server_port

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def close(self) -> None:
        """Answers no more. Blocks for up to half a second."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()

    def _app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            pages: Iterable[bytes] = self._metrics(environ, start_response)
            return pages
        if (answer := self._answers.get(path)) is None:
            status, text = "404 Not Found", "there are /metrics, /healthz (may jobs come) and /livez (is it alive)"
        elif wrong := answer():
            status, text = "503 Service Unavailable", wrong
        else:
            status, text = "200 OK", "ok"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")])
        return [f"{text}\n".encode()]


class _Server(ThreadingWSGIServer):
    """A thread for each connection, and at most so many: one that takes its time makes room for a new one."""

    def __init__(self, family: socket.AddressFamily, address: Any) -> None:
        self.address_family = family
        self._open: dict[Any, float] = {}  # connections, oldest first, and since when on the monotonic clock
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without HTTPServer's question to a name server for this host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread, if there is room."""
        now = time.monotonic()
        open_now = list(self._open.items())
        if len(open_now) >= MOST_CONNECTIONS:
            oldest, since = open_now[0]
            if now - since < LONG_S:
                return self.shutdown_request(request)
            self._end(oldest)
        self._open[request] = now
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The thread; it gives the room back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.pop(request, None)

    def service_actions(self) -> None:
        """Twice a second: who has had his time is let go. A socket's own timeout is for each byte of those who drip."""
        overdue_at = time.monotonic() - PATIENCE_S
        for request, since in list(self._open.items()):
            if since < overdue_at:
                self._end(request)

    def _end(self, request: Any) -> None:
        self._open.pop(request, None)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)  # its thread reads the end

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nobody's error."""


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Probes come every few seconds, so nothing is logged."""
