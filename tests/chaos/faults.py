"""The faults. Each one is injected while other clients use the server; its docstring states what must hold."""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_client import CheckpointOptions, OutOfDeviceMemoryError, Result, ServerFailedError, SlowReaderError
from gramophone_client.console.exit_codes import BAD_REQUEST
from gramophone_client.transport.channel import channel_options
from gramophone_client.transport.job_spec import job_spec
from tests.chaos.actions import (
    error_of,
    finish_when_running,
    second_server,
    send_image_slowly,
    send_slowly,
    signal_under_load,
    start_and_detach,
    wait_until_cancelled,
    wait_until_started,
    wait_until_unwatched,
)
from tests.chaos.environment import (
    CONTENT,
    DEADLINE_S,
    LARGE,
    LARGE_FRAMES,
    LONG,
    SMALL,
    STYLE,
    ChaosEnvironment,
    ErrorTypes,
)
from tests.chaos.shortages import (
    SHORT_OF_DESCRIPTORS,
    SHORT_OF_MEMORY,
    descriptors_used_up,
    job_that_kills_its_server,
    memory_used_up_by_decoding,
)
from tests.support.monitoring import RuleViolation
from tests.support.wire import Wire

HOUR_S = 3600.0
MAX_MESSAGE_BYTES = 2**26
STYLIZE_LONG = (
    *("stylize", "content.png", "style.png", "-o", "out.png", "--size", "256", "--iterations", "5000"),
    *("--smallest-size", "0", "--frame-every", "1"),
)
# The calls of the engine that can fail; "pixels" is the copy from the device that an encoder waits for.
ENGINE_CALLS = ("batch", "join", "advance", "snapshot", "copy", "pixels")


def write_pictures(folder: Path) -> None:
    """Writes the input files of clients in their own process."""
    (folder / "content.png").write_bytes(CONTENT)
    (folder / "style.png").write_bytes(STYLE)


async def killed_clients(env: ChaosEnvironment) -> None:
    """Clients are killed while they read a stream. Their jobs are cancelled, a detached one after its grace period."""
    write_pictures(env.folder)
    command = ("-m", "gramophone_client.cli", *STYLIZE_LONG, "--server", env.server.address)

    async def start_and_kill(*flags: str) -> str:
        async with env.process(*command, *flags) as process:
            job_id = (await asyncio.to_thread(process.line, "job ")).split(":")[0]
            await asyncio.sleep(env.rng.uniform(0, 0.5))
            process.signal(signal.SIGKILL)
            await asyncio.to_thread(process.code)
        return job_id

    job_ids = await asyncio.gather(start_and_kill(), start_and_kill(), start_and_kill("--detach", "1"))
    async with env.client() as client:
        for job_id in job_ids:
            await wait_until_cancelled(env, client, job_id)


async def half_open_connections(env: ChaosEnvironment) -> None:
    """The network drops all data without closing connections. The server notices and frees the jobs. When the
    connection is then cut, the client still gets its results, from its last checkpoint or the job that continued."""
    async with Wire(env.server.address) as wire, env.client(wire.address) as client, env.client() as observer:
        resumed = client.stream(CONTENT, STYLE, **LONG)
        detached = client.stream(CONTENT, STYLE, frames=None, detach_grace=60, **LONG)
        resumed_id, detached_id = [await wait_until_started(stream) for stream in (resumed, detached)]
        wire.fall_silent()
        await wait_until_cancelled(env, observer, resumed_id)
        await wait_until_unwatched(observer, detached_id)
        wire.cut()
        await env.read_to_end(finish_when_running(observer, resumed))
        await env.read_to_end(finish_when_running(observer, detached, detached_id))


