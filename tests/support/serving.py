"""A server with a fake engine in the test's own process and event loop, and calls to it."""

from __future__ import annotations

import asyncio
import contextlib
import types
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_server import main
from gramophone_server.config import Limits
from gramophone_server.rpc import registration
from gramophone_server.rpc.servicer import Servicer
from gramophone_server.scheduling.scheduler import Scheduler
from gramophone_server.telemetry.metrics import Metrics
from tests.support.clock import WITHIN_S, until
from tests.support.engines import FakeEngine
from tests.support.specs import detachable_spec, spec

LARGE_MESSAGES = [("grpc.max_receive_message_length", 2**26), ("grpc.max_send_message_length", 2**26)]
SMALL_WINDOW = [*LARGE_MESSAGES, ("grpc.http2.bdp_probe", 0)]  # a client takes no more than 64 KiB unread
DETAILS = (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, error_details_pb2.BadRequest)


@contextlib.asynccontextmanager
async def serving(
    engine: FakeEngine, limits: Limits | None = None, load: Callable[[], Any] | None = None, **options: Any
) -> AsyncIterator[types.SimpleNamespace]:
    """A server on a free port, with its address, a channel and a stub, its servicer and its scheduler.

    Waits until the engine is loaded, unless the test has its own `load`. Keyword arguments are those of Servicer.
    """
    limits = limits or Limits()
    server = grpc.aio.server(options=main.server_options(limits))
    metrics = options.setdefault("metrics", Metrics())
    scheduler = Scheduler(load or (lambda: engine), limits, metrics.iterations_done)
    servicer = Servicer(scheduler, limits, **options)
    registration.add_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    scheduler.start()
    if load is None:
        await scheduler.ready()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=LARGE_MESSAGES)
    try:
        yield types.SimpleNamespace(
            address=f"127.0.0.1:{port}",
            stub=pb_grpc.StyleTransferServiceStub(channel),
            channel=channel,
            scheduler=scheduler,
            servicer=servicer,
        )
    finally:
        await channel.close()
        scheduler.stop()
        engine.go.set()
        await server.stop(0)
        servicer.close()
        assert await asyncio.to_thread(scheduler.join, WITHIN_S)


async def refused(call: Any) -> types.SimpleNamespace:
    """The code, message, details by kind, and trailers of a call that fails; within `WITHIN_S`."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(WITHIN_S):
            if hasattr(call, "__aiter__"):
                async for _ in call:
                    pass
            else:
                await call
    error = caught.value
    trailers = dict(error.trailing_metadata() or ())
    refusal = types.SimpleNamespace(code=error.code(), message=error.details(), trailers=trailers)
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    for detail in status.details:
        for kind in DETAILS:
            if detail.Is(kind.DESCRIPTOR):
                message = kind()
                detail.Unpack(message)
                setattr(refusal, kind.__name__, message)
    return refusal


async def start_stream(s: types.SimpleNamespace, engine: FakeEngine, timeout: float | None = None) -> Any:
    """The stream of a job in its first iteration, which ends when the test sets `engine.go`."""
    engine.go.clear()
    call = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec(iterations=1000)), timeout=timeout)
    assert (await call.read()).event.HasField("accepted")
    await until(engine.under_way.is_set)
    return call


async def start_detachable(
    s: types.SimpleNamespace, engine: FakeEngine, job_spec: pb.JobSpec | None = None, request_id: str = ""
) -> tuple[Any, str]:
    """The stream and the id of a job that outlives its call, in its first iteration, which ends with `engine.go`."""
    engine.go.clear()
    request = pb.StylizeStreamRequest(spec=job_spec or detachable_spec(), request_id=request_id)
    call = s.stub.StylizeStream(request)
    accepted = (await call.read()).event.accepted
    await until(engine.under_way.is_set)
    return call, accepted.job_id


async def stops_within_an_iteration(s: types.SimpleNamespace, engine: FakeEngine) -> None:
    """Lets the held engine go on, and asserts that its job is stopped after that one iteration."""
    engine.go.set()
    await until(lambda: s.scheduler.running == 0)
    await s.servicer.idle()
    assert engine.iterations == 1
    engine.under_way.clear()


def watch(s: types.SimpleNamespace, job_id: str, after: int = 0, **frames: Any) -> Any:
    """A WatchJob call; keyword arguments are FrameOptions."""
    options = pb.FrameOptions(**frames) if frames else None
    return s.stub.WatchJob(pb.WatchJobRequest(job_id=job_id, after_sequence=after, frames=options))


async def remaining_events(call: Any) -> AsyncIterator[pb.JobEvent]:
    """The events that a call has not returned yet. gRPC allows no iteration over a call after `read`."""
    while (response := await call.read()) is not grpc.aio.EOF:
        yield response.event


async def events_of(call: Any) -> list[pb.JobEvent]:
    """All remaining events of a call; within `WITHIN_S`."""
    async with asyncio.timeout(WITHIN_S):
        return [event async for event in remaining_events(call)]


def own_tasks() -> set[asyncio.Task[Any]]:
    """All tasks of the loop except those in which gRPC's server waits for calls, whose number changes."""
    return {task for task in asyncio.all_tasks() if "AioServer" not in repr(task)}
