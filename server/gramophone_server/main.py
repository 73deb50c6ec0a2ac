"""The server process: settings -> engine -> server -> drain.

Standard output has the lines that a script can wait for: "listening on HOST:PORT", with a metrics port "metrics on
URL", and "ready in N s". Everything else goes to the log on standard error. Exit codes: 0 after a drain, 1 for a
defect, 2 for an invalid setting.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

# Set before torch is loaded, which brings OpenMP. Its threads spin while they wait for each other. If other processes
# use the same cores, the thread that is waited for then cannot run. With busy neighbours on both of two cores, sleeping
# threads make an iteration of 256 px 1.5 times faster, and one of 64 px takes at most 40 ms instead of 200. On quiet
# cores they cost 3 % at 256 px and 20 % at 64 px. A value that is already set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import grpc
from grpc_health.v1 import health, health_pb2  # type: ignore[import-untyped]

from gramophone_server import command_line
from gramophone_server.config import (
    MAX_REFLECTION_CALLS,
    METADATA_BYTES,
    STREAM_WINDOW_BYTES,
    Limits,
    Settings,
    version,
)
from gramophone_server.domain.engine_api import Engine
from gramophone_server.errors import StartupError
from gramophone_server.rpc import registration, usage
from gramophone_server.rpc.event_loop import ServerEventLoop
from gramophone_server.rpc.servicer import Servicer
from gramophone_server.rpc.standard_calls import MAX_PER_CONNECTION, StandardCalls
from gramophone_server.scheduling.scheduler import Scheduler
from gramophone_server.telemetry import standard_streams
from gramophone_server.telemetry.access_log import AccessLog
from gramophone_server.telemetry.health import HealthMonitor
from gramophone_server.telemetry.http_probes import HttpProbes
from gramophone_server.telemetry.metrics import SERVICE, Metrics

__all__ = ["Server", "load_and_freeze", "load_engine", "run", "serve", "server_options"]

log = logging.getLogger("gramophone_server")

HEALTH_SERVICES = ("", SERVICE.full_name)

# Longest wait after the drain for the iteration in progress, because the pictures and states of all jobs are available
# only after it: one of 2048 px takes 10 s on two cores.
LAST_ITERATION_S = 30.0
LAST_MESSAGES_S = 5.0  # longest wait after that, for the encoding of a result and a slow reader
FORCED_STOP_S = 0.5  # instead of both, after a second signal


def run(settings: Settings) -> None:
    """Runs a server in this process until it has drained."""
    standard_streams.make_non_blocking()
    try:
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        logging.captureWarnings(True)
        warnings.filterwarnings("ignore", module="PIL")  # it warns of damaged metadata in uploaded images
        # gRPC logs an error with a traceback if a client leaves while a message is being written to it. `RpcCall` logs
        # the end of such a call, too.
        logging.getLogger("grpc._cython.cygrpc").addFilter(
            lambda record: "ExecuteBatchError" not in record.getMessage()
        )
        # A thread that computes in Python holds the interpreter for 5 ms at a time by default. Then unary calls take
        # 5.9 ms instead of 0.5 ms; with 1 ms they take about 2 ms.
        sys.setswitchinterval(0.001)
        with asyncio.Runner(loop_factory=ServerEventLoop) as runner:
            compute_ended = runner.run(serve(settings, lambda: load_and_freeze(settings)))
    except StartupError as error:
        print(f"gramophone-server: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception:
        log.critical("the server ends because of a defect", exc_info=True)
        _exit_at_once(1)
    if not compute_ended:
        _exit_at_once(0)


def _exit_at_once(code: int) -> NoReturn:
    """Ends the process while the compute thread may run: an iteration or a load cannot be stopped, and unwinding torch
    under it crashes or hangs."""
    logging.shutdown()
    standard_streams.drain()
    os._exit(code)


async def serve(settings: Settings, load: Callable[[], Engine]) -> bool:
    """Serves until SIGTERM or SIGINT, then drains. Returns whether the compute thread has ended.

    With `stop_at_eof` the end of standard input counts as SIGTERM. Raises `StartupError` if an address cannot be
    listened on, and what `load` raises.
    """
    server = Server(settings, load)
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    if settings.stop_at_eof:
        _put_at_eof(signals)
    stop_requested = asyncio.create_task(signals.get())
    compute_lost = asyncio.create_task(server.scheduler.ended())
    try:
        await server.start()
        await server.run(stop_requested, compute_lost)
        await server.drain(signals)
        if compute_lost.done() and not stop_requested.done():
            raise RuntimeError("the compute thread has ended because of a defect; the log has the details")
    finally:
        stop_requested.cancel()
        compute_lost.cancel()
        compute_ended = await server.close()
    log.info("stopped")
    return compute_ended


class Server:
    """One server with all its parts. Its methods are called in this order: `start`, `run`, `drain`, `close`."""

    def __init__(self, settings: Settings, load: Callable[[], Engine]) -> None:
        """Connects the parts and listens. Raises `StartupError` if an address cannot be listened on."""
        self._created_at = time.monotonic()
        self._settings = settings
        self._grpc = grpc.aio.server(options=server_options(settings))
        metrics = Metrics()
        self._access_log = AccessLog(settings.access_log)
        self.scheduler = Scheduler(load, settings, metrics.iterations_done)
        self.servicer = Servicer(
            self.scheduler, settings, list_jobs=settings.list_jobs, metrics=metrics, access_log=self._access_log
        )
        self._health = health.aio.HealthServicer()
        registration.add_to_server(self.servicer, self._grpc)
        receiver = self.servicer.receiver
        probes = StandardCalls(receiver, receiver.probes, settings.max_probe_calls, "health checks")
        registration.add_health(self._health, probes, self._grpc)
        if settings.reflection:
            queries = StandardCalls(receiver, receiver.small, MAX_REFLECTION_CALLS, "calls of reflection")
            registration.add_reflection(queries, self._grpc)
        self._port = _listen(self._grpc, settings.host, settings.port)
        self._monitor = HealthMonitor(
            self.scheduler,
            self.servicer.uploads,
            metrics,
            version(),
            dropped_lines=self._dropped_lines,
            budgets=lambda: usage.budgets(self.servicer, self.scheduler, settings),
            places=lambda: usage.places(self.servicer, probes, settings, self._port),
        )
        self._probes = None
        if settings.metrics_port >= 0:
            self._probes = HttpProbes(
                settings.host,
                settings.metrics_port,
                metrics.registry,
                self._monitor.readiness_problem,
                self._monitor.liveness_problem,
            )
        self._heartbeat: asyncio.Task[None] | None = None
        self._loaded = False
        self._last_messages_s = FORCED_STOP_S

    async def start(self) -> None:
        """Starts to load the engine and to answer."""
        # Before gRPC answers, because the health service itself starts with "" as SERVING.
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.scheduler.start()
        self.servicer.start()
        await self._grpc.start()
        host = self._settings.host
        print(f"listening on {_address(host, self._port)}", flush=True)
        self._heartbeat = asyncio.create_task(self._monitor.watch())
        if self._probes is not None:
            self._probes.start()
            print(f"metrics on http://{_address(host, self._probes.port)}/metrics", flush=True)
        if not _is_loopback(host):
            log.warning(
                "%s is not a loopback address: any client that reaches it can use this server, in plaintext", host
            )
        log.info("version %s, %s", version(), _limits_line(self._settings))

    async def run(self, stop_requested: asyncio.Task[signal.Signals], compute_lost: asyncio.Task[None]) -> None:
        """Serves until one of the two tasks is done. Raises what loading the engine raised."""
        ready = asyncio.create_task(self.scheduler.ready())
        try:
            await asyncio.wait({stop_requested, ready}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                await self._announce(await ready)
            await asyncio.wait({stop_requested, compute_lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if compute_lost.done():
            log.critical(
                "the compute thread has ended, so no job can run; the server ends, to be replaced by another one"
            )
        else:
            name, drain_s = (await stop_requested).name, self._settings.drain_s
            log.info("%s: draining for up to %g s; a second signal ends at once", name, drain_s)

    async def drain(self, signals: asyncio.Queue[signal.Signals]) -> None:
        """Takes no new jobs, and waits for accepted jobs and their clients. A signal ends the wait."""
        self._monitor.draining = True
        await self._health.enter_graceful_shutdown()  # NOT_SERVING from now on, also for those that watch it
        forced = not await _unless_signalled(self.scheduler.drain(self._settings.drain_s), signals)
        self.scheduler.stop()
        if not forced and self._loaded:
            forced = not await _unless_signalled(self.scheduler.ended(), signals, LAST_ITERATION_S)
        self._last_messages_s = FORCED_STOP_S if forced else LAST_MESSAGES_S
        await _unless_signalled(self.servicer.idle(), signals, self._last_messages_s)

    async def close(self) -> bool:
        """Ends everything, even if `drain` was not called. Returns whether the compute thread has ended."""
        self.scheduler.stop()
        # The jobs have ended; an open health watch would use up any grace.
        await self._grpc.stop(grace=FORCED_STOP_S)
        self.servicer.close()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._probes is not None:
            await asyncio.to_thread(self._probes.close)
        self._access_log.close()
        # The thread ends after its iteration. One that is still loading cannot be stopped, so it is not waited for.
        return await asyncio.to_thread(self.scheduler.join, self._last_messages_s if self._loaded else 0.0)

    def _dropped_lines(self) -> dict[str, int]:
        return {**standard_streams.dropped_lines(), "access": self._access_log.dropped}

    async def _announce(self, engine: Engine) -> None:
        self._loaded = True
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        log.info(
            "%s in %s on %s, weights: %s%s",
            engine.backbone,
            engine.precision,
            engine.device_name,
            engine.weights_source,
            "".join(f"; {op} through torch's library" for op in engine.kernels.by_library),
        )
        print(f"ready in {time.monotonic() - self._created_at:.1f} s", flush=True)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in HEALTH_SERVICES:
            await self._health.set(name, status)


def server_options(limits: Limits) -> list[tuple[str, int]]:
    """Options of the gRPC server."""
    return [
        ("grpc.so_reuseport", 0),  # otherwise a second server on the same port would start, and get some of the calls
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.response_bytes),
        ("grpc.keepalive_time_ms", 60_000),  # the server pings after 60 s without data
        ("grpc.keepalive_timeout_ms", 20_000),
        # Clients may ping every 10 s, also when idle. gRPC for Go and Java ping no more often. The limit is half of it,
        # because a late ping makes the next interval shorter, and gRPC ends the connection at the third short interval
        # of a silent call.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        # Bounds of what arrives before a handler asks for it. Without probes of the bandwidth, the window of a stream
        # stays that of HTTP/2.
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_concurrent_streams", limits.max_calls_per_connection + MAX_PER_CONNECTION),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
        ("grpc.max_metadata_size", METADATA_BYTES),  # of clients that have acknowledged the server's settings
        ("grpc.http2.settings_timeout", 10_000),
        ("grpc.absolute_max_metadata_size", 2 * METADATA_BYTES),
        ("grpc.server.max_pending_requests", limits.max_arrived_calls),
        ("grpc.server.max_pending_requests_hard_limit", limits.max_arrived_calls),
        # gRPC itself would decompress a message of 20 KB to 8 MiB on the event loop; see `rpc.receiving`. Only gzip and
        # no compression are left, because deflate has no start that tells it from a message.
        ("grpc.per_message_decompression", 0),
        ("grpc.compression_enabled_algorithms_bitset", 0b101),
    ]


def load_and_freeze(settings: Settings) -> Engine:
    """Loads the engine and excludes all objects that exist by then from garbage collection: they stay until the end.

    A full collection went through 190,000 objects, most of them torch's, and blocked everything for 120 ms, on busy
    cores for 500 ms.
    """
    engine = load_engine(settings)
    gc.collect()
    gc.freeze()
    return engine


def load_engine(settings: Settings) -> Engine:
    """Loads the engine that the settings name and warms it up. Raises `StartupError` if it cannot run here."""
    if settings.engine == "fake":
        from gramophone_server.engine.fake import FakeEngine

        log.warning("--engine fake: every picture is a pattern, and an iteration takes %g ms", settings.iter_ms)
        return FakeEngine(settings.iter_ms / 1000)
    # Imported here, on the compute thread, because it loads torch's kernels, which takes seconds.
    from gramophone_server.engine.engine import VggEngine

    engine = VggEngine.load(
        device=settings.device,
        precision=settings.precision,
        weights=settings.weights,
        backbone=settings.backbone,
        threads=settings.threads,
        graphs=not settings.launch_each,
        library_ops=settings.library_ops,
    )
    engine.warm_up()
    return engine


def _listen(server: grpc.aio.Server, host: str, port: int) -> int:
    """Returns the port that `server` listens on. Raises `StartupError` with the reason if it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # gRPC's error has no reason, so ask the system first.
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        return server.add_insecure_port(_address(host, port))
    except (OSError, RuntimeError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else "the port was taken in the meantime"
        )
        raise StartupError(
            f"cannot listen on {_address(host, port)}: {reason}; "
            "choose another address with --host and --port (--port 0: any free one)"
        ) from None


async def _unless_signalled(
    awaited: Coroutine[Any, Any, None], signals: asyncio.Queue[signal.Signals], within_s: float | None = None
) -> bool:
    """Runs `awaited` until it ends, a signal arrives or `within_s` is over. Returns False if a signal arrived."""
    tasks = asyncio.create_task(awaited), asyncio.create_task(signals.get())
    try:
        await asyncio.wait(tasks, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        return not tasks[1].done()
    finally:
        for task in tasks:
            task.cancel()


def _put_at_eof(signals: asyncio.Queue[signal.Signals]) -> None:
    """Puts SIGTERM into the queue at the end of standard input, from a thread that does not outlive the process."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        # Not `sys.stdin`, whose lock would abort the interpreter if it exits during the read.
        with contextlib.suppress(OSError):  # standard input is closed, which is an end, too
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop has ended before
            loop.call_soon_threadsafe(signals.put_nowait, signal.SIGTERM)

    threading.Thread(target=read, name="stdin", daemon=True).start()


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _limits_line(limits: Limits) -> str:
    return " ".join(f"{f.name}={getattr(limits, f.name)}" for f in dataclasses.fields(Limits))


if __name__ == "__main__":
    run(command_line.from_command_line())