async def readers_that_stop(env: ChaosEnvironment) -> None:
    """Streams are opened and not read. The server drops the reader; the job is cancelled, or continues with a grace
    period. A client that reads on gets SlowReaderError, or can watch the job."""
    # A raw channel, because the project's client reads ahead.
    channel = grpc.aio.insecure_channel(env.server.address, channel_options(MAX_MESSAGE_BYTES))
    async with channel, env.client() as client:
        stub = pb_grpc.StyleTransferServiceStub(channel)
        specs = [
            job_spec(CONTENT, STYLE, {"detach_grace": grace_s, **LARGE}, frames=LARGE_FRAMES) for grace_s in (None, 60)
        ]
        calls = [stub.StylizeStream(pb.StylizeStreamRequest(spec=spec), timeout=DEADLINE_S) for spec in specs]
        cancelled_id, detached_id = [(await call.read()).event.accepted.job_id for call in calls]
        await wait_until_cancelled(env, client, cancelled_id)
        await wait_until_unwatched(client, detached_id)
        for call in calls:
            env.count_end(await error_of(call, env.server.address), (SlowReaderError,))
        await env.read_to_end(finish_when_running(client, client.watch(detached_id), detached_id))


async def dripping_senders(env: ChaosEnvironment) -> None:
    """Connections send the HTTP/2 preface one byte at a time, or garbage, or another protocol, or nothing; and an image
    is uploaded in pieces of one byte. Other clients are not affected, and nothing remains of a sender that left."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # with an empty SETTINGS frame
    sent = [
        preface,
        preface + b"\0\0\x10\x01\x04\0\0\0\x01" + env.rng.randbytes(16),  # an invalid HEADERS frame
        preface[: env.rng.randrange(len(preface))],
        env.rng.randbytes(200),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + env.rng.randbytes(64),  # the start of a TLS handshake
        b"",
    ]
    async with asyncio.TaskGroup() as group:
        group.create_task(send_image_slowly(env))
        for data in sent:
            pause_s, reset = env.rng.uniform(0, 0.3), env.rng.random() < 0.5
            group.create_task(send_slowly(env.server.address, data, pause_s=pause_s, reset=reset))


async def server_killed(env: ChaosEnvironment) -> None:
    """A server is killed under load. Every job gets its result from another server. A client that may not look for
    another one gets an error, with the checkpoint from which the job can continue there."""
    async with second_server(env) as server:
        await signal_under_load(env, server, signal.SIGKILL)


async def server_terminated(env: ChaosEnvironment) -> None:
    """A server is shut down under load, with no time to finish its jobs. The same holds, and its exit code is 0."""
    async with second_server(env, "--drain-s", "0.2") as server:
        await signal_under_load(env, server, signal.SIGTERM)
        if code := await asyncio.to_thread(server.code):
            raise RuleViolation(f"the server's exit code after SIGTERM is {code}")


async def full_disk(env: ChaosEnvironment) -> None:
    """The client's disk is full. The client ends with one message that names the file, exit code 2, and no partial
    file; its job is cancelled."""
    write_pictures(env.folder)
    frames = env.folder / "disk"
    frames.mkdir(exist_ok=True)
    client_command = (sys.executable, "-m", "gramophone_client.cli", *STYLIZE_LONG, "--frames", "disk")
    stylize = shlex.join([*client_command, "--server", env.server.address])
    # A disk of 64 KB in a new mount namespace; it disappears when the process ends.
    shell_command = f"mount -t tmpfs -o size=64k none disk && exec {stylize}"
    exec_program = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    async with (
        env.client() as client,
        env.process("-c", exec_program, "unshare", "-rm", "sh", "-c", shell_command) as process,
    ):
        job_id = (await asyncio.to_thread(process.line, "job ")).split(":")[0]
        code = await asyncio.to_thread(process.code)
        errors = [
            line
            for line in process.output.splitlines()
            if line.startswith(("gramophone: disk", "gramophone: [")) or "Error" in line
        ]
        if code != BAD_REQUEST or len(errors) != 1:
            raise RuleViolation(f"exit code {code}: {process.output}")
        if not re.fullmatch(r"gramophone: disk/frame-\d{4}\.jpg: No space left on device", errors[0]):
            raise RuleViolation(f"not a helpful message: {errors[0]}")
        await wait_until_cancelled(env, client, job_id)


async def clock_jumps(env: ChaosEnvironment) -> None:
    """The server's wall clock jumps by hours, forward and back, under load. Nothing expires early, hangs, or becomes
    negative: a retained job stays, a detached job is cancelled after its grace period, a time budget is used up."""
    async with env.client() as client:
        retained = await client.stylize(CONTENT, STYLE, **SMALL)
        expiring_id = await start_and_detach(client, grace_s=1.0)
        detached_id = await start_and_detach(client, grace_s=60.0)
        started = [await start_and_detach(client, grace_s=60.0)]
        # A budget of 1 s for a job that takes 25 s.
        budgeted = asyncio.create_task(env.await_result(client.stylize(CONTENT, STYLE, time_budget=1.0, **LONG)))
        try:
            for hours in (3, -3, env.rng.uniform(-48, 48), 0):
                env.clock.set_offset(hours * HOUR_S)
                for stream in [client.stream(CONTENT, STYLE, **SMALL) for _ in range(3)]:
                    await env.read_to_end(stream)
                # This job starts with this offset and is cancelled with the next one.
                started.append(await start_and_detach(client, grace_s=60.0))
                await client.cancel_job(cancelled_id := started.pop(0))
                await wait_until_cancelled(env, client, cancelled_id)
                for job_id in (retained.job_id, cancelled_id, detached_id):  # raises JobNotFoundError if one is missing
                    status = await client.get_job(job_id)
                    times = [status.create_time, status.start_time, status.end_time, status.expire_time]
                    if sorted(known := [time for time in times if time is not None]) != known:
                        raise RuleViolation(f"{hours} h: times are out of order: {status}")
                if status.state != "RUNNING":
                    raise RuleViolation(f"{hours} h: a job with a grace period of 60 s is {status.state}")
        finally:
            env.clock.set_offset(0.0)
        if isinstance(end := await budgeted, Result) and not end.stop_reason == "TIME_BUDGET":
            raise RuleViolation(f"a job with a time budget ended with {end.stop_reason}")
        await wait_until_cancelled(env, client, expiring_id)
        for job_id in (detached_id, *started):
            await client.cancel_job(job_id)
            await wait_until_cancelled(env, client, job_id)


async def engine_exceptions(env: ChaosEnvironment) -> None:
    """Each call of the engine raises an unexpected exception. The jobs of that batch fail with INTERNAL; the server
    continues."""
    for call in ENGINE_CALLS:
        await fail_engine(env, f"{call}.exception", (ServerFailedError,))


async def out_of_memory(env: ChaosEnvironment) -> None:
    """Each call of the engine runs out of memory, on the device or in an encoder. A job fails because it does not fit,
    or continues with fewer jobs beside it."""
    for call in ENGINE_CALLS:
        await fail_engine(env, f"{call}.{env.rng.choice(('memory', 'allocator'))}", (OutOfDeviceMemoryError,))


async def fail_engine(env: ChaosEnvironment, fault: str, allowed: ErrorTypes) -> None:
    """Injects a fault into the engine while it runs jobs that use all of its calls."""
    options = {"checkpoints": CheckpointOptions(every_s=0, light=False), **SMALL}
    async with env.client() as client, asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(env.read_to_end(client.stream(CONTENT, STYLE, **options), allowed))
        await env.inject(fault)


@dataclass(frozen=True)
class Fault:
    """A fault, and the errors that it may cause in the jobs of bystanders."""

    inject: Callable[[ChaosEnvironment], Awaitable[None]]
    bystander_errors: ErrorTypes = ()


FAULTS: Mapping[str, Fault] = {
    fault.inject.__name__: fault
    for fault in (
        Fault(killed_clients),
        Fault(half_open_connections),
        Fault(readers_that_stop),
        Fault(dripping_senders),
        Fault(server_killed),
        Fault(server_terminated),
        Fault(full_disk),
        Fault(clock_jumps),
        Fault(engine_exceptions, (ServerFailedError,)),
        Fault(out_of_memory, (OutOfDeviceMemoryError,)),
        Fault(descriptors_used_up, SHORT_OF_DESCRIPTORS),
        Fault(memory_used_up_by_decoding, SHORT_OF_MEMORY),
        Fault(job_that_kills_its_server),
    )
}
