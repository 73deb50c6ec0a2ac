"""What the server counts, in Prometheus' terms and under the names that dashboards know; see `vitals` for what it *is* just now.

The `grpc_server_*` family is the one of go-grpc-middleware, codes in Go's spelling ("Canceled"). Labels take a bounded set of
values: methods, codes and reasons of the contract, and classes of size instead of sizes, which callers choose.
"""

from __future__ import annotations

from typing import NamedTuple

import grpc
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.domain.job_state import Shape

__all__ = ["METHODS", "SERVICE", "Method", "Metrics", "size_class"]

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody plots

SERVICE = pb.DESCRIPTOR.services_by_name["StyleTransferService"]

# Seconds. Calls last from a refusal's microseconds to the minutes of a large picture; iterations from a GPU's 0.4 ms on.
CALL_S = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
WAIT_S = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
ITERATION_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
LAG_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LARGEST_CLASS = 4096  # pixels; what is larger counts as "larger"


class Method(NamedTuple):
    """An RPC of the service."""

    name: str
    client_streams: bool
    server_streams: bool

    @property
    def labels(self) -> tuple[str, str, str]:
        """Kind, service and name, as the grpc_server_* metrics label them."""
        kind = {
            (False, False): "unary",
            (False, True): "server_stream",
            (True, False): "client_stream",
            (True, True): "bidi_stream",
        }[self.client_streams, self.server_streams]
        return kind, SERVICE.full_name, self.name


METHODS = {m.name: Method(m.name, m.client_streaming, m.server_streaming) for m in SERVICE.methods}


