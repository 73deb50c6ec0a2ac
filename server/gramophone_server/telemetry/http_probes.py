"""Plain HTTP next to gRPC: /metrics for Prometheus, /healthz and /livez for probes.

It runs on its own threads, so it also answers, and reports the problem, when the event loop is blocked. Clients that
reach it see how busy the server is, but no id of a job.
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

__all__ = ["HttpProbes"]

# Open connections. One more replaces the oldest if that is older than REPLACEABLE_AFTER_S, and is closed otherwise.
MAX_CONNECTIONS = 16
REPLACEABLE_AFTER_S = 1.0  # a scrape takes milliseconds
REQUEST_TIMEOUT_S = 5.0  # for a whole request and its response


class HttpProbes:
    """Listens from its construction on, and answers from `start` to `close`.

    ``readiness_problem`` and ``liveness_problem`` return what is wrong, or an empty string.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        readiness_problem: Callable[[], str],
        liveness_problem: Callable[[], str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `StartupError` if the address cannot be listened on. The monotonic `clock` is for tests to replace."""
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, address, clock)
        except OSError as error:
            raise StartupError(
                f"cannot serve metrics on {host}:{port}: {error.strerror or error}; "
                "choose another port with --metrics-port (0: any free one, -1: none)"
            ) from None
        self._metrics = prometheus_client.make_wsgi_app(registry)
        self._problems = {"/healthz": readiness_problem, "/livez": liveness_problem}
        self._server.set_app(self._app)
        self._thread = threading.Thread(target=self._server.serve_forever, name="probes", daemon=True)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._server.server_port

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._server.open)

    def start(self) -> None:
        """Starts to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stops answering. Blocks for up to half a second."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()

    def _app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            pages: Iterable[bytes] = self._metrics(environ, start_response)
            return pages
        if (problem := self._problems.get(path)) is None:
            status, text = "404 Not Found", "the paths are /metrics, /healthz (accepts jobs) and /livez (alive)"
        elif found := problem():
            status, text = "503 Service Unavailable", found
        else:
            status, text = "200 OK", "ok"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")])
        return [f"{text}\n".encode()]


class _Server(ThreadingWSGIServer):
    """Runs each connection on a thread, at most `MAX_CONNECTIONS` at a time; a slow one makes room for a new one."""

    def __init__(self, family: socket.AddressFamily, address: Any, clock: Callable[[], float]) -> None:
        self.address_family = family
        self.open: dict[Any, float] = {}  # open connections, oldest first, and when each was opened
        self._clock = clock
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Skips HTTPServer's look-up of this host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread, if there is room."""
        now = self._clock()
        open_now = list(self.open.items())
        if len(open_now) >= MAX_CONNECTIONS:
            oldest, opened_at = open_now[0]
            if now - opened_at < REPLACEABLE_AFTER_S:
                return self.shutdown_request(request)
            self._end(oldest)
        self.open[request] = now
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Runs on the thread, and makes room at its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.open.pop(request, None)

    def service_actions(self) -> None:
        """Ends overdue connections, twice a second. A socket's own timeout would start anew with each byte."""
        overdue_at = self._clock() - REQUEST_TIMEOUT_S
        for request, opened_at in list(self.open.items()):
            if opened_at < overdue_at:
                self._end(request)

    def _end(self, request: Any) -> None:
        self.open.pop(request, None)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)  # its thread then reads the end of the stream

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that have disconnected."""


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Logs nothing, because probes arrive every few seconds."""
