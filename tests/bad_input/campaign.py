"""A server, what is sent to it, and what it is held to."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_server import config
from tests.bad_input import messages, pictures
from tests.bad_input.messages import METHODS, Input

__all__ = ["CORPUS", "Campaign", "Outcome", "corpus", "kept", "wrong"]

CORPUS = Path(__file__).parent / "corpus"
# Small pictures and short jobs, so that what happens to be right costs little; the rest as it is by default.
SETTINGS = {"engine": "fake", "iter_ms": 1, "port": 0, "log_level": "warning", "list_jobs": 1}
SETTINGS |= {"max_size": 1024, "max_iterations": 100, "max_image_pixels": pictures.LIMIT, "max_styles": 2}
SETTINGS |= {"max_detach_s": 1, "max_paused_s": 1, "max_checkpoint_bytes": 2**20, "max_kept": 16}
LARGEST_KEPT = 2**18  # bytes of an input in the corpus; the bombs are made anew each time
SIDE_BY_SIDE = 4
LONGEST_S = 2.0  # of an answer
GIVEN_UP_S = 20.0
HEALTH_S = 0.05
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0))
DEFECTS = {
    *(grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS),
    *(grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.OUT_OF_RANGE),
}
# What gRPC itself refuses never reaches the service, so it has no details.
GRPCS_OWN = ("larger than max", "Sent message larger", "RESOURCE_EXHAUSTED: SERVER")


class Outcome(NamedTuple):
    """How an input was answered."""

    code: grpc.StatusCode
    message: str
    fields: tuple[str, ...]  # that were refused
    reason: str  # of ErrorInfo
    seconds: float


def wrong(outcome: Outcome, longest_s: float = LONGEST_S) -> str:
    """Which rule an answer breaks; empty if none."""
    code, message, fields, reason, seconds = outcome
    if code in DEFECTS:
        return f"ended in {code.name}: {message}"
    if seconds > longest_s:
        return f"was answered after {seconds:.1f} s"
    if code is grpc.StatusCode.OK or any(words in message for words in GRPCS_OWN):
        return ""
    if not reason:
        return f"ended in {code.name} without a reason: {message}"
    if code is grpc.StatusCode.INVALID_ARGUMENT and not (fields and all(fields)):
        return f"was refused without saying what is wrong: {message}"
    return ""


def corpus() -> list[Input]:
    """The inputs that failed once."""
    return [Input.from_bytes(path.read_bytes()) for path in sorted(CORPUS.glob("*.input"))]


@dataclass
class Campaign:
    """Inputs and what came of them. `failures` has a sentence for each broken rule."""

    seed: int
    longest_s: float = LONGEST_S
    keep: Callable[[Input], str] = lambda one: ""  # what failed, for later; returns where
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and code
    slowest: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds, by kind
    failures: list[str] = field(default_factory=list)
    checks: list[float] = field(default_factory=list)  # seconds of each health check
    peak_bytes: int = 0  # more than before, of the server, while a bomb was there
    allowed_bytes: int = 0
    sent: int = 0

    async def run(self, count: int, inputs: Iterable[Input] = (), bombs: bool = True) -> None:
        """Sends ``inputs``, the bombs one by one, and nonsense until ``count`` were sent."""
        async with _serving() as server:
            self.allowed_bytes = server.limits.memory_bytes
            checking = asyncio.create_task(self._check_health(server))
            for one in (*inputs, *((messages.bomb(*bomb) for bomb in pictures.bombs()) if bombs else ())):
                await self._alone(server, one)
            checkpoint, job_id = await server.checkpoint()
            await self._together(server, count - self.sent, checkpoint, [job_id])
            checking.cancel()
            await asyncio.wait({checking})
            if not checking.cancelled() and (error := checking.exception()) is not None:
                self.failures.append(f"health was not answered: {error}")
            if (code := server.process.poll()) is not None:
                self.failures.append(f"the server ended with {code}")
            else:
                await self._a_good_job(server)

    async def _together(self, server: Server, count: int, checkpoint: bytes, job_ids: list[str]) -> None:
        chance, left = random.Random(self.seed), iter(range(max(0, count)))

        async def sender() -> None:
            for _ in left:
                if server.process.poll() is not None:
                    return
                await self._one(server, messages.nonsense(chance, checkpoint, job_ids))

        before = server.start_peak()
        await asyncio.gather(*(sender() for _ in range(SIDE_BY_SIDE)))
        self._judge_memory("nonsense", server.peak() - before, SIDE_BY_SIDE)

    async def _alone(self, server: Server, one: Input) -> None:
        before = server.start_peak()
        await self._one(server, one)
        self._judge_memory(one.name, server.peak() - before, 1)

    async def _one(self, server: Server, one: Input) -> None:
        outcome = await server.answer(one)
        self.sent += 1
        self.outcomes[one.method, outcome.code.name] += 1
        self.slowest[one.method] = max(self.slowest[one.method], outcome.seconds)
        if broken := wrong(outcome, self.longest_s):
            self.failures.append(f"{one.name} {broken} {self.keep(one)}")

    async def _a_good_job(self, server: Server) -> None:
        request = pb.StylizeRequest(spec=messages.job())
        response = await pb_grpc.StyleTransferServiceStub(server.channel).Stylize(request, timeout=GIVEN_UP_S)
        if not response.result.image.data.startswith(b"\x89PNG"):
            self.failures.append("a good job made no picture afterwards")

    def _judge_memory(self, name: str, bytes_more: int, requests: int) -> None:
        self.peak_bytes = max(self.peak_bytes, bytes_more // requests)
        if bytes_more > requests * self.allowed_bytes:
            self.failures.append(
                f"{name} took {bytes_more >> 20} MiB; {requests * self.allowed_bytes >> 20} are allowed"
            )

    async def _check_health(self, server: Server) -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                before = time.monotonic()
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=GIVEN_UP_S)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING, answer
                self.checks.append(time.monotonic() - before)
                await asyncio.sleep(HEALTH_S)


@dataclass
class Server:
    """A process and channels to it."""

    process: subprocess.Popen[str]
    address: str
    channel: grpc.aio.Channel
    plain_channel: grpc.Channel
    limits: config.Settings

    async def answer(self, one: Input) -> Outcome:
        """Sends an input and takes all that comes back.

        By gRPC's synchronous channel, on a thread: the asynchronous one loses the status of an RPC that the server ends
        while the client still writes (1.85.1), and says INTERNAL instead.
        """
        return await asyncio.to_thread(self._answer, one)

    def _answer(self, one: Input) -> Outcome:
        method = METHODS[one.method]
        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        call_to = getattr(self.plain_channel, kind)(f"/{method.containing_service.full_name}/{method.name}")
        began = time.monotonic()
        try:
            call = call_to(iter(one.messages) if method.client_streaming else one.messages[0], timeout=GIVEN_UP_S)
            if method.server_streaming:
                for _ in call:
                    pass
        except grpc.RpcError as error:
            return Outcome(error.code(), error.details() or "", *_details(error), time.monotonic() - began)
        return Outcome(grpc.StatusCode.OK, "", (), "", time.monotonic() - began)

    async def checkpoint(self) -> tuple[bytes, str]:
        """A checkpoint that the server has written, and the id of its job."""
        stub = pb_grpc.StyleTransferServiceStub(self.channel)
        recipe = pb.Recipe(size=32, iterations=100, smallest_size=0)  # several slices: the last one makes none
        spec = messages.job(recipe=recipe, checkpoints=pb.CheckpointOptions())
        events = [r.event async for r in stub.StylizeStream(pb.StylizeStreamRequest(spec=spec), timeout=GIVEN_UP_S)]
        (first, *_) = (event.checkpoint.data for event in events if event.HasField("checkpoint"))
        return first, events[0].accepted.job_id

    def start_peak(self) -> int:
        """Bytes of resident memory; `peak` tells the most from now on."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return self._memory("VmRSS")

    def peak(self) -> int:
        """See `start_peak`."""
        return self._memory("VmHWM")

    def _memory(self, name: str) -> int:
        if self.process.poll() is not None:
            return 0
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


