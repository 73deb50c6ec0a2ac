"""The updates of one job over all of its calls: the first, and those after a lost connection or a lost server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.deprecations import warn_of_old_name
from gramophone_client.errors import CallCancelledError, ClientUsageError, GramophoneError, ServerFailedError
from gramophone_client.streams.recovery import Recovery, ResendableJob
from gramophone_client.streams.recovery_states import is_connection_loss
from gramophone_client.transport.connection import Connection
from gramophone_client.transport.job_spec import watch_request
from gramophone_client.types.options import CheckpointOptions, FrameOptions
from gramophone_client.types.updates import Accepted, Result, Update, UploadProgress

__all__ = ["AsyncJobStream", "newest_responses"]

COALESCED = frozenset({"waiting", "progress", "frame", "checkpoint"})  # a slow reader gets only the newest of these


class AsyncJobStream:
    """The updates of a job, from `AsyncGramophoneClient.stream` or `watch`.

    It is an asynchronous context manager and an asynchronous iterator:

    async with client.stream("photo.jpg", "painting.jpg") as updates:
        async for update in updates:
            ...

    Entering the context sends the job, and raises the error if the server refuses it; leaving it leaves the job.
    Without a context the first step of the iteration sends the job, and it is left when Python drops the stream.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        frames: FrameOptions | None,
        checkpoints: CheckpointOptions | None,
        timeout_s: float,
        grace_s: float,
        job_id: str = "",
        sequence: int = 0,
        prepare: Callable[[], Awaitable[ResendableJob]] | None = None,
    ) -> None:
        self._connection = connection
        self._recovery = Recovery(connection, timeout_s=timeout_s, grace_s=grace_s, job_id=job_id, sequence=sequence)
        # The generator does not hold this object: a cycle would keep a dropped stream until the next collection.
        self._updates = _Follower(connection, self._recovery, frames, checkpoints, prepare).updates()
        self._begins_with_accepted = sequence == 0
        self._reader: asyncio.Task[Any] | None = None  # waits for the next update
        self._one_reader = asyncio.Lock()
        self._first: Update | None = None  # read on entering, and not yet by the caller
        self._has_ended = self._is_closed = False
        self._error: Exception | None = None

    async def __aenter__(self) -> Self:
        # A job that is watched from its middle may have no update for a long time.
        if self._begins_with_accepted and self.accepted is None:
            self._first = await self._read()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Update:
        arrived = await self._read()
        if arrived is None:
            raise StopAsyncIteration
        return arrived

    @property
    def job_id(self) -> str | None:
        """The job's id; None until the job was accepted. A job that was lost and sent again has a new one."""
        return self._recovery.job_id or None

    @property
    def accepted(self) -> Accepted | None:
        """The newest `Accepted`, of which there is another one after the job was sent again; None before the first."""
        return self._recovery.accepted

    @property
    def upload_progress(self) -> UploadProgress | None:
        """How much of the job's large images and checkpoint has been uploaded; None unless that happens now."""
        return self._recovery.upload_progress

    @property
    def loss(self) -> GramophoneError | None:
        """What the job is recovered from now: the loss of its connection or server, or why no server takes it yet. None
        unless it is being recovered."""
        return self._recovery.loss

    async def close(self) -> None:
        """Leaves the job: it stops, or continues without this watcher for its `detach_grace`. A second call does
        nothing, nor does the first after the end of the job."""
        if self._connection.is_forked:  # the job is the parent's
            return
        self._connection.check_loop()
        self._is_closed = True
        if self._reader is not None:
            self._reader.cancel()
        async with self._one_reader:
            await self._updates.aclose()

    async def aclose(self) -> None:
        """Deprecated: `close`."""
        warn_of_old_name("aclose() is deprecated; write close(), or `async with` without contextlib.aclosing")
        await self.close()

    async def _read(self) -> Update | None:
        """The next update; None after the last. Raises the error that ended the stream each time."""
        if not self._has_ended:
            self._connection.check()
            async with self._one_reader:
                if not self._has_ended:
                    return await self._read_next()
        if self._error is not None:
            raise self._error
        return None

    async def _read_next(self) -> Update | None:
        if self._is_closed:
            raise ClientUsageError("the stream was closed before its end; make another one, or `watch` its job again")
        if self._first is not None:
            first, self._first = self._first, None
            return first
        task = self._reader = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        try:
            arrived = await anext(self._updates, None)
        except Exception as error:
            self._has_ended, self._error = True, error
            raise
        except asyncio.CancelledError:
            was_closed, self._is_closed = self._is_closed, True  # a generator that was cancelled has ended
            if was_closed and task.uncancel() <= cancellations:  # by `close` alone, as in `asyncio.timeout`
                raise CallCancelledError("the stream was closed while its next update was awaited") from None
            raise
        finally:
            self._reader = None
        self._has_ended = arrived is None
        return arrived


