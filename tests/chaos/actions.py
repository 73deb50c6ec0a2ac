"""The actions that faults consist of: start and detach jobs, wait for states, send slowly, run a second server."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

import grpc

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_client import (
    Accepted,
    AsyncGramophoneClient,
    AsyncJobStream,
    Checkpoint,
    ConnectionFailedError,
    Frame,
    GramophoneError,
    JobEndedError,
    Progress,
    Result,
    Update,
    UploadedImage,
)
from gramophone_client.errors import from_rpc
from tests.chaos.environment import (
    CONTENT,
    DEADLINE_S,
    LONG,
    SMALL,
    STYLE,
    ChaosEnvironment,
    ErrorTypes,
    faulty_server,
    until,
)
from tests.support.monitoring import RuleViolation
from tests.support.processes import Server

Updates: TypeAlias = AsyncIterator[Update]


# Jobs -----------------------------------------------------------------------------------------------------------------


async def wait_until_started(stream: Updates) -> str:
    """Reads a job's updates until it has made progress. Returns its id."""
    job_id = ""
    async for update in stream:
        if isinstance(update, Accepted):
            job_id = update.job_id
        elif isinstance(update, Progress | Frame | Checkpoint):
            return job_id
    raise RuleViolation("a job ended before it had started")


async def start_and_detach(client: AsyncGramophoneClient, grace_s: float) -> str:
    """Starts a job and disconnects from it. Returns its id."""
    async with client.stream(CONTENT, STYLE, detach_grace=grace_s, **LONG) as stream:
        return await wait_until_started(stream)


async def finish_when_running(
    client: AsyncGramophoneClient, stream: AsyncJobStream, job_id: str = ""
) -> AsyncGenerator[Update, None]:
    """Yields the remaining updates of a job, and finishes the job early when it makes progress.

    Without an id, this waits until the job is accepted again.
    """
    finished = False
    async with stream:
        async for update in stream:
            yield update
            if isinstance(update, Accepted):
                job_id = update.job_id
            elif job_id and not finished and isinstance(update, Progress):
                finished = True
                with suppress(JobEndedError):
                    async with client.control_job(job_id, frames=None) as job:
                        await job.finish()


async def error_of(call: Any, target: str) -> GramophoneError:
    """Reads a call to its end, which must be an error."""
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            if response.event.HasField("result"):
                raise RuleViolation("a reader that was dropped has a result")
    except grpc.aio.AioRpcError as error:
        return from_rpc(error, target=target, timeout_s=DEADLINE_S)
    raise RuleViolation("a reader that was dropped got no error")


async def wait_until_cancelled(env: ChaosEnvironment, client: AsyncGramophoneClient, job_id: str) -> None:
    """Waits until the job is cancelled, which must be soon, and counts it."""

    async def has_ended() -> bool:
        return (await client.get_job(job_id)).state not in ("QUEUED", "RUNNING")

    await until(has_ended, f"job {job_id} to be cancelled")
    if (state := (await client.get_job(job_id)).state) != "CANCELLED":
        raise RuleViolation(f"job {job_id} is {state} instead of CANCELLED")
    env.ends["cancelled"] += 1


async def wait_until_unwatched(client: AsyncGramophoneClient, job_id: str) -> None:
    """Waits until the server has noticed that the job has no watcher."""

    async def is_unwatched() -> bool:
        return (await client.get_job(job_id)).expire_time is not None

    await until(is_unwatched, f"the server to notice that job {job_id} has no watcher")


# Slow senders ---------------------------------------------------------------------------------------------------------


async def send_slowly(address: str, data: bytes, *, pause_s: float, reset: bool) -> None:
    """Sends data one byte at a time, pauses, and disconnects, unless the server disconnects first."""
    host, port = address.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    with suppress(ConnectionError):
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.002)
        await asyncio.sleep(pause_s)
        if reset:  # makes close() send RST instead of FIN
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        await writer.wait_closed()


async def send_image_slowly(env: ChaosEnvironment) -> None:
    """Uploads an image in pieces of one byte, and uses it in a job."""

    async def pieces() -> AsyncIterator[pb.UploadImageRequest]:
        for byte in CONTENT:
            yield pb.UploadImageRequest(chunk=bytes([byte]))

    async with grpc.aio.insecure_channel(env.server.address) as channel, env.client() as client:
        answer = await pb_grpc.StyleTransferServiceStub(channel).UploadImage(pieces(), timeout=DEADLINE_S)
        image = UploadedImage(digest=answer.digest, width=answer.width, height=answer.height, data=CONTENT)
        await env.await_result(client.stylize(image, STYLE, **SMALL))


# Second servers -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def second_server(env: ChaosEnvironment, *flags: str) -> AsyncIterator[Server]:
    """A second server, which is ready."""
    server = await asyncio.to_thread(faulty_server, *flags, cwd=env.folder)
    try:
        await asyncio.to_thread(server.line, "ready in ")
        yield server
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def signal_under_load(env: ChaosEnvironment, server: Server, number: signal.Signals) -> None:
    """Signals a server when all of its clients have a checkpoint. All clients but the last know another server."""
    both = f"ipv4:{server.address},{env.server.address}"
    saved = asyncio.Semaphore(0)

    async def run_job(target: str = both, allowed: ErrorTypes = (), **options: Any) -> Result | GramophoneError:
        async def release_at_checkpoint(stream: AsyncJobStream) -> AsyncGenerator[Update, None]:
            has_checkpoint = False
            async with stream:
                async for update in stream:
                    if isinstance(update, Checkpoint) and not has_checkpoint:
                        has_checkpoint = True
                        saved.release()
                    yield update

        async with env.client(target) as client:
            stream = client.stream(CONTENT, STYLE, **SMALL | {"iterations": 300} | options)
            return await env.read_to_end(release_at_checkpoint(stream), allowed)

    jobs = [run_job(), run_job(), run_job(), run_job(frames=None, detach_grace=1.0)]
    jobs.append(run_job(server.address, (ConnectionFailedError,), patience=0.0, **LONG))
    async with asyncio.TaskGroup() as group:
        *_, last = [group.create_task(job) for job in jobs]
        for _ in jobs:
            await saved.acquire()
        server.signal(number)
    if not isinstance(error := last.result(), ConnectionFailedError) or error.checkpoint is None:
        raise RuleViolation(f"a client that knows no other server has {error!r} and no checkpoint")
    async with env.client() as client:
        resumed = client.stream(CONTENT, STYLE, resume=error.checkpoint)
        accepted = await anext(resumed)
        if not isinstance(accepted, Accepted) or accepted.resumed_at != error.checkpoint.iteration:
            raise RuleViolation(f"a job from a checkpoint at iteration {error.checkpoint.iteration} got {accepted}")
        await env.read_to_end(finish_when_running(client, resumed, accepted.job_id))
