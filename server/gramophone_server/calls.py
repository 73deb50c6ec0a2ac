"""One RPC from its start to its end, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import grpc

from gramophone_server.errors import EngineFailed, GramophoneError, SlowReader
from gramophone_server.jobs import Job
from gramophone_server.mailbox import Mailbox
from gramophone_server.status import refusal

__all__ = ["Call", "Context"]

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Call:
    """Whether the client of an RPC is still there, the job that it watches, and its line in the log."""

    def __init__(self, method: str, context: Context, over: Callable[[Call], None], max_blocked_s: float) -> None:
        self.gone = False
        self._method = method
        self._context = context
        self._over = over
        self._max_blocked_s = max_blocked_s
        self._watched: tuple[Job, Mailbox] | None = None
        self._reader: asyncio.Task[None] | None = None
        self.writing = Writing(max_blocked_s, self._dismiss)  # around a message on its way
        self._code: grpc.StatusCode | None = None
        self._dismissal: asyncio.Task[None] | None = None
        self._started = time.monotonic()
        task = asyncio.current_task()
        assert task is not None, "a handler runs in a task"
        self._task = task
        # The only notice of an end that always comes: a client that leaves while a message is being written makes no
        # CancelledError in the handler, and `context.cancelled()` stays false.
        context.add_done_callback(self._done)  # type: ignore[arg-type]  # the stub asks for a class of its own

    def watches(self, job: Job, mailbox: Mailbox) -> None:
        """The end of this RPC is a watcher leaving the job."""
        self._watched = job, mailbox
        if self.gone:
            job.leave(mailbox)

    @property
    def deadline_at(self) -> float | None:
        """When its client stops to wait, in seconds of the monotonic clock."""
        left_s = self._context.time_remaining()
        return None if left_s is None else time.monotonic() + left_s

    def reads(self, reader: asyncio.Task[None]) -> None:
        """`reader` takes the client's messages; the end of this RPC is its end, too."""
        self._reader = reader
        if self.gone:
            reader.cancel()

    def succeeded(self) -> None:
        """The handler has nothing more to say."""
        self._code = grpc.StatusCode.OK

    async def fail(self, error: BaseException) -> NoReturn:
        """Ends the RPC with the status of `error`. The one way out for every exception of a handler."""
        if isinstance(error, GeneratorExit | KeyboardInterrupt | SystemExit):
            raise error
        if isinstance(error, asyncio.CancelledError) and self._task.cancelling():
            raise error  # gRPC cancelled this handler; swallowing that leaks the call's operations
        if not isinstance(error, GramophoneError):
            # A CancelledError from something awaited, too: without a status the client would hang until its deadline.
            log.error("%s job=%s failed", self._method, self._job_id, exc_info=error)
            error = EngineFailed()
        error.__traceback__ = None  # the job keeps its error, and must not keep this handler with it
        await self._abort(error)

    async def _abort(self, error: GramophoneError) -> NoReturn:
        code, message, trailers = refusal(error)
        self._code = code
        await self._context.abort(code, message, trailing_metadata=trailers)

    def _dismiss(self) -> None:
        """The handler stands in gRPC's write and cannot raise, and a handler that is only cancelled sends no status; so
        it is cancelled, and the status sent beside it. It reaches the client behind what it has not read yet."""
        if self.gone:
            return
        self._leave()
        self._code = grpc.StatusCode.ABORTED
        self._task.cancel()
        self._dismissal = asyncio.create_task(self._send(SlowReader(self._max_blocked_s)))

    async def _send(self, error: GramophoneError) -> None:
        with contextlib.suppress(Exception):  # `abort` always raises
            await self._abort(error)

    def _leave(self) -> None:
        self.writing.close()
        if self._watched is not None:
            job, mailbox = self._watched
            job.leave(mailbox)
        if self._reader is not None:
            self._reader.cancel()

    @property
    def _job_id(self) -> str:
        return self._watched[0].id if self._watched is not None else "-"

    def _done(self, _: Any) -> None:
        self.gone = True
        self._leave()
        code = self._code
        if code is None:
            remaining = self._context.time_remaining()
            late = remaining is not None and remaining <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        took_ms = (time.monotonic() - self._started) * 1000
        log.info("%s job=%s code=%s ms=%.0f", self._method, self._job_id, code.name, took_ms)
        self._over(self)


class Writing:
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