class _Follower:
    """Follows one job to its end, over lost connections, and over lost servers if it was sent from here; see
    `Recovery`. `prepare` makes the job that is sent; without it the job exists already."""

    def __init__(
        self,
        connection: Connection,
        recovery: Recovery,
        frames: FrameOptions | None,
        checkpoints: CheckpointOptions | None,
        prepare: Callable[[], Awaitable[ResendableJob]] | None,
    ) -> None:
        self._connection = connection
        self._recovery = recovery
        self._frames = frames
        self._checkpoints = checkpoints
        self._prepare = prepare

    async def updates(self) -> AsyncGenerator[Update, None]:
        """All updates of the job. An error carries the newest `frame` and `checkpoint`."""
        recovery = self._recovery
        call: Any = None
        try:
            recovery.start(None if self._prepare is None else await self._prepare())
            call = self._start_call(sends=recovery.job is not None)
            while True:
                try:
                    async with aclosing(newest_responses(call)) as responses:
                        with self._connection.errors_rebuilt(recovery.timeout_s):
                            async for response, at_s in responses:
                                arrived = recovery.receive(response.event, at_s)
                                # The result is yielded after the stream has ended: a caller that leaves at the result
                                # must not cancel a finished job.
                                if arrived is not None and not isinstance(arrived, Result):
                                    yield arrived
                    break
                except GramophoneError as error:
                    if recovery.result is not None and is_connection_loss(error):
                        break
                    call.cancel()
                    call = self._start_call(sends=await recovery.next_attempt(error))
            if recovery.result is None:
                raise ServerFailedError("the server ended the stream without a result")
        except GramophoneError as error:
            recovery.with_partial_result(error)
            raise
        finally:
            if call is not None:
                call.cancel()
        yield recovery.result

    def _start_call(self, *, sends: bool) -> Any:
        """A call that sends the job, or one that asks for it where it was."""
        recovery = self._recovery
        recovery.start_call()
        request: pb.StylizeStreamRequest | pb.WatchJobRequest
        if sends and recovery.job is not None:
            request = pb.StylizeStreamRequest(spec=recovery.job.spec, request_id=recovery.job.request_id)
            method = "StylizeStream"
        else:
            request = watch_request(recovery.job_id, recovery.sequence, self._frames, self._checkpoints)
            method = "WatchJob"
        with self._connection.errors_rebuilt(recovery.timeout_s):
            return self._connection.start(method, request, recovery.left_s)


async def newest_responses(call: Any) -> AsyncGenerator[tuple[Any, float], None]:
    """The responses of a call, and when each arrived, of time.monotonic. They are read as soon as they arrive, however
    slowly the caller takes them: of each coalesced kind only the newest waits. Leaving the iteration cancels the call.

    Without this, a reader of one frame per second would see each frame late by all frames that the transport holds: 5 s
    with frames of 12 KB, of which 64 KiB are in flight before the server notices.
    """
    waiting: dict[object, tuple[Any, float]] = {}  # by kind, oldest first
    has_news = asyncio.Event()

    async def read() -> None:
        async for response in call:
            kind: object = response.event.WhichOneof("event")
            if kind not in COALESCED:
                kind = object()
            elif (older := waiting.pop(kind, None)) is not None and kind == "frame":
                response.event.frame.dropped += older[0].event.frame.dropped + 1
            waiting[kind] = response, time.monotonic()
            has_news.set()

    def reader_done(reader: asyncio.Task[None]) -> None:
        has_news.set()
        if not reader.cancelled():
            reader.exception()  # marks it as retrieved; otherwise asyncio logs it if the caller has left

    reader = asyncio.create_task(read())
    reader.add_done_callback(reader_done)
    try:
        while waiting or not reader.done():
            if waiting:
                yield waiting.pop(next(iter(waiting)))
            else:
                has_news.clear()
                await has_news.wait()
        await reader
    finally:
        call.cancel()  # which ends the reader as well