@contextlib.asynccontextmanager
async def _serving() -> AsyncIterator[Server]:
    settings = {config.variable(name): str(value) for name, value in SETTINGS.items()}
    limits, _ = config.load([], settings)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRAMOPHONE_")}
    with _process([sys.executable, "-m", "gramophone_server.main"], environment | settings) as process:
        assert process.stdout is not None
        address = (await asyncio.to_thread(process.stdout.readline)).split()[-1]
        await asyncio.to_thread(process.stdout.readline)  # ready
        with grpc.insecure_channel(address, options=OPTIONS) as plain_channel:
            async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
                yield Server(process, address, channel, plain_channel, limits)


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def _details(error: Any) -> tuple[tuple[str, ...], str]:
    """The fields that were refused, and the reason."""
    trailers: dict[str, Any] = dict(error.trailing_metadata() or ())
    fields, reason = (), ""
    for detail in status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b"")).details:
        bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
        if detail.Unpack(bad):
            fields = tuple(violation.field for violation in bad.field_violations)
        elif detail.Unpack(info):
            reason = info.reason
    return fields, reason


def kept(one: Input) -> str:
    """Writes an input into the corpus, one that is too large for it into out/; says how it is sent again."""
    data = one.to_bytes()
    folder = CORPUS if len(data) <= LARGEST_KEPT else Path("out")
    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256(data).hexdigest()[:12]}.input"
    path.write_bytes(data)
    return f"(python -m tests.bad_input --only {os.path.relpath(path)})"
