"""The updates of one job over all of its calls: the first, and those after a lost connection or a lost server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.errors import GramophoneError, ServerFailedError
from gramophone_client.streams.recovery import Recovery, ResendableJob
from gramophone_client.streams.recovery_states import is_connection_loss
from gramophone_client.transport.connection import Connection
from gramophone_client.transport.job_spec import watch_request
from gramophone_client.types.options import CheckpointOptions, FrameOptions
from gramophone_client.types.updates import Result, Update

__all__ = ["AsyncJobStream", "newest_responses"]

COALESCED = frozenset({"waiting", "progress", "frame", "checkpoint"})  # a slow reader gets only the newest of these


class AsyncJobStream:
    """Follows one job to its end, over lost connections, and over lost servers if it was sent from here; see
    `Recovery`.

    `prepare` makes the job that is sent. Without it the job `job_id` exists already, and `sequence` is that of the last
    event that the caller has.
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
        self._frames = frames
        self._checkpoints = checkpoints
        self._prepare = prepare
        self._recovery = Recovery(connection, timeout_s=timeout_s, grace_s=grace_s, job_id=job_id, sequence=sequence)

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
                            async for response in responses:
                                arrived = recovery.receive(response.event)
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
        recovery, service = self._recovery, self._connection.service
        recovery.start_call()
        request: pb.StylizeStreamRequest | pb.WatchJobRequest
        if sends and recovery.job is not None:
            request = pb.StylizeStreamRequest(spec=recovery.job.spec, request_id=recovery.job.request_id)
            method = service.StylizeStream
        else:
            request = watch_request(recovery.job_id, recovery.sequence, self._frames, self._checkpoints)
            method = service.WatchJob
        with self._connection.errors_rebuilt(recovery.timeout_s):
            return method(request, timeout=recovery.left_s)


async def newest_responses(call: Any) -> AsyncGenerator[Any, None]:
    """The responses of a call, read as soon as they arrive, however slowly the caller takes them: of each coalesced
    kind only the newest waits. Leaving the iteration cancels the call.

    Without this, a reader of one frame per second would see each frame late by all frames that the transport holds: 5 s
    with frames of 12 KB, of which 64 KiB are in flight before the server notices.
    """
    waiting: dict[object, Any] = {}  # by kind, oldest first
    has_news = asyncio.Event()

    async def read() -> None:
        async for response in call:
            kind: object = response.event.WhichOneof("event")
            if kind not in COALESCED:
                kind = object()
            elif (older := waiting.pop(kind, None)) is not None and kind == "frame":
                response.event.frame.dropped += older.event.frame.dropped + 1
            waiting[kind] = response
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
