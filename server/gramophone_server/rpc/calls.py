"""The active RPCs: each from its start to its end, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from gramophone_server.config import Limits
from gramophone_server.domain.job import ran_out_of_memory
from gramophone_server.errors import (
    EngineFailed,
    GramophoneError,
    OutOfHostMemory,
    ServerBusy,
    SlowReader,
)
from gramophone_server.images.shortages import MEMORY, shortage_behind
from gramophone_server.jobs.job import Job
from gramophone_server.jobs.mailbox import Mailbox
from gramophone_server.rpc.byte_budget import Share
from gramophone_server.rpc.call_places import CallPlaces
from gramophone_server.rpc.connections import close_connections
from gramophone_server.rpc.incoming import Incoming
from gramophone_server.rpc.outgoing import Outgoing
from gramophone_server.rpc.receiving import Context, Receiver
from gramophone_server.rpc.send_timeout import READING_S, SendTimeout
from gramophone_server.rpc.send_turns import SendTurns
from gramophone_server.rpc.status import abort_status, reason
from gramophone_server.rpc.timeouts import Timeouts
from gramophone_server.telemetry.access_log import AccessLog, trace_id
from gramophone_server.telemetry.metrics import METHODS, Metrics

__all__ = ["ActiveCalls", "Context", "RpcCall", "as_domain_error"]

log = logging.getLogger(__name__)

# The server sees a deadline too late: gRPC sends it with at most three significant digits, rounded up (measured: one of
# 1.5 s arrived 10 ms too long, one of 12.31 s 100 ms), and the request has been in transit. A client that leaves less
# than this share of its deadline, plus the time in transit, before the deadline that the server sees has run out of
# time.
DEADLINE_ROUNDING = 0.01
TRANSIT_S = 0.02
# Before a retry, if the server lacks file descriptors or room: it has them again when other calls have ended.
SHORTAGE_RETRY_S = 2.0


class ActiveCalls:
    """The active RPCs of one server."""

    def __init__(self, metrics: Metrics, access_log: AccessLog, limits: Limits, receiver: Receiver) -> None:
        self.metrics, self.access_log, self.receiver = metrics, access_log, receiver
        self.max_blocked_s = limits.max_blocked_s
        self.places = CallPlaces.of_service(limits, self._make_place)
        self.turns = SendTurns()  # of the messages of all streams
        # Have ended, but gRPC still keeps a message that the client does not read, and so a place. Oldest first.
        self.unread: dict[RpcCall, None] = {}
        # Of these, those whose room others need: their clients have been told to read, and may do so for this time.
        self.last_chances: Timeouts[RpcCall] = Timeouts(READING_S, self.close_connection_of)
        self._to_close: set[RpcCall] = set()  # whose connections are closed in this turn of the event loop
        self._closed_for_place: RpcCall | None = None  # whose connection was closed last because of too many calls
        self._active: set[RpcCall] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __iter__(self) -> Iterator[RpcCall]:
        return iter(self._active)

    def __len__(self) -> int:
        return len(self._active)

    def rpc(self, method: str, context: Context) -> RpcCall:
        """Adds an RPC of this name. Called in the task of its handler, for `async with` around everything it does."""
        call = RpcCall(method, context, self)
        self._active.add(call)
        self._idle.clear()
        return call

    def remove(self, call: RpcCall) -> None:
        """Removes an RPC that has ended."""
        self._active.discard(call)
        if not self._active:
            self._idle.set()

    def _make_place(self) -> None:
        """Ends the connection of the client that has left a message unread for longest, as there are too many calls.
        Until this call has gone, nothing more: to find a connection among 1000 takes some ms of the event loop."""
        if self.unread and (oldest := next(iter(self.unread))) is not self._closed_for_place:
            self._closed_for_place = oldest
            self.close_connection_of(oldest)

    def forget_unread(self, call: RpcCall) -> None:
        """The client has read everything, or has gone."""
        self.unread.pop(call, None)
        self.last_chances.stop(call)
        if call is self._closed_for_place:
            self._closed_for_place = None

    def close_connection_of(self, call: RpcCall) -> None:
        """Ends the connection of a client that was dropped as a slow reader, if it still reads neither the message nor
        the status. All connections of one turn of the event loop are found at once: one by one, those of 500 such
        clients, dropped together, stopped the loop for 1.7 s."""
        if not self._to_close:
            asyncio.get_running_loop().call_soon(self._close_connections)
        self._to_close.add(call)

    def _close_connections(self) -> None:
        closed = close_connections({call.connection for call in self._to_close if call in self.unread})
        self._to_close.clear()
        for connection in closed:
            log.warning("%s reads nothing, and others need the room: its connection was closed", connection)
        if self._closed_for_place is not None and self._closed_for_place.connection not in closed:
            self._closed_for_place = None  # to be tried again: the process may have had no descriptor left

    async def idle(self) -> None:
        """Returns when no RPC is active."""
        await self._idle.wait()


class RpcCall:
    """State of one RPC: connection, attached job, and the counters for its access-log line.

    The body of `async with` is the handler. If it returns, the RPC succeeds; if it raises, the RPC ends with the status
    of the error.
    """

    def __init__(self, method: str, context: Context, calls: ActiveCalls) -> None:
        self.disconnected = False
        self._method = METHODS[method]
        self._context = context
        self._calls = calls
        self._metrics = calls.metrics
        self._job_id: str | None = None
        self._attached: tuple[Job, Mailbox] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._send_timeout = SendTimeout(calls.max_blocked_s, self._time_out)
        self._outgoing: Outgoing | None = None  # the message that is being sent
        self._code: grpc.StatusCode | None = None
        self._error: GramophoneError | None = None
        self._aborted: Exception | None = None  # gRPC's, which ends the handler
        # Messages received and sent, frames in the latter, and frames that were dropped before them.
        self.received_messages = self.sent_messages = self.frames = self.dropped_frames = 0
        self._late_status: asyncio.Task[None] | None = None
        self._started_at = time.monotonic()
        # gRPC computes the remaining time from the wall clock, so it is read before anything can set that clock.
        left_s = context.time_remaining()
        # When the client stops waiting, in seconds of the monotonic clock.
        self.deadline_at = None if left_s is None else self._started_at + left_s
        self._late_at = math.inf if left_s is None else self._started_at + left_s * (1 - DEADLINE_ROUNDING) - TRANSIT_S
        # Read now: after the RPC, gRPC's context has lost its call, and reading these crashes the process (1.85.1).
        headers = context.invocation_metadata() or ()
        self._trace, self.connection = trace_id(headers), context.peer()
        self.incoming = Incoming(
            calls.receiver, calls.places, method, context, headers, self.connection, self._count_received
        )
        task = asyncio.current_task()
        assert task is not None, "a handler runs in a task"
        self._task = task
        # The only notice of the end that always arrives: if a client leaves while a message is being written, the
        # handler gets no CancelledError, and `context.cancelled()` stays false.
        context.add_done_callback(self._on_done)  # type: ignore[arg-type]  # the stub asks for a class of its own
        self._metrics.rpc_started(self._method)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Marks success, or ends the RPC with the status of the error."""
        if error is None:
            self._succeed()
        elif isinstance(error, GeneratorExit | KeyboardInterrupt | SystemExit):
            return  # passes on
        elif isinstance(error, asyncio.CancelledError) and self._task.cancelling():
            return  # gRPC cancelled this handler; swallowing that leaks the call's operations
        else:
            await self._fail(error)

    def sending(self, message: Outgoing) -> Sending:
        """For `async with`: waits for the message's turn and counts it. The handler yields it to gRPC in this block,
        and comes back when gRPC has taken it. A client that does not read is dropped, as `SlowReader`: if one message
        takes longer than `max_blocked_s`, if it lags by as much, or if it keeps bytes that others wait for."""
        return Sending(self, message)

    def replying(self, message: Message) -> Sending:
        """`sending`, for the one response of a call."""
        return Sending(self, Outgoing(message.SerializeToString()))

    async def begin_sending(self, message: Outgoing) -> None:
        """See `sending`."""
        self._outgoing = message
        if not self.sent_messages:
            # Otherwise gRPC sends these with the message. If that is not read, it cannot send a status either.
            await self._context.send_initial_metadata(())
        await self._calls.turns.wait(len(message.data))
        self.sent_messages += 1
        self._metrics.message_sent(self._method)
        if message.dropped is not None:
            self.frames += 1
            self.dropped_frames += message.dropped
            self._metrics.frame_sent(message.dropped)
        for share in (message.share, self.incoming.commands):
            if share is not None:
                share.replaceable(self._make_room)
        self._send_timeout.begin(len(message.data))

    def end_sending(self) -> None:
        """See `sending`."""
        self._send_timeout.end()
        if self.incoming.commands is not None and self._late_status is None:
            self.incoming.commands.keep()
        self._close_outgoing()

    def set_job(self, job: Job) -> None:
        """Sets the job that this RPC is about, for the logs."""
        self._job_id = job.id

    def attach(self, job: Job, mailbox: Mailbox) -> None:
        """Makes this RPC the owner of a watcher, which leaves the job when the RPC ends."""
        self.set_job(job)
        mailbox.reader_clock, self._send_timeout.lag_s = self._send_timeout.blocked_s, mailbox.lag_s
        if self.disconnected:
            job.leave(mailbox)
        else:
            self._attached = job, mailbox

    def set_reader(self, reader: asyncio.Task[None]) -> None:
        """Sets the task that reads the client's messages. It is cancelled when the RPC ends."""
        self._reader = reader
        if self.disconnected:
            reader.cancel()

    def _succeed(self) -> None:
        self._code = grpc.StatusCode.OK

    async def _fail(self, error: BaseException) -> None:
        """Ends the RPC with the status of `error`, by raising gRPC's own exception."""
        if not isinstance(error, GramophoneError):
            # Also a CancelledError from an awaited call: without a status the client would hang until its deadline.
            log.error("%s job=%s failed", self._method.name, self._job_id or "-", exc_info=error)
            error = as_domain_error(error)
        error.__traceback__ = None  # the job keeps its error, which must not keep this handler alive
        await self._abort(error)

    async def _abort(self, error: GramophoneError) -> None:
        code, message, trailers = abort_status(error)
        self._code, self._error = code, error
        try:
            await self._context.abort(code, message, trailing_metadata=trailers)
        except Exception as aborted:
            self._aborted = aborted
            raise

    def _time_out(self) -> None:
        """The client has not read for `max_blocked_s`."""
        self._drop_slow_reader(self._calls.max_blocked_s)
        for share in self._kept_shares():
            share.replaceable(self._close_connection)

    def _make_room(self) -> None:
        """Others wait for what a client keeps that has not read a message for `READING_S`."""
        self._drop_slow_reader(READING_S)
        self._calls.last_chances.start(self)

    def _close_connection(self) -> None:
        self._calls.close_connection_of(self)

    def _drop_slow_reader(self, blocked_s: float) -> None:
        """The handler is blocked in gRPC's write and cannot raise, and cancelling it would send no status. So cancel it
        and send the status from another task; the client sees it after the messages still in flight."""
        if self.disconnected or self._late_status is not None:
            return
        for share in self._kept_shares():
            share.was_slow()
        self._detach()
        error = SlowReader(blocked_s)
        self._code, self._error = grpc.StatusCode.ABORTED, error
        self._task.cancel()
        self._calls.unread[self] = None
        if self._outgoing is not None:
            self._outgoing.abandon()
        self._late_status = asyncio.create_task(self._send_status(error))

    async def _send_status(self, error: GramophoneError) -> None:
        """Waits until the client has read the message and the status, or has gone: until then gRPC keeps the message,
        and this call its bytes."""
        try:
            with contextlib.suppress(Exception):  # `abort` always raises
                await self._abort(error)
        finally:
            self._calls.forget_unread(self)
            self._late_status = None
            self._close_outgoing()
            self.incoming.give_back_place()

    def _kept_shares(self) -> Iterator[Share]:
        """What it keeps while the client does not read: the bytes of the message, and the place of a controller."""
        message = None if self._outgoing is None else self._outgoing.share
        return (share for share in (message, self.incoming.commands) if share is not None)

    def _close_outgoing(self) -> None:
        """Gives back what the message holds, unless gRPC still keeps it for a slow reader."""
        if self._outgoing is not None and self._late_status is None:
            self._outgoing.close()
            self._outgoing = None

    def _detach(self) -> None:
        self._send_timeout.close()
        if self._attached is not None:
            job, mailbox = self._attached
            job.leave(mailbox)
        if self._reader is not None:
            self._reader.cancel()

    def _count_received(self) -> None:
        self.received_messages += 1
        self._metrics.message_received(self._method)

    def _on_done(self, _: Any) -> None:
        self.disconnected = True
        self._detach()
        self._close_outgoing()
        self.incoming.close()
        if self._late_status is None:
            self.incoming.give_back_place()
        # gRPC keeps the contexts of the first and the last call, and their exceptions.
        self._attached = self._reader = None
        self._send_timeout.lag_s = float  # 0.0, not that of the mailbox
        if self._aborted is not None:
            self._aborted.__traceback__ = self._aborted.__context__ = None
        self._calls.remove(self)  # first: the call must not stay if logging fails
        code = self._code
        if code is None:
            late = time.monotonic() >= self._late_at
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        took_s = time.monotonic() - self._started_at
        log.info("%s job=%s code=%s ms=%.0f", self._method.name, self._job_id or "-", code.name, took_s * 1000)
        self._metrics.rpc_ended(self._method, code, took_s)
        self._calls.access_log.write(
            method=self._method.name,
            code=code.name,
            reason=None if self._error is None else reason(self._error),
            ms=round(took_s * 1000, 1),
            job=self._job_id,
            trace=self._trace,
            peer=self.connection,
            received=self.received_messages,
            sent=self.sent_messages,
            frames=self.frames,
            dropped=self.dropped_frames,
        )


class Sending:
    """The block in which a handler sends one message; see `RpcCall.sending`."""

    def __init__(self, call: RpcCall, message: Outgoing) -> None:
        self._call, self._message = call, message

    async def __aenter__(self) -> Outgoing:
        await self._call.begin_sending(self._message)
        return self._message

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._message.share is not None:
            self._message.share.was_prompt()
        self._call.end_sending()


def as_domain_error(error: BaseException) -> GramophoneError:
    """The domain error that a client gets for any other exception; the log has the details."""
    if not isinstance(error, Exception):
        return EngineFailed()
    lacking = MEMORY if ran_out_of_memory(error) else shortage_behind(error)
    if lacking is None:
        return EngineFailed()
    return OutOfHostMemory() if lacking == MEMORY else ServerBusy(lacking, SHORTAGE_RETRY_S)
