"""Faults of a server that is short of something, and of a job that kills it; see `faults`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from gramophone_client import (
    AsyncGramophoneClient,
    CheckpointOptions,
    ConnectionFailedError,
    InvalidRequestError,
    OutOfDeviceMemoryError,
    ServerBusyError,
)
from tests.chaos.environment import CONTENT, SMALL, STYLE, ChaosEnvironment, ErrorTypes, faulty_server
from tests.support.bad_pictures import BOMBS
from tests.support.monitoring import ProcessUsage, RuleViolation, with_children

SHORT_OF_DESCRIPTORS = (ServerBusyError, OutOfDeviceMemoryError, ConnectionFailedError)
SHORT_OF_MEMORY = (ServerBusyError, OutOfDeviceMemoryError)
FREE_BYTES = 160 * 2**20  # enough for everything but a picture of 32 megapixels
JOBS = 6
KILLER_SIDE = 49  # pixels; no other job has this size
MAX_STARTS = 8  # of the server that the job kills; its client gives up earlier


async def descriptors_used_up(env: ChaosEnvironment) -> None:
    """The server has no free descriptor while it decodes, and its decoders have been killed. Jobs succeed or are to be
    sent again later; none is called invalid. When there are descriptors again, everything is as before."""
    images = [
        BOMBS[name]() for name in ("webp-lossy-of-32-megapixels", "jpeg-of-32-megapixels", "png-of-32-megapixels")
    ]
    async with env.client() as client:
        await client.server_info()  # its connection is open
        used = ProcessUsage.of(env.server.pid).descriptors
        with limited(env.server.pid, resource.RLIMIT_NOFILE, used):
            for decoder in with_children(env.server.pid)[1:]:
                os.kill(decoder, signal.SIGKILL)
            await _send_jobs(env, client, images, SHORT_OF_DESCRIPTORS)
        await env.await_result(client.stylize(images[0], STYLE, **SMALL))


async def memory_used_up_by_decoding(env: ChaosEnvironment) -> None:
    """The server and its decoders cannot get the memory for a large picture. Its job succeeds or is to be sent again
    later; it is not called invalid, and the server goes on."""
    large = [BOMBS[name]() for name in ("png-of-32-megapixels", "jpeg-of-32-megapixels")]
    async with env.client() as client:
        with contextlib.ExitStack() as stack:
            for pid in with_children(env.server.pid):
                stack.enter_context(limited(pid, resource.RLIMIT_AS, _virtual_bytes(pid) + FREE_BYTES))
            await _send_jobs(env, client, large, SHORT_OF_MEMORY)
        await env.await_result(client.stylize(large[0], STYLE, **SMALL))


async def _send_jobs(
    env: ChaosEnvironment,
    client: AsyncGramophoneClient,
    images: list[bytes],
    allowed: ErrorTypes,
) -> None:
    """Sends jobs with these images, of clients that do not send them again by themselves."""

    async def send(number: int) -> None:
        try:
            await env.await_result(client.stylize(images[number % len(images)], STYLE, patience=0.0, **SMALL), allowed)
        except InvalidRequestError as error:
            raise RuleViolation(f"a shortage of the server is called the client's fault: {error}") from error

    async with asyncio.TaskGroup() as group:
        for number in range(JOBS):
            group.create_task(send(number))


@contextlib.contextmanager
def limited(pid: int, kind: int, soft: int) -> Iterator[None]:
    """Lowers a limit of a running process for the length of the block."""
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (soft, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, kind, before)


def _virtual_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


async def job_that_kills_its_server(env: ChaosEnvironment) -> None:
    """A job kills every server that runs it, after its first iterations. Its client gives up after a few servers,
    although each of them may have left a newer checkpoint."""
    killer = env.folder / f"killer-{KILLER_SIDE}"
    killer.touch()
    try:
        async with _restarted_server(env) as (address, starts), env.client(address) as client:
            recipe = SMALL | {"size": KILLER_SIDE, "iterations": 1000}
            options = CheckpointOptions(every_s=0.0, light=True)
            stream = client.stream(CONTENT, STYLE, checkpoints=options, **recipe)
            end = await env.read_to_end(stream, (ConnectionFailedError,))
            if not isinstance(end, ConnectionFailedError):
                raise RuleViolation(f"a job that kills its server ended in {end!r}")
            if len(starts) > MAX_STARTS:
                raise RuleViolation(f"the job has killed {len(starts)} servers")
    finally:
        killer.unlink()


@asynccontextmanager
async def _restarted_server(env: ChaosEnvironment) -> AsyncIterator[tuple[str, list[int]]]:
    """A server that is started again on the same port when it has died, as by systemd. Yields its address and the list
    of the processes so far."""
    starts: list[int] = []
    is_over = False
    server = await asyncio.to_thread(faulty_server, cwd=env.folder)
    port = server.address.rpartition(":")[2]

    async def restart() -> None:
        nonlocal server
        while True:
            starts.append(server.pid)
            await asyncio.to_thread(server.code, 600.0)
            server.__exit__(None, None, None)
            if is_over:
                return
            server = await asyncio.to_thread(faulty_server, "--port", port, cwd=env.folder)

    restarting = asyncio.create_task(restart())
    try:
        yield server.address, starts
    finally:
        is_over = True
        while not restarting.done():  # it may be starting one more
            with contextlib.suppress(ProcessLookupError):
                server.signal(signal.SIGKILL)
            await asyncio.sleep(0.05)
        await restarting
