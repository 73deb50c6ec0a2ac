"""The faults. Each is played while others use the server, and tells in its first lines what must hold."""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
import socket
import struct
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_client import (
    Accepted,
    Checkpoint,
    CheckpointOptions,
    ConnectionFailed,
    Frame,
    GramophoneClient,
    GramophoneError,
    JobEnded,
    OutOfDeviceMemory,
    Progress,
    Result,
    ServerFailed,
    SlowReader,
    Update,
    UploadedImage,
)
from gramophone_client.console.exit_codes import BAD_REQUEST
from gramophone_client.errors import from_rpc
from gramophone_client.transport.connection import channel_options
from gramophone_client.transport.job_spec import job_spec
from tests.chaos.stage import (
    CONTENT,
    DEADLINE_S,
    LARGE,
    LARGE_FRAMES,
    LONG,
    SMALL,
    STYLE,
    Kinds,
    Stage,
    faulty_server,
    until,
)
from tests.chaos.watch import Broken
from tests.support.processes import Server
from tests.support.wire import Wire

Updates: TypeAlias = AsyncGenerator[Update, None]

HOUR_S = 3600.0
MOST_BYTES = 2**26  # of a message
PAINT_LONG = (
    *("stylize", "content.png", "style.png", "-o", "out.png", "--size", "256", "--iterations", "5000"),
    *("--smallest-size", "0", "--frame-every", "1"),
)


def write_pictures(folder: Path) -> None:
    """For clients that are processes."""
    (folder / "content.png").write_bytes(CONTENT)
    (folder / "style.png").write_bytes(STYLE)


async def killed_clients(stage: Stage) -> None:
    """Clients are killed in the middle of a stream. Their jobs are cancelled, one with a grace when that has passed."""
    write_pictures(stage.folder)
    command = ("-m", "gramophone_client.cli", *PAINT_LONG, "--server", stage.server.address)

    async def one(*more: str) -> str:
        async with stage.process(*command, *more) as process:
            job_id = (await asyncio.to_thread(process.line, "job ")).split(":")[0]
            await asyncio.sleep(stage.chance.uniform(0, 0.5))
            process.signal(signal.SIGKILL)
            await asyncio.to_thread(process.code)
        return job_id

    job_ids = await asyncio.gather(one(), one(), one("--detach", "1"))
    async with stage.client() as client:
        for job_id in job_ids:
            await stopped(stage, client, job_id)


async def half_open_connections(stage: Stage) -> None:
    """The network swallows everything and closes nothing. The server finds out and frees the jobs; a client whose
    connection is then cut has its result all the same, from its last checkpoint or from the job that went on."""
    async with Wire(stage.server.address) as wire, stage.client(wire.address) as client, stage.client() as observer:
        moves = client.stream(CONTENT, STYLE, **LONG)
        goes_on = client.stream(CONTENT, STYLE, frames=None, detach_grace=60, **LONG)
        left, found = [await begin(stream) for stream in (moves, goes_on)]
        wire.fall_silent()
        await stopped(stage, observer, left)
        await until_unwatched(observer, found)
        wire.cut()
        await stage.end(finishing(observer, moves))
        await stage.end(finishing(observer, goes_on, found))


async def readers_that_stop(stage: Stage) -> None:
    """Streams are opened and not read. The server drops the reader, the job is stopped or with a grace goes on; who then
    reads on is told so, or finds the job."""
    channel = grpc.aio.insecure_channel(stage.server.address, channel_options(MOST_BYTES))  # our client reads ahead
    async with channel, stage.client() as client:
        stub = pb_grpc.StyleTransferServiceStub(channel)
        specs = [job_spec(CONTENT, STYLE, frames=LARGE_FRAMES, detach_grace=grace_s, **LARGE) for grace_s in (None, 60)]
        calls = [stub.StylizeStream(pb.StylizeStreamRequest(spec=spec), timeout=DEADLINE_S) for spec in specs]
        left, found = [(await call.read()).event.accepted.job_id for call in calls]
        await stopped(stage, client, left)
        await until_unwatched(client, found)
        for call in calls:
            stage.counted(await loss(call, stage.server.address), (SlowReader,))
        await stage.end(finishing(client, client.watch(found), found))


