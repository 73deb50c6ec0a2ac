"""Plain HTTP next to gRPC: /metrics for Prometheus, /healthz and /livez for probes.

It runs on its own thread, so it also answers, and reports the problem, when the event loop is blocked. Clients that
reach it see how busy the server is, but no id of a job.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import prometheus_client
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import CollectorRegistry

from gramophone_server.errors import StartupError
from gramophone_server.telemetry.http_listener import Answer, HttpListener, Request

__all__ = ["HttpProbes", "MetricsPages"]

TEXT = [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")]
# A page is sent again for this many times as long as making it took, 10 ms or so: however many scrapes there are, both
# formats together take at most a tenth of a core.
PAGE_LIFETIMES = 20


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
        self._metrics = MetricsPages(registry)
        self._problems = {"/healthz": readiness_problem, "/livez": liveness_problem}
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._listener = HttpListener(family, address, self._answer, clock=clock)
        except OSError as error:
            raise StartupError(
                f"cannot serve metrics on {host}:{port}: {error.strerror or error}; "
                "choose another port with --metrics-port (0: any free one, -1: none)"
            ) from None

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._listener.port

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return self._listener.connections

    def start(self) -> None:
        """Starts to answer."""
        self._listener.start()

    def close(self) -> None:
        """Stops answering. Blocks for up to half a second."""
        self._listener.close()

    def _answer(self, request: Request) -> Answer:
        if request.path == "/metrics":
            return self._metrics.answer(request.headers.get("accept", ""))
        if (problem := self._problems.get(request.path)) is None:
            status, text = "404 Not Found", "the paths are /metrics, /healthz (accepts jobs) and /livez (alive)"
        elif found := problem():
            status, text = "503 Service Unavailable", found
        else:
            status, text = "200 OK", "ok"
        return Answer(status, TEXT, f"{text}\n".encode())


class MetricsPages:
    """The page of all metrics, in both formats of Prometheus, each kept for a moment. `clock` is monotonic, in seconds;
    tests replace it."""

    def __init__(self, registry: CollectorRegistry, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._clock = clock
        self._pages: dict[str, tuple[float, Answer]] = {}  # by content type: until when it is sent again

    def answer(self, accept: str) -> Answer:
        """The page, as OpenMetrics if `accept`, the header of the request, names that."""
        is_open = "application/openmetrics-text" in accept
        content_type = openmetrics.CONTENT_TYPE_LATEST if is_open else CONTENT_TYPE_PLAIN_0_0_4
        made_at = self._clock()
        until, answer = self._pages.get(content_type, (made_at, None))
        if answer is not None and made_at < until:
            return answer
        text = (openmetrics.generate_latest if is_open else prometheus_client.generate_latest)(self._registry)
        answer = Answer("200 OK", [("Content-Type", content_type)], text)
        now = self._clock()
        self._pages[content_type] = now + PAGE_LIFETIMES * (now - made_at), answer
        return answer
