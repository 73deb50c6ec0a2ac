"""A server of its own for bad inputs: how each is sent, and what in its answer is a failure of the server."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import io
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any, NamedTuple

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.telemetry.metrics import SERVICE
from tests.bad_input.inputs import JOB_ID, Input, request

SLOW_S = 2.0  # for each image of a call
MOST_AGAIN = 2  # times that a slow call is made once more
AT_ONCE = 8  # calls; a slow one is made again alone
CONTROLLED_S = 0.3
PATIENCE_S = 20.0  # then a call hangs, whatever the machine is doing besides
SETTINGS = {
    "max_size": 128,
    "max_iterations": 400,
    "max_queued": 512,
    "max_paused_s": 1,
    "max_detach_s": 5,
    "max_watchers": 64,
}
LIMITS = Limits(**SETTINGS)
FLAGS = ("--engine", "fake", "--iter-ms", "0", "--port", "0", "--list-jobs", "--log-level", "warning")
METHODS = {method.name: method for method in SERVICE.methods}
REFUSALS = frozenset({
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.ABORTED,
    grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED,
})  # fmt: skip
INSIDES = re.compile(r"PIL|object at 0x|Traceback|Error\(|the server failed")  # of the server, in what a caller reads


class Outcome(NamedTuple):
    """What became of an input."""

    code: str  # of the status; LEFT: the client had seen enough
    seconds: float  # on the clock, the longest time that it was made
    failure: str = ""  # what the server did wrong
    again: int = 0  # times that it was made once more
    memory: int = 0  # bytes to which the server's memory rose, above what it was when it was sent
    beside: int = 0  # most others that were on their way, to whom that memory may belong


class Rise:
    """What is known of the server's memory while a call is on its way, in bytes."""

    def __init__(self, before: int) -> None:
        self.before = self.peak = before
        self.beside = 0