class Metrics:
    """The counters and histograms of one server, in a `registry` of its own. Any thread may call its methods."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        rpc = ("grpc_type", "grpc_service", "grpc_method")
        self._started = Counter("grpc_server_started", "RPCs that have begun", rpc, registry=registry)
        self._handled = Counter(
            "grpc_server_handled",
            "RPCs that have ended, by what their client sees",
            (*rpc, "grpc_code"),
            registry=registry,
        )
        self._received = Counter("grpc_server_msg_received", "messages of clients", rpc, registry=registry)
        self._sent = Counter("grpc_server_msg_sent", "messages to clients", rpc, registry=registry)
        self._handling = Histogram(
            "grpc_server_handling_seconds", "from an RPC's begin to its end", rpc, buckets=CALL_S, registry=registry
        )
        for (
            method
        ) in METHODS.values():  # a series that is born with its first event has no rate, so no alert sees that one
            for metric in (self._started, self._received, self._sent, self._handling):
                metric.labels(*method.labels)
            for code in grpc.StatusCode:
                self._handled.labels(*method.labels, _in_go(code))

        self._rejected = Counter(
            "gramophone_admission_rejected", "jobs that were refused, by reason", ("reason",), registry=registry
        )
        self._finished = Counter(
            "gramophone_jobs_finished", "accepted jobs that have ended, by how", ("outcome",), registry=registry
        )
        reasons = _names("ErrorReason", "ERROR_REASON_")
        for reason in reasons:
            self._rejected.labels(reason)
        for outcome in (*_names("StopReason", "STOP_REASON_"), *reasons):
            self._finished.labels(outcome)
        self._queue_wait = Histogram(
            "gramophone_queue_wait_seconds",
            "from a job's request to its first iteration",
            buckets=WAIT_S,
            registry=registry,
        )
        self._first_frame = Histogram(
            "gramophone_time_to_first_frame_seconds",
            "from a job's request to its first picture, of jobs whose picture somebody watched",
            buckets=WAIT_S,
            registry=registry,
        )
        self._job = Histogram(
            "gramophone_job_seconds",
            "from a job's request to its end, accepted jobs",
            buckets=CALL_S,
            registry=registry,
        )
        self._iterations = Counter("gramophone_iterations", "iterations of jobs", ("size",), registry=registry)
        self._iteration = Histogram(
            "gramophone_iteration_seconds",
            "an iteration of a batch; one observation a slice, which is some 20 ms of iterations",
            ("size",),
            buckets=ITERATION_S,
            registry=registry,
        )
        self._width = Histogram(
            "gramophone_batch_width", "slots of a batch, once a slice", ("size",), buckets=WIDTHS, registry=registry
        )
        self._frames = Counter("gramophone_frames_sent", "pictures of jobs on their way", registry=registry)
        self._dropped = Counter(
            "gramophone_frames_dropped", "pictures that were due and left out, for slow readers", registry=registry
        )
        self._lag = Histogram(
            "gramophone_event_loop_lag_seconds",
            "how late the event loop comes to a timer",
            buckets=LAG_S,
            registry=registry,
        )

    # RPCs: see `calls` --------------------------------------------------------------------------------------------------

    def rpc_began(self, method: Method) -> None:
        """A handler has begun."""
        self._started.labels(*method.labels).inc()

    def rpc_ended(self, method: Method, code: grpc.StatusCode, seconds: float) -> None:
        """An RPC is over, and its client sees ``code``."""
        self._handled.labels(*method.labels, _in_go(code)).inc()
        self._handling.labels(*method.labels).observe(seconds)

    def message_received(self, method: Method) -> None:
        """A client's message has come."""
        self._received.labels(*method.labels).inc()

    def message_sent(self, method: Method) -> None:
        """A message goes to a client."""
        self._sent.labels(*method.labels).inc()

    def frame_sent(self, dropped: int) -> None:
        """A picture goes to a watcher, behind ``dropped`` that it was due."""
        self._frames.inc()
        self._dropped.inc(dropped)

    # Jobs: see `servicer` -----------------------------------------------------------------------------------------------

    def job_rejected(self, reason: str) -> None:
        """A job was refused. ``reason``: of `ErrorReason`, without its prefix."""
        self._rejected.labels(reason).inc()

    def job_ended(self, outcome: str, seconds: float, waited_s: float | None, first_frame_s: float | None) -> None:
        """An accepted job is over. ``outcome``: of `StopReason` or `ErrorReason`, without its prefix; the times are from its
        request on, None for what did not happen."""
        self._finished.labels(outcome).inc()
        self._job.observe(seconds)
        if waited_s is not None:
            self._queue_wait.observe(waited_s)
        if first_frame_s is not None:
            self._first_frame.observe(first_frame_s)

    # The device and the loop: see `lanes` and `vitals` --------------------------------------------------------------------

    def iterated(self, shape: Shape, width: int, jobs: int, iterations: int, seconds: float) -> None:
        """A batch of ``width`` slots has done ``iterations`` of each of its ``jobs`` in ``seconds``."""
        size = size_class(max(shape.width, shape.height))
        self._iterations.labels(size).inc(iterations * jobs)
        self._iteration.labels(size).observe(seconds / iterations)
        self._width.labels(size).observe(width)

    def loop_was_late(self, seconds: float) -> None:
        """The event loop has come to a timer so long after it was due."""
        self._lag.observe(seconds)


def size_class(longest: int) -> str:
    """Of a picture by its longest side in pixels: the power of two that holds it, "64" to "4096", or "larger"."""
    return "larger" if longest > LARGEST_CLASS else str(max(64, 1 << (longest - 1).bit_length()))


def _names(enum: str, prefix: str) -> list[str]:
    """Of an enum's values, but for the one that is none."""
    return [value.name.removeprefix(prefix) for value in pb.DESCRIPTOR.enum_types_by_name[enum].values if value.number]


def _in_go(code: grpc.StatusCode) -> str:
    """DEADLINE_EXCEEDED -> "DeadlineExceeded", as Go's libraries and so the dashboards spell it."""
    if code is grpc.StatusCode.OK:
        return "OK"
    if code is grpc.StatusCode.CANCELLED:
        return "Canceled"
    return "".join(word.capitalize() for word in code.name.split("_"))
