"""A server for bad inputs: how each input is sent, and what counts as a failure of the server."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import io
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.telemetry.metrics import SERVICE
from tests.bad_input.inputs import JOB_ID, Input, request
from tests.support.processes import environment

SLOW_S = 2.0  # for each image of a call; a slower call is repeated
MAX_REPEATS = 2
CONCURRENCY = 8  # simultaneous calls; a slow one is repeated alone
CONTROL_TIMEOUT_S = 0.3
TICK_S = 0.1  # between two looks at the client's own event loop
HANG_TIMEOUT_S = 20.0  # a call that takes longer hangs, even if the machine is busy with other work
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
REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
INTERNALS = re.compile(r"PIL|object at 0x|Traceback|Error\(|the server failed")  # must not be in a message to a client


class Outcome(NamedTuple):
    """The outcome of an input."""

    code: str  # of the status; LEFT: the client ended the call
    seconds: float  # elapsed time, the longest of all repeats
    failure: str = ""  # the rule that the server violated
    repeats: int = 0
    memory: int = 0  # bytes by which the server's memory rose during the call
    others: int = 0  # highest number of other calls at the same time, which may have caused that rise


class MemoryWatch:
    """The server's memory during a call, in bytes."""

    def __init__(self, before: int) -> None:
        self.before = self.peak = before
        self.others = 0  # highest number of other calls at the same time