async def dripping_senders(stage: Stage) -> None:
    """The preface of HTTP/2 comes a byte at a time, or garbage, or another protocol, or nothing; and an image in pieces of
    one byte. Nobody else notices, and a sender that leaves is gone."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # and empty SETTINGS
    sent = [
        preface,
        preface + b"\0\0\x10\x01\x04\0\0\0\x01" + stage.chance.randbytes(16),  # HEADERS that are none
        preface[: stage.chance.randrange(len(preface))],
        stage.chance.randbytes(200),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + stage.chance.randbytes(64),  # of a TLS handshake
        b"",
    ]
    async with asyncio.TaskGroup() as group:
        group.create_task(drip_image(stage))
        for data in sent:
            pause_s, reset = stage.chance.uniform(0, 0.3), stage.chance.random() < 0.5
            group.create_task(drip(stage.server.address, data, pause_s=pause_s, reset=reset))


async def server_killed(stage: Stage) -> None:
    """A server dies under load. Every job has its result from the other one; a client that shall not look for another is
    told, and has the checkpoint with which the job goes on there."""
    async with victim(stage) as server:
        await lose(stage, server, signal.SIGKILL)


async def server_terminated(stage: Stage) -> None:
    """A server is shut down under load, and has no time to finish. The same holds, and it ends with exit code 0."""
    async with victim(stage, "--drain-s", "0.2") as server:
        await lose(stage, server, signal.SIGTERM)
        if code := await asyncio.to_thread(server.code):
            raise Broken(f"the server's exit code after SIGTERM is {code}")


async def full_disk(stage: Stage) -> None:
    """The client has no room for its frames. It ends with one sentence that names the file, exit code 2 and no half
    file; its job is stopped."""
    write_pictures(stage.folder)
    frames = stage.folder / "disk"
    frames.mkdir(exist_ok=True)
    stylize = shlex.join(
        [
            sys.executable,
            "-m",
            "gramophone_client.cli",
            *PAINT_LONG,
            "--frames",
            "disk",
            "--server",
            stage.server.address,
        ]
    )
    # A disk of 64 KB in a mount namespace, with which it goes.
    command = f"mount -t tmpfs -o size=64k none disk && exec {stylize}"
    async with (
        stage.client() as client,
        stage.process(
            "-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])", "unshare", "-rm", "sh", "-c", command
        ) as process,
    ):
        job_id = (await asyncio.to_thread(process.line, "job ")).split(":")[0]
        code = await asyncio.to_thread(process.code)
        complaints = [
            line
            for line in process.output.splitlines()
            if line.startswith(("gramophone: disk", "gramophone: [")) or "Error" in line
        ]
        if code != BAD_REQUEST or len(complaints) != 1:
            raise Broken(f"exit code {code}: {process.output}")
        if not re.fullmatch(r"gramophone: disk/frame-\d{4}\.jpg: No space left on device", complaints[0]):
            raise Broken(f"not a sentence that helps: {complaints[0]}")
        await stopped(stage, client, job_id)


async def clock_jumps(stage: Stage) -> None:
    """The server's wall clock jumps by hours, ahead and back, under load. Nothing expires, hangs or goes negative; a job
    that is kept is kept, one that is left is stopped after its grace, and one with a budget uses it."""
    async with stage.client() as client:
        kept = await client.stylize(CONTENT, STYLE, **SMALL)
        left = await begin_and_leave(client, grace_s=1.0)
        stays = await begin_and_leave(client, grace_s=60.0)
        begun = [await begin_and_leave(client, grace_s=60.0)]
        budgeted = asyncio.create_task(
            stage.answer(client.stylize(CONTENT, STYLE, time_budget=1.0, **LONG))  # a second of 25
        )
        try:
            for hours in (3, -3, stage.chance.uniform(-48, 48), 0):
                stage.clock.ahead(hours * HOUR_S)
                for stream in [client.stream(CONTENT, STYLE, **SMALL) for _ in range(3)]:
                    await stage.end(stream)
                begun.append(await begin_and_leave(client, grace_s=60.0))  # by this clock, and ends by the next
                await client.cancel_job(ends := begun.pop(0))
                await stopped(stage, client, ends)
                for job_id in (kept.job_id, ends, stays):  # or `JobNotFound`
                    status = await client.get_job(job_id)
                    moments = [status.create_time, status.start_time, status.end_time, status.expire_time]
                    if sorted(known := [m for m in moments if m is not None]) != known:
                        raise Broken(f"{hours} h: out of order: {status}")
                if status.state != "RUNNING":
                    raise Broken(f"{hours} h: a job with a grace of 60 s is {status.state}")
        finally:
            stage.clock.ahead(0.0)
        if isinstance(end := await budgeted, Result) and not end.stop_reason == "TIME_BUDGET":
            raise Broken(f"a job with a budget ended with {end.stop_reason}")
        await stopped(stage, client, left)
        for job_id in (stays, *begun):
            await client.cancel_job(job_id)
            await stopped(stage, client, job_id)


async def engine_exceptions(stage: Stage) -> None:
    """The engine raises what it never should, anywhere. Who is in that batch is told INTERNAL; the server goes on."""
    for place in ("batch", "join", "advance", "snapshot", "copy", "pixels"):
        await fail(stage, f"{place}.exception", (ServerFailed,))


async def out_of_memory(stage: Stage) -> None:
    """Memory ends, on the device or in an encoder. A job is told that it does not fit, or goes on with less beside it."""
    for place in ("batch", "join", "advance", "snapshot", "copy", "pixels"):
        await fail(stage, f"{place}.{stage.chance.choice(('memory', 'allocator'))}", (OutOfDeviceMemory,))


@dataclass(frozen=True)
class Fault:
    """How it is played, and in what besides results the jobs of bystanders may end."""

    play: Callable[[Stage], Awaitable[None]]
    bystanders: Kinds = ()


FAULTS: Mapping[str, Fault] = {
    fault.play.__name__: fault
    for fault in (
        Fault(killed_clients),
        Fault(half_open_connections),
        Fault(readers_that_stop),
        Fault(dripping_senders),
        Fault(server_killed),
        Fault(server_terminated),
        Fault(full_disk),
        Fault(clock_jumps),
        Fault(engine_exceptions, (ServerFailed,)),
        Fault(out_of_memory, (OutOfDeviceMemory,)),
    )
}


# What they are made of ------------------------------------------------------------------------------------------------


async def begin(stream: Updates) -> str:
    """Reads until the job has done something; its id."""
    job_id = ""
    async for update in stream:
        if isinstance(update, Accepted):
            job_id = update.job_id
        elif isinstance(update, Progress | Frame | Checkpoint):
            return job_id
    raise Broken("a job ended before it had begun")


async def begin_and_leave(client: GramophoneClient, grace_s: float) -> str:
    """A job that nobody watches any more."""
    async with aclosing(client.stream(CONTENT, STYLE, detach_grace=grace_s, **LONG)) as stream:
        return await begin(stream)


async def finishing(client: GramophoneClient, stream: Updates, job_id: str = "") -> Updates:
    """The rest of a job, which somebody else finishes as soon as it goes on; without an id when it was accepted again."""
    finished = False
    async with aclosing(stream):
        async for update in stream:
            yield update
            if isinstance(update, Accepted):
                job_id = update.job_id
            elif job_id and not finished and isinstance(update, Progress):
                finished = True
                with suppress(JobEnded):
                    async with client.control_job(job_id, frames=None) as job:
                        await job.finish()


async def loss(call: Any, target: str) -> GramophoneError:
    """The error that a call ends in, when all that comes before is read."""
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            if response.event.HasField("result"):
                raise Broken("a reader that was dropped has a result")
    except grpc.aio.AioRpcError as error:
        return from_rpc(error, target=target, timeout_s=DEADLINE_S)
    raise Broken("a reader that was dropped was not told")


async def stopped(stage: Stage, client: GramophoneClient, job_id: str) -> None:
    """Counts the job when it was cancelled, which must be soon."""

    async def ended() -> bool:
        return (await client.get_job(job_id)).state not in ("QUEUED", "RUNNING")

    await until(ended, f"job {job_id} to be stopped")
    if (state := (await client.get_job(job_id)).state) != "CANCELLED":
        raise Broken(f"job {job_id} is {state} instead of cancelled")
    stage.ends["stopped"] += 1


async def until_unwatched(client: GramophoneClient, job_id: str) -> None:
    """Returns when the server knows that nobody watches the job."""

    async def unwatched() -> bool:
        return (await client.get_job(job_id)).expire_time is not None

    await until(unwatched, f"the server to find that nobody watches job {job_id}")


async def drip(address: str, data: bytes, *, pause_s: float, reset: bool) -> None:
    """Sends it a byte at a time, and leaves; or is left."""
    host, port = address.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    with suppress(ConnectionError):
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.002)
        await asyncio.sleep(pause_s)
        if reset:  # instead of an end
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        await writer.wait_closed()


async def drip_image(stage: Stage) -> None:
    """An image comes in pieces of one byte, and a job takes it."""

    async def pieces() -> AsyncIterator[pb.UploadImageRequest]:
        for byte in CONTENT:
            yield pb.UploadImageRequest(chunk=bytes([byte]))

    async with grpc.aio.insecure_channel(stage.server.address) as channel, stage.client() as client:
        answer = await pb_grpc.StyleTransferServiceStub(channel).UploadImage(pieces(), timeout=DEADLINE_S)
        image = UploadedImage(digest=answer.digest, width=answer.width, height=answer.height, data=CONTENT)
        await stage.answer(client.stylize(image, STYLE, **SMALL))


@asynccontextmanager
async def victim(stage: Stage, *flags: str) -> AsyncIterator[Server]:
    """A server more."""
    server = await asyncio.to_thread(faulty_server, *flags, cwd=stage.folder)
    try:
        await asyncio.to_thread(server.line, "ready in ")
        yield server
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def lose(stage: Stage, server: Server, number: signal.Signals) -> None:
    """Signals a server when all of its clients have a checkpoint. All but the last know another server."""
    both = f"ipv4:{server.address},{stage.server.address}"
    saved = asyncio.Semaphore(0)

    async def one(target: str = both, allowed: Kinds = (), **options: Any) -> Result | GramophoneError:
        async def told(stream: Updates) -> Updates:
            has_one = False
            async with aclosing(stream):
                async for update in stream:
                    if isinstance(update, Checkpoint) and not has_one:
                        has_one = True
                        saved.release()
                    yield update

        async with stage.client(target) as client:
            return await stage.end(
                told(client.stream(CONTENT, STYLE, **SMALL | {"iterations": 300} | options)), allowed
            )

    jobs = [one(), one(), one(), one(frames=None, detach_grace=1.0)]
    jobs.append(one(server.address, (ConnectionFailed,), patience_s=0.0, **LONG))
    async with asyncio.TaskGroup() as group:
        *_, last = [group.create_task(job) for job in jobs]
        for _ in jobs:
            await saved.acquire()
        server.signal(number)
    if not isinstance(error := last.result(), ConnectionFailed) or error.checkpoint is None:
        raise Broken(f"a client that knows no other server has {error!r} and no checkpoint")
    async with stage.client() as client:
        resumed = client.stream(CONTENT, STYLE, resume=error.checkpoint)
        accepted = await anext(resumed)
        if not isinstance(accepted, Accepted) or accepted.resumed_at != error.checkpoint.iteration:
            raise Broken(f"iteration {error.checkpoint.iteration} was to go on with {accepted}")
        await stage.end(finishing(client, resumed, accepted.job_id))


async def fail(stage: Stage, fault: str, allowed: Kinds) -> None:
    """Something in the engine fails under jobs that want everything of it."""
    wanted = {"checkpoints": CheckpointOptions(every_s=0, light=False), **SMALL}
    async with stage.client() as client, asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(stage.end(client.stream(CONTENT, STYLE, **wanted), allowed))
        await stage.break_engine(fault)
