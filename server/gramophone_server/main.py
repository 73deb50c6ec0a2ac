"""The server process: settings -> engine -> server -> drain.

Standard output has the lines that a script can wait for, "listening on HOST:PORT", with a metrics port "metrics on URL",
and "ready in N s"; everything else goes to the log on standard error. Exit codes: 0 after a drain, 1 for a defect, 2 for a
wrong setting.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

# Before torch is loaded, which brings OpenMP. Its threads spin while they wait for each other, and where others use the same
# cores, the one that is waited for cannot run. With busy neighbours on both of two cores threads that sleep make an iteration of
# 256 px 1.5 times faster, and one of 64 px takes at most 40 ms instead of 200. On quiet cores they cost 3 % at 256 px and 20 % at
# 64 px. Whoever sets it otherwise is obeyed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from gramophone_server import config
from gramophone_server.config import Limits, Settings
from gramophone_server.domain.engine_api import Engine
from gramophone_server.errors import StartupError
from gramophone_server.rpc import registration
from gramophone_server.rpc.responses import version
from gramophone_server.rpc.servicer import Servicer
from gramophone_server.scheduling.scheduler import Scheduler
from gramophone_server.telemetry.access_log import AccessLog
from gramophone_server.telemetry.health import Vitals
from gramophone_server.telemetry.http_probes import Probes
from gramophone_server.telemetry.metrics import SERVICE, Metrics

__all__ = ["main", "serve", "server_options"]

log = logging.getLogger("gramophone_server")

HEALTH_NAMES = ("", SERVICE.full_name)

# After the drain, for the iteration that has begun, behind which the pictures and states of all jobs can be had: one of 2048 px
# takes 10 s on two cores.
LAST_SLICE_S = 30.0
LAST_MESSAGES_S = 5.0  # then, for the encoding of a result, and a reader that takes its time
HURRIED_S = 0.5  # instead of both, after a second signal


def main() -> None:
    """The command `gramophone-server`."""
    try:
        settings, print_only = config.load(sys.argv[1:], os.environ)
        if print_only:
            for f in dataclasses.fields(settings):
                print(f"{config.variable(f.name)}={getattr(settings, f.name)}")
            return
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        logging.captureWarnings(True)
        warnings.filterwarnings("ignore", module="PIL")  # it warns of damaged metadata in what callers send
        # gRPC logs an error with a traceback whenever a client leaves while a message is written to it; the servicer's
        # own line says that it left.
        logging.getLogger("grpc._cython.cygrpc").addFilter(
            lambda record: "ExecuteBatchError" not in record.getMessage()
        )
        # A thread that computes in Python holds the interpreter for 5 ms at a time by default, which made unary calls
        # take 5.9 ms instead of 0.5; with 1 ms they take about 2.
        sys.setswitchinterval(0.001)
        compute_ended = asyncio.run(serve(settings, lambda: _loaded_for_good(settings)))
    except StartupError as error:
        print(f"gramophone-server: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if not compute_ended:
        # An iteration or a loading that does not end cannot be stopped, and unwinding torch under it crashes.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


async def serve(settings: Settings, load: Callable[[], Engine]) -> bool:
    """Serves until SIGTERM or SIGINT, then drains. Returns whether the compute thread has ended.

    Raises `StartupError` when the address cannot be listened on, and what `load` raises.
    """
    started = time.monotonic()
    server = grpc.aio.server(options=server_options(settings))
    metrics, access = Metrics(), AccessLog(settings.access_log)
    scheduler = Scheduler(load, settings, metrics.iterated)
    servicer = Servicer(scheduler, settings, list_jobs=settings.list_jobs, metrics=metrics, access=access)
    vitals = Vitals(scheduler, servicer.uploads, metrics, version())
    health_servicer = health.aio.HealthServicer()
    registration.add_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    if settings.reflection:
        _add_reflection(server)
    for name in HEALTH_NAMES:  # the health service itself would begin with "" as SERVING
        await health_servicer.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    port = _listen(server, settings.host, settings.port)
    probes = None
    if settings.metrics_port >= 0:
        probes = Probes(settings.host, settings.metrics_port, metrics.registry, vitals.absence, vitals.illness)
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    scheduler.start()
    await server.start()
    print(f"listening on {_address(settings.host, port)}", flush=True)
    pulse = asyncio.create_task(vitals.watch())
    if probes is not None:
        probes.start()
        print(f"metrics on http://{_address(settings.host, probes.port)}/metrics", flush=True)
    if not _is_loopback(settings.host):
        log.warning("%s is not a loopback address: whoever reaches it can use this server, in plaintext", settings.host)
    log.info("version %s, %s", version(), _limits_line(settings))

    asked = asyncio.create_task(signals.get())
    ready = asyncio.create_task(scheduler.ready())
    lost = asyncio.create_task(scheduler.ended())
    loaded, patience_s = False, HURRIED_S
    try:
        await asyncio.wait({asked, ready}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            engine = await ready
            loaded = True
            for name in HEALTH_NAMES:
                await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
            log.info(
                "%s in %s on %s, weights: %s",
                engine.backbone,
                engine.precision,
                engine.device_name,
                engine.weights_source,
            )
            print(f"ready in {time.monotonic() - started:.1f} s", flush=True)
        await asyncio.wait({asked, lost}, return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            log.critical("no job can be done any more; the server ends, for another one to take its place")
        else:
            log.info("%s: draining for up to %g s; a second signal ends at once", (await asked).name, settings.drain_s)
        vitals.draining = True
        await health_servicer.enter_graceful_shutdown()  # NOT_SERVING for good, and watchers hear of it
        hurried = not await _unless_signalled(scheduler.drain(settings.drain_s), signals)
        scheduler.stop()
        if not hurried and loaded:
            hurried = not await _unless_signalled(scheduler.ended(), signals, LAST_SLICE_S)
        patience_s = HURRIED_S if hurried else LAST_MESSAGES_S
        await _unless_signalled(servicer.idle(), signals, patience_s)
        if lost.done() and not asked.done():
            raise RuntimeError("the compute thread has ended by a defect; the log has more of it")
    finally:
        for task in (ready, asked, lost):
            task.cancel()
        scheduler.stop()
        await server.stop(grace=HURRIED_S)  # jobs have ended; an open health watch would hold it for all of its grace
        servicer.close()
        pulse.cancel()
        if probes is not None:
            await asyncio.to_thread(probes.close)
        access.close()
        # The thread ends after its iteration; one that is still loading cannot be told, so it is not waited for.
        ended = await asyncio.to_thread(scheduler.join, patience_s if loaded else 0.0)
    log.info("stopped")
    return ended


def server_options(limits: Limits) -> list[tuple[str, int]]:
    """Options of the gRPC server."""
    return [
        ("grpc.so_reuseport", 0),  # or a second server on the same port would start, and get some of the calls
        ("grpc.max_receive_message_length", limits.request_bytes),
        ("grpc.max_send_message_length", limits.response_bytes),
        # Clients may ping every 10 s, also when idle; we look after 60 s whether a silent one is still there.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]


def _loaded_for_good(settings: Settings) -> Engine:
    """The engine. What is there by then stays until the end, so the garbage collector need not look at it again: its full
    rounds went through 190,000 objects, most of them torch's, and held everything up for 120 ms, on busy cores for 500."""
    engine = _load_engine(settings)
    gc.collect()
    gc.freeze()
    return engine


