"""The counters and histograms of the server, for Prometheus; `health` has the gauges of its current state.

The `grpc_server_*` family has the names of go-grpc-middleware, with codes spelled as in Go ("Canceled"), because
dashboards know these. Labels take a bounded set of values: methods, codes and reasons of the proto, and size classes
instead of sizes, which clients choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import grpc
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.domain.job_state import Shape

__all__ = ["METHODS", "SERVICE", "Method", "Metrics", "size_class"]

# Without the `_created` series, a second one for each metric that no dashboard plots.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

SERVICE = pb.DESCRIPTOR.services_by_name["StyleTransferService"]

# Histogram buckets in seconds. A call lasts from microseconds, for a refusal, to minutes, for a large picture. An
# iteration takes 0.4 ms or more on a GPU.
CALL_S = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
WAIT_S = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
ITERATION_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
LAG_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_SIZE_CLASS = 4096  # pixels; larger sizes are in the class "larger"


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
    """The counters and histograms of one server, in a `registry` of its own. Its methods are thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        self._rpcs = _RpcSeries(self.registry)
        self._jobs = _JobSeries(self.registry)
        self._compute = _ComputeSeries(self.registry)

    # RPCs, reported by `rpc.calls` ------------------------------------------------------------------------------------

    def rpc_started(self, method: Method) -> None:
        """A handler has started."""
        self._rpcs.started.labels(*method.labels).inc()

    def rpc_ended(self, method: Method, code: grpc.StatusCode, seconds: float) -> None:
        """An RPC has ended, and its client gets ``code``."""
        self._rpcs.handled.labels(*method.labels, _in_go(code)).inc()
        self._rpcs.handling.labels(*method.labels).observe(seconds)

    def message_received(self, method: Method) -> None:
        """A message of a client has arrived."""
        self._rpcs.received.labels(*method.labels).inc()

    def message_sent(self, method: Method) -> None:
        """A message is sent to a client."""
        self._rpcs.sent.labels(*method.labels).inc()

    def frame_sent(self, dropped: int) -> None:
        """A frame is sent to a watcher, for which ``dropped`` frames were due and left out before it."""
        self._rpcs.frames.inc()
        self._rpcs.dropped_frames.inc(dropped)

    # Jobs, reported by `rpc.servicer` ---------------------------------------------------------------------------------

    def job_rejected(self, reason: str) -> None:
        """A job was refused. ``reason`` is a name of `ErrorReason` without its prefix."""
        self._jobs.rejected.labels(reason).inc()

    def job_ended(self, outcome: str, seconds: float, waited_s: float | None, first_frame_s: float | None) -> None:
        """An accepted job has ended.

        ``outcome`` is a name of `StopReason` or `ErrorReason` without its prefix. All times are measured from the job's
        request; None if the job never started, or no frame of it was taken.
        """
        self._jobs.finished.labels(outcome).inc()
        self._jobs.seconds.observe(seconds)
        if waited_s is not None:
            self._jobs.queue_wait.observe(waited_s)
        if first_frame_s is not None:
            self._jobs.first_frame.observe(first_frame_s)

    # The compute thread, reported by `scheduling`, and the event loop, reported by `health` ---------------------------

    def iterations_done(self, shape: Shape, width: int, jobs: int, iterations: int, seconds: float) -> None:
        """A batch of ``width`` slots has completed ``iterations`` of each of its ``jobs`` in ``seconds``."""
        size = size_class(max(shape.width, shape.height))
        self._compute.iterations.labels(size).inc(iterations * jobs)
        self._compute.iteration.labels(size).observe(seconds / iterations)
        self._compute.width.labels(size).observe(width)

    def observe_loop_lag(self, seconds: float) -> None:
        """The event loop has run a timer ``seconds`` after it was due."""
        self._compute.loop_lag.observe(seconds)


