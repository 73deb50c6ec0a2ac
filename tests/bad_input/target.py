"""The server that raw calls are made to, and the rules that each answer must keep."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

from gramophone_server.config import Limits
from gramophone_server.telemetry.metrics import SERVICE
from tests.support.monitoring import RuleViolation, memory_of, with_children
from tests.support.raw_http2 import Answer, Headers, RawConnection, StreamOver, connection, prefixed

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
INTERNALS = re.compile(r"PIL|object at 0x|Traceback|Error\(|the server failed")  # must not be in a message to a client
REFUSALS = frozenset({
    "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "ABORTED", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED", "UNAVAILABLE",
})  # fmt: skip
# gRPC itself refuses these before any handler sees them, in its own words and without details: messages above the
# limit, encodings that it does not know, and flags that contradict the headers.
GRPC_REFUSALS = re.compile(
    r"RESOURCE_EXHAUSTED: .*larger than max|UNIMPLEMENTED: .*([Cc]ompress|encoding|algorithm)"
    r"|INTERNAL: (Error parsing 'grpc-encoding'|Compression bit set but no encoding|.*invalid (compression )?flag)"
)
RETRY_REASONS = ("QUEUE_FULL", "SERVER_BUSY", "NOT_READY")  # these say when to come back


class Case(NamedTuple):
    """One hostile client."""

    kind: str
    name: str  # unique
    play: Callable[[Target], Awaitable[None]]  # raises RuleViolation, or TimeoutError
    within_s: float = 15.0
    max_rise: int | None = None  # bytes that the server may take for it; None: three times the largest message
    engine: str = "fake"


class Target:
    """A server, and how it has answered."""

    def __init__(
        self, address: str, pid: int, limits: Limits, metrics_url: str = "", *, is_shared: bool = False
    ) -> None:
        """``is_shared``: others use it as well, so nothing follows from its memory and its processor time."""
        self.address, self.pid, self.limits, self.metrics_url = address, pid, limits, metrics_url
        self.is_shared = is_shared
        self.job_id = ""  # of a job that has ended
        self.answers: Counter[str] = Counter()  # by code and reason

    def connection(self, window: int = 65_535):
        """A connection for the length of the block."""
        return connection(self.address, window=window)

    def memory(self, name: str = "VmRSS") -> int:
        """The memory of the server and its decoders in bytes; "VmHWM": their peaks."""
        return sum(memory_of(each, name) for each in with_children(self.pid))

    def cpu_s(self) -> float:
        """The processor time that the server and its decoders have used."""
        with open(f"/proc/{self.pid}/stat") as file:
            times = file.read().rsplit(")", 1)[1].split()[11:15]  # its own, and those of children that have ended
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    async def call(
        self,
        raw: RawConnection,
        path: str,
        messages: Iterable[bytes],
        *,
        headers: Headers = (),
        allowed: Iterable[str] = (),
        within_s: float = 10.0,
    ) -> Answer:
        """Sends the messages, as they are on the wire, ends the stream and checks the answer (see `check`)."""
        stream = raw.open_stream(path, headers)
        try:
            for message in messages:
                await stream.send(message, patience_s=within_s)
            if not stream.is_over:
                await stream.send(b"", end=True)
        except StreamOver:  # refused before its end
            pass
        return self.check(await stream.answer(within_s), allowed)

    def check(self, answer: Answer, allowed: Iterable[str] = ()) -> Answer:
        """Counts an answer. Raises `RuleViolation` unless it is OK, or a refusal that explains itself; or if its code
        or reason is not among the ``allowed`` ones, if there are any."""
        self.answers[answer.reason or answer.code] += 1
        if failure := failure_of(answer):
            raise RuleViolation(failure)
        if (allowed := tuple(allowed)) and not {answer.code, answer.reason} & set(allowed):
            raise RuleViolation(f"{answer.code} {answer.reason} ({answer.message[:200]}) instead of {allowed}")
        return answer


def failure_of(answer: Answer) -> str:
    """What is wrong with an answer, or ""."""
    message = f"{answer.code}: {answer.message[:300]}"
    if answer.code == "OK" or GRPC_REFUSALS.match(message):
        return ""
    if answer.code not in REFUSALS:
        return message
    if INTERNALS.search(message):
        return f"{message}, which exposes internals of the server"
    if not answer.reason:
        return f"{message}, without a reason"
    if answer.reason == "INVALID_REQUEST" and not all(
        field and description for field, description in answer.violations or [("", "")]
    ):
        return f"{message}, without a field"
    if (answer.reason in RETRY_REASONS or answer.code == "UNAVAILABLE") and answer.retry_after_s is None:
        return f"{message}, without a time to come back"
    return ""


def path_of(method: str) -> str:
    """The path of a method of the service."""
    return f"/{SERVICE.full_name}/{method}"


def one(message: bytes) -> tuple[bytes, ...]:
    """The only message of a call, as it is on the wire."""
    return (prefixed(message),)