class ServerUnderTest:
    """A server process and its client. Memory is in bytes."""

    def __init__(self, address: str, pid: int, log_path: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.address, self.pid, self._log_path, self._clock = address, pid, log_path, clock
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(address, options=options)
        self._blocking_channel = grpc.insecure_channel(address, options=options)
        self.health_failures: list[str] = []
        self.slowest_health_s = 0.0
        self.peak = 0
        self._job_id = JOB_ID
        self._memory_watches: set[MemoryWatch] = set()
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self._alone_lock = asyncio.Lock()

    async def close(self) -> None:
        self._blocking_channel.close()
        await self.channel.close()

    async def send(self, sent: Input) -> Outcome:
        """Sends an input. A slow call is repeated up to twice, alone.

        A repeat is timed without the time that client and server wait for a processor, because the machine may be
        shared. A call that is slow every time is therefore slow because of the input, or hangs.
        """
        max_s = SLOW_S * sent.images
        async with self._slots:
            outcome = await self._timed(sent)
        took_s = outcome.seconds
        for repeats in range(1, MAX_REPEATS + 1):
            if outcome.failure or took_s < max_s:
                return outcome
            async with self._alone():
                cpu_s, waited_s = self._cpu_s(), self.waited_s()
                repeated = await self._timed(sent)
                took_s = self._without_waiting_s(repeated.seconds, cpu_s, waited_s)
            longest_s, memory = max(outcome.seconds, repeated.seconds), max(outcome.memory, repeated.memory)
            outcome = repeated._replace(seconds=longest_s, repeats=repeats, memory=memory, others=outcome.others)
        if outcome.failure or took_s < max_s:
            return outcome
        return outcome._replace(failure=f"took {took_s:.1f} s in every repeat, at most {max_s:g} are allowed")

    async def run_named_job(self) -> None:
        """Runs the job whose id replaces `JOB_ID` in inputs."""
        accepted = (await self._ordinary_job()).accepted
        self._job_id = accepted.job_id

    async def check_ordinary_job(self) -> str:
        """Runs an ordinary job. Returns its failure, or ""."""
        try:
            response = await self._ordinary_job()
            with Image.open(io.BytesIO(response.result.image.data)) as picture:
                picture.load()
                return "" if picture.size == (32, 21) else f"a picture of {picture.size}"
        except (grpc.aio.AioRpcError, OSError) as error:
            return repr(error)

    async def watch_health(self) -> None:
        """Checks health ten times a second until it is cancelled.

        A check is timed without the time in which this event loop itself did not run, and without the time that client
        and server wait for a processor.
        """
        while True:
            start, cpu_s, waited_s = self._clock(), self._cpu_s(), self.waited_s()
            late_s, check = 0.0, asyncio.create_task(self._check_health())
            try:
                while not check.done():
                    due = self._clock() + TICK_S
                    await asyncio.wait({check}, timeout=TICK_S)
                    late_s += max(0.0, self._clock() - due)
                await check
            finally:
                check.cancel()
            took_s = self._without_waiting_s(self._clock() - start - late_s, cpu_s, waited_s)
            self.slowest_health_s = max(self.slowest_health_s, took_s)
            await asyncio.sleep(0.1)

    async def _check_health(self) -> None:
        stub = health_pb2_grpc.HealthStub(self.channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=HANG_TIMEOUT_S)
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                self.health_failures.append("NOT_SERVING")
        except grpc.aio.AioRpcError as error:
            self.health_failures.append(error.code().name)

    @contextlib.contextmanager
    def watch_memory(self) -> Iterator[MemoryWatch]:
        """Measures the rise of memory during the block. A rise during several calls counts for each of them."""
        self._record_peak()
        watch = MemoryWatch(self._memory("VmRSS"))
        self._memory_watches.add(watch)
        for each in self._memory_watches:
            each.others = max(each.others, len(self._memory_watches) - 1)
        try:
            yield watch
        finally:
            self._record_peak()
            self._memory_watches.remove(watch)

    def logged_errors(self) -> list[str]:
        """Errors in the log, and tracebacks printed outside of it, for example of a task that failed."""
        with open(self._log_path) as file:
            return [line.strip() for line in file if " ERROR " in line or "Traceback" in line or "Fatal" in line]

    def _record_peak(self) -> None:
        """Adds the peak of the process to all current watches, and resets it to the current memory."""
        peak = self._memory("VmHWM")
        self.peak = max(self.peak, peak)
        for each in self._memory_watches:
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

    def waited_s(self) -> float:
        """How long the threads of server and client have waited for a processor; 0 if the kernel does not report it."""
        waited_ns = 0
        for path in (*glob.glob(f"/proc/{self.pid}/task/*/schedstat"), *glob.glob("/proc/self/task/*/schedstat")):
            with contextlib.suppress(OSError), open(path) as file:  # OSError: the thread has ended
                waited_ns += int(file.read().split()[1])
        return waited_ns / 1e9

    def _without_waiting_s(self, seconds: float, cpu_s: float, waited_s: float) -> float:
        """What is left of ``seconds`` without the waits for a processor; at least what the server had of one in them.

        ``cpu_s`` and ``waited_s`` are the values at their start.
        """
        left_s = seconds - max(0.0, self.waited_s() - waited_s)
        return min(seconds, max(left_s, self._cpu_s() - cpu_s))

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Waits until no other call is running, and delays new ones until the block ends. Health checks continue."""
        async with self._alone_lock, contextlib.AsyncExitStack() as slots:
            for _ in range(CONCURRENCY):
                await slots.enter_async_context(self._slots)
            yield

    async def _timed(self, sent: Input) -> Outcome:
        with self.watch_memory() as memory:
            start = self._clock()
            try:
                async with asyncio.timeout(HANG_TIMEOUT_S):
                    code, failure = await self.call_once(sent)
            except TimeoutError:
                code, failure = "HANG", f"no answer within {HANG_TIMEOUT_S:g} s"
            seconds = self._clock() - start
        return Outcome(code, seconds, failure, memory=memory.peak - memory.before, others=memory.others)

    async def _ordinary_job(self) -> pb.StylizeResponse:
        call = self.channel.unary_unary(
            f"/{SERVICE.full_name}/Stylize", response_deserializer=pb.StylizeResponse.FromString
        )
        return await call(request(), timeout=HANG_TIMEOUT_S)

    async def call_once(self, sent: Input) -> tuple[str, str]:
        """Makes the call; returns (status code, failure of the server or "")."""
        method = METHODS[sent.method]
        path = f"/{SERVICE.full_name}/{sent.method}"
        messages = [message.replace(JOB_ID.encode(), self._job_id.encode()) for message in sent.messages]
        try:
            if method.client_streaming:
                return await asyncio.to_thread(self._call_streaming, path, messages, method.server_streaming)
            if method.server_streaming:
                async for _ in self.channel.unary_stream(path)(messages[0]):
                    pass
            else:
                await self.channel.unary_unary(path)(messages[0])
            return "OK", ""
        except grpc.RpcError as error:
            return error.code().name, _failure_of(error)

    def _call_streaming(self, path: str, messages: list[bytes], is_interactive: bool) -> tuple[str, str]:
        """Makes a client-streaming call; runs on a thread.

        The client of grpc.aio is not used, because it reports INTERNAL for a call that ends while it writes. An
        interactive call is ended after a while, because its job may be paused.
        """
        if not is_interactive:
            self._blocking_channel.stream_unary(path)(iter(messages), timeout=HANG_TIMEOUT_S)
            return "OK", ""
        try:
            for data in self._blocking_channel.stream_stream(path)(iter(messages), timeout=CONTROL_TIMEOUT_S):
                response = pb.StylizeInteractiveResponse.FromString(data)
                for violation in response.command_result.field_errors:
                    if INTERNALS.search(violation.description):
                        return "OK", f"a command result exposes internals of the server: {violation.description!r}"
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return "LEFT", ""
            raise
        return "OK", ""


def _failure_of(error: Any) -> str:
    """The failure of the server in a refusal: a wrong code, or details that do not explain it; or ""."""
    message = f"{error.code().name}: {error.details()}"
    if error.code() not in REFUSALS:
        return message
    status = status_pb2.Status.FromString(dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b""))
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for kind in (info, bad):
            if detail.Is(kind.DESCRIPTOR):
                detail.Unpack(kind)
    if "Received message larger than max" in message:
        return ""  # gRPC itself refuses a message above `max_message_bytes`, by its prefix
    if not info.reason:
        return f"{message}, without a reason"
    if INTERNALS.search(message):
        return f"{message}, which exposes internals of the server"
    if info.reason == "INVALID_REQUEST" and not all(v.field and v.description for v in bad.field_violations or [None]):
        return f"{message}, without a field"
    return ""


@contextlib.asynccontextmanager
async def running_server(log_path: str) -> AsyncIterator[ServerUnderTest]:
    """A server that logs to the file."""
    limits = (part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value)))
    command = (sys.executable, "-m", "gramophone_server.main", *FLAGS, *limits)
    with open(log_path, "w") as log:  # noqa: ASYNC230 - the event loop has nothing else to do yet
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=log, env=environment()
        )
    assert process.stdout is not None
    try:
        address = (await process.stdout.readline()).decode().split()[-1]
        await process.stdout.readline()  # "ready"
        server = ServerUnderTest(address, process.pid, log_path)
        try:
            yield server
        finally:
            await server.close()
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 60)
        except TimeoutError:
            process.kill()
            raise


async def watch_health_during(work: Awaitable[None], server: ServerUnderTest) -> None:
    """Awaits ``work`` while the server's health is watched."""
    watching = asyncio.create_task(server.watch_health())
    try:
        await work
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