def _load_engine(settings: Settings) -> Engine:
    if settings.engine == "fake":
        from gramophone_server.engine.fake import FakeEngine

        log.warning("--engine fake: every picture is a pattern, and an iteration takes %g ms", settings.iter_ms)
        return FakeEngine(settings.iter_ms / 1000)
    # Loads torch's kernels: seconds, on the compute thread.
    from gramophone_server.engine.engine import VggEngine

    engine = VggEngine.load(
        device=settings.device,
        precision=settings.precision,
        weights=settings.weights,
        backbone=settings.backbone,
        threads=settings.threads,
        graphs=not settings.launch_each,
    )
    engine.warm_up()
    return engine


def _listen(server: grpc.aio.Server, host: str, port: int) -> int:
    """The port that `server` listens on. Raises `StartupError` with the reason when it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # gRPC's error does not say why, so ask the system first.
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        return server.add_insecure_port(_address(host, port))
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "the port was taken meanwhile"
        raise StartupError(
            f"cannot listen on {_address(host, port)}: {reason}; "
            "choose another address with --host and --port (--port 0: any free one)"
        ) from None


def _add_reflection(server: grpc.aio.Server) -> None:
    from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

    reflection.enable_server_reflection((SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)


async def _unless_signalled(
    work: Coroutine[Any, Any, None], signals: asyncio.Queue[signal.Signals], within_s: float | None = None
) -> bool:
    """Waits for `work`, and drops it when a signal or the end of the time comes first. Returns whether there was no signal."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(signals.get())
    try:
        await asyncio.wait(tasks, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        return not tasks[1].done()
    finally:
        for task in tasks:
            task.cancel()


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
    main()