class Target:
    """The server and a client of it. Everything that it is told of its memory is in bytes."""

    def __init__(self, address: str, pid: int, log_path: str) -> None:
        self.address, self.pid, self._log_path = address, pid, log_path
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(address, options=options)
        self._plain = grpc.insecure_channel(address, options=options)
        self.health_failures: list[str] = []
        self.slowest_health_s = 0.0
        self.peak = 0
        self._job_id = JOB_ID
        self._rises: set[Rise] = set()
        self._places = asyncio.Semaphore(AT_ONCE)
        self._one_alone = asyncio.Lock()

    async def close(self) -> None:
        self._plain.close()
        await self.channel.close()

    async def outcome(self, sent: Input) -> Outcome:
        """Of one call. A slow one is made again, up to twice, alone and without counting what both sides wait for a
        processor, as others use this machine, too: what is slow every time is the input's fault or a hang."""
        most_s = SLOW_S * sent.images
        async with self._places:
            outcome = await self._timed(sent)
        took_s = outcome.seconds
        for again in range(1, MOST_AGAIN + 1):
            if outcome.failure or took_s < most_s:
                return outcome
            async with self._alone():
                worked, waited = self._cpu_s(), self._waited_s()
                repeated = await self._timed(sent)
                unhindered = repeated.seconds - max(0.0, self._waited_s() - waited)
                took_s = min(repeated.seconds, max(unhindered, self._cpu_s() - worked))
            longest_s, memory = max(outcome.seconds, repeated.seconds), max(outcome.memory, repeated.memory)
            outcome = repeated._replace(seconds=longest_s, again=again, memory=memory, beside=outcome.beside)
        if outcome.failure or took_s < most_s:
            return outcome
        return outcome._replace(failure=f"took {took_s:.1f} s, again and again, at most {most_s:g} are allowed")

    async def begin(self) -> None:
        """A job that inputs can name, which has its result."""
        accepted = (await self._good_job()).accepted
        self._job_id = accepted.job_id

    async def still_paints(self) -> str:
        """What is wrong with a picture that it makes now, if something is."""
        try:
            response = await self._good_job()
            with Image.open(io.BytesIO(response.result.image.data)) as picture:
                picture.load()
                return "" if picture.size == (32, 21) else f"a picture of {picture.size}"
        except (grpc.aio.AioRpcError, OSError) as error:
            return repr(error)

    async def watch_health(self) -> None:
        """Asks ten times a second, until it is cancelled."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        while True:
            began = time.monotonic()
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
                if answer.status != health_pb2.HealthCheckResponse.SERVING:
                    self.health_failures.append("NOT_SERVING")
            except grpc.aio.AioRpcError as error:
                self.health_failures.append(error.code().name)
            self.slowest_health_s = max(self.slowest_health_s, time.monotonic() - began)
            await asyncio.sleep(0.1)

    @contextlib.contextmanager
    def rise(self) -> Iterator[Rise]:
        """How far memory rises during the block. What rises while several are on their way is held against each of them."""
        self._note_peak()
        mine = Rise(self._memory("VmRSS"))
        self._rises.add(mine)
        for each in self._rises:
            each.beside = max(each.beside, len(self._rises) - 1)
        try:
            yield mine
        finally:
            self._note_peak()
            self._rises.remove(mine)

    def defects(self) -> list[str]:
        """What it has logged as an error or, outside of its log, printed: a task that failed, a lost exception."""
        with open(self._log_path) as file:
            return [line.strip() for line in file if " ERROR " in line or "Traceback" in line or "Fatal" in line]

    def _note_peak(self) -> None:
        """Tells the peak to whoever is on the way, and begins to measure it anew, from what it is now."""
        peak = self._memory("VmHWM")
        self.peak = max(self.peak, peak)
        for each in self._rises:
            each.peak = max(each.peak, peak)
        with open(f"/proc/{self.pid}/clear_refs", "w") as file:
            file.write("5")

    def _memory(self, name: str) -> int:
        with open(f"/proc/{self.pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))

    def _cpu_s(self) -> float:
        with open(f"/proc/{self.pid}/stat") as file:
            user, system = file.read().rsplit(")", 1)[1].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Nothing else is on its way but health checks."""
        async with self._one_alone, contextlib.AsyncExitStack() as places:
            for _ in range(AT_ONCE):
                await places.enter_async_context(self._places)
            yield

    async def _timed(self, sent: Input) -> Outcome:
        with self.rise() as rise:
            began = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    code, failure = await self._called(sent)
            except TimeoutError:
                code, failure = "HANG", f"no answer within {PATIENCE_S:g} s"
            seconds = time.monotonic() - began
        return Outcome(code, seconds, failure, memory=rise.peak - rise.before, beside=rise.beside)

    def _waited_s(self) -> float:
        """How long threads of the server and of this client have waited for a processor; 0 where the kernel does not say."""
        waited_ns = 0
        for path in (*glob.glob(f"/proc/{self.pid}/task/*/schedstat"), *glob.glob("/proc/self/task/*/schedstat")):
            with contextlib.suppress(OSError), open(path) as file:  # of a thread that has ended
                waited_ns += int(file.read().split()[1])
        return waited_ns / 1e9

    async def _good_job(self) -> pb.StylizeResponse:
        call = self.channel.unary_unary(
            f"/{SERVICE.full_name}/Stylize", response_deserializer=pb.StylizeResponse.FromString
        )
        return await call(request(), timeout=PATIENCE_S)

    async def _called(self, sent: Input) -> tuple[str, str]:
        """(code, what is wrong with it)."""
        method = METHODS[sent.method]
        path = f"/{SERVICE.full_name}/{sent.method}"
        messages = [message.replace(JOB_ID.encode(), self._job_id.encode()) for message in sent.messages]
        try:
            if method.client_streaming:
                return await asyncio.to_thread(self._streamed, path, messages, method.server_streaming)
            if method.server_streaming:
                async for _ in self.channel.unary_stream(path)(messages[0]):
                    pass
            else:
                await self.channel.unary_unary(path)(messages[0])
            return "OK", ""
        except grpc.RpcError as error:
            return error.code().name, _wrong(error)

    def _streamed(self, path: str, messages: list[bytes], controls: bool) -> tuple[str, str]:
        """On a thread: the client of grpc.aio makes INTERNAL of its own of a call that ends while it writes. A controller
        leaves after a while, as its job may be paused."""
        if not controls:
            self._plain.stream_unary(path)(iter(messages), timeout=PATIENCE_S)
            return "OK", ""
        try:
            for data in self._plain.stream_stream(path)(iter(messages), timeout=CONTROLLED_S):
                response = pb.StylizeInteractiveResponse.FromString(data)
                for told in response.command_result.field_errors:
                    if INSIDES.search(told.description):
                        return "OK", f"a command is answered {told.description!r}"
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return "LEFT", ""
            raise
        return "OK", ""


def _wrong(error: Any) -> str:
    """What is wrong with a refusal: its code, or that it does not say what is wrong with the input."""
    said = f"{error.code().name}: {error.details()}"
    if error.code() not in REFUSALS:
        return said
    status = status_pb2.Status.FromString(dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b""))
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for kind in (info, bad):
            if detail.Is(kind.DESCRIPTOR):
                detail.Unpack(kind)
    if not info.reason:
        return f"{said}, without a reason"
    if INSIDES.search(said):
        return f"{said}, which speaks of the server's insides"
    if info.reason == "INVALID_REQUEST" and not all(v.field and v.description for v in bad.field_violations or [None]):
        return f"{said}, without a field"
    return ""


@contextlib.asynccontextmanager
async def target(log_path: str) -> AsyncIterator[Target]:
    """A server for inputs, whose log is in a file."""
    limits = (part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value)))
    command = (sys.executable, "-m", "gramophone_server.main", *FLAGS, *limits)
    with open(log_path, "w") as log:  # noqa: ASYNC230 - before anything is served
        server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=log)
    assert server.stdout is not None
    try:
        address = (await server.stdout.readline()).decode().split()[-1]
        await server.stdout.readline()  # ready
        made = Target(address, server.pid, log_path)
        try:
            yield made
        finally:
            await made.close()
    finally:
        if server.returncode is None:
            server.terminate()
        try:
            await asyncio.wait_for(server.wait(), 60)
        except TimeoutError:
            server.kill()
            raise


async def beside(work: Awaitable[None], target: Target) -> None:
    """Does ``work`` while health is watched."""
    watch = asyncio.create_task(target.watch_health())
    try:
        await work
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
