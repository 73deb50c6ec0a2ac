"""The updates of one job, from whatever calls they come: the first, and those after a lost connection or a lost server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.errors import GramophoneError, ServerFailed
from gramophone_client.streams.recovery import Recovery, ResendableJob, is_lost
from gramophone_client.transport.connection import Connection
from gramophone_client.transport.job_spec import watch_request
from gramophone_client.types.options import CheckpointOptions, FrameOptions
from gramophone_client.types.updates import Result, Update

__all__ = ["JobStream"]

COALESCED = frozenset(
    {"waiting", "progress", "frame", "checkpoint"}
)  # of these only the newest waits for a slow reader


class JobStream:
    """Follows one job to its end, over lost connections, and if it was sent from here, over lost servers; see `Recovery`.

    `prepare` makes what is sent; without, the job `job_id` is there already, and `sequence` is that of the last event
    that the caller has.
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
        self._job = Recovery(connection, timeout_s=timeout_s, grace_s=grace_s, job_id=job_id, sequence=sequence)

    async def updates(self) -> AsyncGenerator[Update, None]:
        """All of them. An error carries the newest `frame` and `checkpoint`."""
        job = self._job
        call: Any = None
        try:
            job.begin(None if self._prepare is None else await self._prepare())
            call = self._called(job.submission is not None)
            while True:
                try:
                    async with aclosing(_newest(call)) as responses:
                        with self._connection.errors_rebuilt(job.timeout_s):
                            async for response in responses:
                                arrived = job.take(response.event)
                                # The result is told when the stream has ended: nobody then cancels a job that is done.
                                if arrived is not None and not isinstance(arrived, Result):
                                    yield arrived
                    break
                except GramophoneError as error:
                    if job.result is not None and is_lost(error):
                        break
                    call.cancel()
                    call = self._called(await job.next_attempt(error))
            if job.result is None:
                raise ServerFailed("the server ended the stream without a result")
        except GramophoneError as error:
            job.with_partial_result(error)
            raise
        finally:
            if call is not None:
                call.cancel()
        yield job.result

    def _called(self, sends: bool) -> Any:
        """A call that sends the job, or one that asks for it where it was."""
        job, service = self._job, self._connection.service
        job.start_call()
        request: pb.StylizeStreamRequest | pb.WatchJobRequest
        if sends and job.submission is not None:
            request = pb.StylizeStreamRequest(spec=job.submission.spec, request_id=job.submission.request_id)
            method = service.StylizeStream
        else:
            request = watch_request(job.job_id, job.sequence, self._frames, self._checkpoints)
            method = service.WatchJob
        with self._connection.errors_rebuilt(job.timeout_s):
            return method(request, timeout=job.left_s)


async def _newest(call: Any) -> AsyncGenerator[Any, None]:
    """The responses of a call, which are taken from it as they come, however slowly they are taken from here. Leaving
    cancels it.

    A reader of one frame a second would otherwise see them late by as many as the transport holds: 5 s with frames of 12 KB,
    of which 64 KiB are on their way before the server notices.
    """
    untaken: dict[object, Any] = {}  # oldest first
    news = asyncio.Event()

    async def read() -> None:
        async for response in call:
            kind: object = response.event.WhichOneof("event")
            if kind not in COALESCED:
                kind = object()
            elif (older := untaken.pop(kind, None)) is not None and kind == "frame":
                response.event.frame.dropped += older.event.frame.dropped + 1
            untaken[kind] = response
            news.set()

    def over(reader: asyncio.Task[None]) -> None:
        news.set()
        if not reader.cancelled():
            reader.exception()  # who has left does not ask for it, and asyncio would complain

    reader = asyncio.create_task(read())
    reader.add_done_callback(over)
    try:
        while untaken or not reader.done():
            if untaken:
                yield untaken.pop(next(iter(untaken)))
            else:
                news.clear()
                await news.wait()
        await reader
    finally:
        call.cancel()  # and the reader with it
