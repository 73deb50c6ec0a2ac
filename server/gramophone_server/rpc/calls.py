"""The RPCs under way, each from its start to its end, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeAlias

import grpc

from gramophone.recipe import Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.domain.job import ran_out_of_memory
from gramophone_server.errors import EngineFailed, GramophoneError, InvalidRequest, OutOfHostMemory, SlowReader
from gramophone_server.jobs.job import Job
from gramophone_server.jobs.mailbox import Mailbox
from gramophone_server.rpc.status import reason, refusal
from gramophone_server.telemetry.access_log import AccessLog, trace_id
from gramophone_server.telemetry.metrics import METHODS, Metrics

__all__ = ["ActiveCalls", "Context", "Malformed", "Response", "RpcCall", "as_domain_error"]

log = logging.getLogger(__name__)

# gRPC sends a deadline as at most two digits behind the first one, rounded up, so a client leaves by up to a hundredth of it
# before the deadline that the server knows (measured: 1.5 s came 10 ms and 12.31 s came 100 ms too long); and its request has
# been on its way. Who leaves so late has run out of time.
ROUNDED_UP = 0.01
ON_ITS_WAY_S = 0.02

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Response: TypeAlias = pb.StylizeStreamResponse | pb.WatchJobResponse | pb.StylizeInteractiveResponse


class Malformed(NamedTuple):
    """What came instead of a request."""

    wanted: str  # full name of the message
    bytes: int


class ActiveCalls:
    """The RPCs of one server that are under way."""

    def __init__(self, metrics: Metrics, access: AccessLog, max_blocked_s: float) -> None:
        self.metrics, self.access, self.max_blocked_s = metrics, access, max_blocked_s
        self._under_way: set[RpcCall] = set()
        self._none = asyncio.Event()
        self._none.set()

    def __iter__(self) -> Iterator[RpcCall]:
        return iter(self._under_way)

    def __len__(self) -> int:
        return len(self._under_way)

    def begin(self, method: str, context: Context) -> RpcCall:
        """One more, of this name. In its handler's task."""
        call = RpcCall(method, context, self)
        self._under_way.add(call)
        self._none.clear()
        return call

    def over(self, call: RpcCall) -> None:
        """One less."""
        self._under_way.discard(call)
        if not self._under_way:
            self._none.set()

    async def idle(self) -> None:
        """Returns when none is under way."""
        await self._none.wait()