class _RpcSeries:
    def __init__(self, registry: CollectorRegistry) -> None:
        rpc = ("grpc_type", "grpc_service", "grpc_method")
        self.started = Counter("grpc_server_started", "RPCs that have started", rpc, registry=registry)
        self.handled = Counter(
            "grpc_server_handled",
            "RPCs that have ended, by the code that their client gets",
            (*rpc, "grpc_code"),
            registry=registry,
        )
        self.received = Counter("grpc_server_msg_received", "messages received from clients", rpc, registry=registry)
        self.sent = Counter("grpc_server_msg_sent", "messages sent to clients", rpc, registry=registry)
        self.handling = _histogram("grpc_server_handling_seconds", "duration of an RPC", CALL_S, registry, rpc)
        self.frames = Counter("gramophone_frames_sent", "frames of jobs that were sent", registry=registry)
        self.dropped_frames = Counter(
            "gramophone_frames_dropped", "frames that were due and left out, for slow readers", registry=registry
        )
        # A series that starts with its first event has no rate, so no alert would see that event.
        for method in METHODS.values():
            for metric in (self.started, self.received, self.sent, self.handling):
                metric.labels(*method.labels)
            for code in grpc.StatusCode:
                self.handled.labels(*method.labels, _in_go(code))


class _JobSeries:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.rejected = Counter(
            "gramophone_admission_rejected", "jobs that were refused, by reason", ("reason",), registry=registry
        )
        self.finished = Counter(
            "gramophone_jobs_finished", "accepted jobs that have ended, by outcome", ("outcome",), registry=registry
        )
        self.queue_wait = _histogram(
            "gramophone_queue_wait_seconds", "from a job's request to its first iteration", WAIT_S, registry
        )
        self.first_frame = _histogram(
            "gramophone_time_to_first_frame_seconds",
            "from a job's request to its first frame, for jobs with a watcher that wants frames",
            WAIT_S,
            registry,
        )
        self.seconds = _histogram(
            "gramophone_job_seconds", "from a job's request to its end, for accepted jobs", CALL_S, registry
        )
        reasons = _names("ErrorReason", "ERROR_REASON_")
        for reason in reasons:
            self.rejected.labels(reason)
        for outcome in (*_names("StopReason", "STOP_REASON_"), *reasons):
            self.finished.labels(outcome)


class _ComputeSeries:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.iterations = Counter("gramophone_iterations", "iterations of jobs", ("size",), registry=registry)
        self.iteration = _histogram(
            "gramophone_iteration_seconds",
            "duration of an iteration of a batch; one observation for each slice of about 20 ms",
            ITERATION_S,
            registry,
            ("size",),
        )
        self.width = _histogram(
            "gramophone_batch_width", "slots of a batch; one observation for each slice", WIDTHS, registry, ("size",)
        )
        self.loop_lag = _histogram(
            "gramophone_event_loop_lag_seconds", "delay of a timer of the event loop", LAG_S, registry
        )


def _histogram(
    name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry, labels: Sequence[str] = ()
) -> Histogram:
    return Histogram(name, text, labels, buckets=buckets, registry=registry)


def size_class(longest: int) -> str:
    """The class of a longest side in pixels: the next power of two, "64" to "4096", or "larger"."""
    return "larger" if longest > MAX_SIZE_CLASS else str(max(64, 1 << (longest - 1).bit_length()))


def _names(enum: str, prefix: str) -> list[str]:
    """The names of an enum's values except UNSPECIFIED, without their prefix."""
    return [value.name.removeprefix(prefix) for value in pb.DESCRIPTOR.enum_types_by_name[enum].values if value.number]


def _in_go(code: grpc.StatusCode) -> str:
    """DEADLINE_EXCEEDED -> "DeadlineExceeded", the spelling of Go's libraries and so of dashboards."""
    if code is grpc.StatusCode.OK:
        return "OK"
    if code is grpc.StatusCode.CANCELLED:
        return "Canceled"
    return "".join(word.capitalize() for word in code.name.split("_"))