class RpcCall:
    """Whether the client of an RPC is still there, the job that it watches, and what is told of it afterwards."""

    def __init__(self, method: str, context: Context, calls: ActiveCalls) -> None:
        self.gone = False
        self._method = METHODS[method]
        self._context = context
        self._calls = calls
        self._metrics = calls.metrics
        self._job_id: str | None = None
        self._watched: tuple[Job, Mailbox] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._writing = SendTimeout(calls.max_blocked_s, self._dismiss)
        self._code: grpc.StatusCode | None = None
        self._error: GramophoneError | None = None
        self._received = self._sent = self._frames = self._dropped = 0  # messages, and what was in them
        self._dismissal: asyncio.Task[None] | None = None
        self._started = time.monotonic()
        # gRPC tells what is left by the wall clock, so it is asked before somebody can set that.
        left_s = context.time_remaining()
        # When the client stops to wait, in seconds of the monotonic clock.
        self.deadline_at = None if left_s is None else self._started + left_s
        self._late_at = math.inf if left_s is None else self._started + left_s * (1 - ROUNDED_UP) - ON_ITS_WAY_S
        # Asked for now: once the RPC is over, gRPC's context has lost its call, and to ask it crashes the process (1.85.1).
        self._trace, self._peer = trace_id(context.invocation_metadata()), context.peer()
        task = asyncio.current_task()
        assert task is not None, "a handler runs in a task"
        self._task = task
        # The only notice of an end that always comes: a client that leaves while a message is being written makes no
        # CancelledError in the handler, and `context.cancelled()` stays false.
        context.add_done_callback(self._done)  # type: ignore[arg-type]  # the stub asks for a class of its own
        self._metrics.rpc_began(self._method)

    def received(self, request: object) -> None:
        """A message of the client has come. Raises `InvalidRequest` if it is none."""
        self._received += 1
        self._metrics.message_received(self._method)
        if isinstance(request, Malformed):
            wanted = f"must be a {request.wanted}, got {request.bytes} bytes that cannot be read as one"
            raise InvalidRequest([Violation("request", f"{wanted}; make the client's stubs from this server's proto")])

    def sending(self, response: Response) -> SendTimeout:
        """`with`: the message is on its way."""
        self._sends()
        if response.event.HasField("frame"):
            self._frames += 1
            self._dropped += response.event.frame.dropped
            self._metrics.frame_sent(response.event.frame.dropped)
        return self._writing

    def names(self, job: Job) -> None:
        """It is about this job."""
        self._job_id = job.id

    def watches(self, job: Job, mailbox: Mailbox) -> None:
        """The end of this RPC is a watcher leaving the job."""
        self.names(job)
        self._watched = job, mailbox
        if self.gone:
            job.leave(mailbox)

    def reads(self, reader: asyncio.Task[None]) -> None:
        """`reader` takes the client's messages; the end of this RPC is its end, too."""
        self._reader = reader
        if self.gone:
            reader.cancel()

    def succeeded(self) -> None:
        """The handler has nothing more to say, but for the one response of a call without a stream of them."""
        self._code = grpc.StatusCode.OK
        if not self._method.server_streams:
            self._sends()

    async def fail(self, error: BaseException) -> NoReturn:
        """Ends the RPC with the status of `error`. The one way out for every exception of a handler."""
        if isinstance(error, GeneratorExit | KeyboardInterrupt | SystemExit):
            raise error
        if isinstance(error, asyncio.CancelledError) and self._task.cancelling():
            raise error  # gRPC cancelled this handler; swallowing that leaks the call's operations
        if not isinstance(error, GramophoneError):
            # A CancelledError from something awaited, too: without a status the client would hang until its deadline.
            log.error("%s job=%s failed", self._method.name, self._job_id or "-", exc_info=error)
            error = as_domain_error(error)
        error.__traceback__ = None  # the job keeps its error, and must not keep this handler with it
        await self._abort(error)

    async def _abort(self, error: GramophoneError) -> NoReturn:
        code, message, trailers = refusal(error)
        self._code, self._error = code, error
        await self._context.abort(code, message, trailing_metadata=trailers)

    def _dismiss(self) -> None:
        """The handler stands in gRPC's write and cannot raise, and a handler that is only cancelled sends no status; so
        it is cancelled, and the status sent beside it. It reaches the client behind what it has not read yet."""
        if self.gone:
            return
        self._leave()
        error = SlowReader(self._calls.max_blocked_s)
        self._code, self._error = grpc.StatusCode.ABORTED, error
        self._task.cancel()
        self._dismissal = asyncio.create_task(self._send(error))

    async def _send(self, error: GramophoneError) -> None:
        with contextlib.suppress(Exception):  # `abort` always raises
            await self._abort(error)

    def _leave(self) -> None:
        self._writing.close()
        if self._watched is not None:
            job, mailbox = self._watched
            job.leave(mailbox)
        if self._reader is not None:
            self._reader.cancel()

    def _sends(self) -> None:
        self._sent += 1
        self._metrics.message_sent(self._method)

    def _done(self, _: Any) -> None:
        self.gone = True
        self._leave()
        self._calls.over(self)  # first: whatever happens to what is told of it, it must not stay
        code = self._code
        if code is None:
            late = time.monotonic() >= self._late_at
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        took_s = time.monotonic() - self._started
        log.info("%s job=%s code=%s ms=%.0f", self._method.name, self._job_id or "-", code.name, took_s * 1000)
        self._metrics.rpc_ended(self._method, code, took_s)
        self._calls.access.write(
            method=self._method.name,
            code=code.name,
            reason=None if self._error is None else reason(self._error),
            ms=round(took_s * 1000, 1),
            job=self._job_id,
            trace=self._trace,
            peer=self._peer,
            received=self._received,
            sent=self._sent,
            frames=self._frames,
            dropped=self._dropped,
        )


def as_domain_error(error: BaseException) -> GramophoneError:
    """What a caller hears of an exception that is none of the domain's; the log has the rest."""
    return OutOfHostMemory() if isinstance(error, Exception) and ran_out_of_memory(error) else EngineFailed()


class SendTimeout:
    """`with`: a message is on its way to a reader, who is dismissed if it leaves one untaken for too long.

    It looks ten times in the time that a reader has: a timer for each message was 5 % of what sending it costs.
    """

    def __init__(self, most_s: float, dismiss: Callable[[], None]) -> None:
        self._most_s, self._dismiss = most_s, dismiss
        self._since = math.inf  # on the monotonic clock
        self._closed = False
        self._next_look: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._since = time.monotonic()
        if self._next_look is None:
            self._look()

    def __exit__(self, *_: object) -> None:
        self._since = math.inf

    def close(self) -> None:
        """Nobody looks any more."""
        self._closed = True
        if self._next_look is not None:
            self._next_look.cancel()

    def _look(self) -> None:
        if time.monotonic() - self._since >= self._most_s:
            self._dismiss()
        elif not self._closed:
            self._next_look = asyncio.get_running_loop().call_later(self._most_s / 10, self._look)
