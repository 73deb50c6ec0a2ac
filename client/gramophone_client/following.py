"""The updates of one job, from whatever calls they come: the first, and those after a lost connection or a lost server."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.connection import Connection
from gramophone_client.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    GramophoneError,
    ImageNotFound,
    JobNotFound,
    QueueFull,
    ServerFailed,
    ShuttingDown,
    SlowReader,
)
from gramophone_client.job_spec import CheckpointOptions, FrameOptions, UploadedImage, resumed_spec, watch_request
from gramophone_client.messages import update
from gramophone_client.updates import Accepted, Checkpoint, Frame, Result, Update
from gramophone_client.uploads import upload

__all__ = ["PATIENCE_S", "Following", "Submission", "is_lost"]

PATIENCE_S = 30.0  # without any server, before a lost job is given up
REATTACH_S = (0.2, 2.0)  # first pause before a lost job is asked for again, longest; each is twice the one before
COALESCED = frozenset(
    {"waiting", "progress", "frame", "checkpoint"}
)  # of these only the newest waits for a slow reader
MOST_MOVES = 3  # without a newer checkpoint: a job that takes its servers down must not go round


def is_lost(error: GramophoneError) -> bool:
    """Whether only the connection has ended, as far as one can tell: the service itself would have given a reason."""
    lost = error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL) and not error.reason
    return lost or isinstance(error, SlowReader)


@dataclass
class Submission:
    """A job that can be sent again."""

    spec: pb.JobSpec
    request_id: str
    images: Sequence[UploadedImage]  # that the spec only names
    patience_s: float  # for which a server is looked for after a loss; 0: the job is not sent again


@dataclass
class _Loss:
    """The job's updates have stopped, and it did not end."""

    error: GramophoneError
    since: float  # of time.monotonic
    gone: bool  # the job is not where it was, so there is nothing to come back to
    pause_s: float = field(default_factory=lambda: REATTACH_S[0])


class Following:
    """Follows one job to its end, over lost connections, and if it was sent from here, over lost servers.

    `prepare` makes what is sent; without, the job `job_id` is there already, and `sequence` is that of the last event
    that the caller has. For `grace_s` after a loss the job is looked for where it was; then it is sent again.
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
        prepare: Callable[[], Awaitable[Submission]] | None = None,
    ) -> None:
        self._connection = connection
        self._frames = frames
        self._checkpoints = checkpoints
        self._timeout_s = timeout_s
        self._end = 0.0  # of time.monotonic
        self._grace_s = grace_s
        self._job_id = job_id
        self._sequence = sequence
        self._prepare = prepare
        self._submission: Submission | None = None
        self._renewed = False  # the images of this request were uploaded again
        self._moving = False  # the job was sent again and not accepted yet
        self._moves = 0  # since there was a newer checkpoint
        self._seed = 0
        self._frame: Frame | None = None
        self._checkpoint: Checkpoint | None = None
        self._result: Result | None = None
        self._loss: _Loss | None = None

    async def updates(self) -> AsyncGenerator[Update, None]:
        """All of them. An error carries the newest `frame` and `checkpoint`."""
        call: Any = None
        try:
            if self._prepare is not None:
                self._submission = await self._prepare()
            self._end = time.monotonic() + self._timeout_s
            call = self._watch() if self._submission is None else self._submit(self._submission)
            while True:
                told = self._sequence
                try:
                    async with aclosing(_newest(call)) as responses:
                        with self._connection.errors_rebuilt(self._timeout_s):
                            async for response in responses:
                                self._loss = None
                                if 0 < response.event.sequence <= told:
                                    continue  # the caller has it already
                                arrived = update(response.event)
                                self._keep(arrived)
                                # The result is told when the stream has ended: nobody then cancels a job that is done.
                                if arrived is not None and not isinstance(arrived, Result):
                                    yield arrived
                                self._sequence = max(self._sequence, response.event.sequence)
                    break
                except GramophoneError as error:
                    if self._result is not None and is_lost(error):
                        break
                    call.cancel()
                    call = await self._call_after(error)
            if self._result is None:
                raise ServerFailed("the server ended the stream without a result")
        except GramophoneError as error:
            error.frame, error.checkpoint = self._frame, self._checkpoint
            raise
        finally:
            if call is not None:
                call.cancel()
        yield self._result

    def _keep(self, arrived: Update | None) -> None:
        match arrived:
            case Accepted():
                self._job_id, self._seed, self._moving = arrived.job_id, arrived.seed, False
            case Frame():
                self._frame = arrived
            case Checkpoint():
                if self._checkpoint is None or arrived.iteration > self._checkpoint.iteration:
                    self._moves = 0
                self._checkpoint = arrived
            case Result():
                self._result = arrived

    async def _call_after(self, error: GramophoneError) -> Any:
        """The next call, after a pause. Raises `error`, or the loss that it follows, if there shall be none."""
        job = self._submission
        if isinstance(error, ImageNotFound) and job is not None and job.images and not self._renewed:
            self._renewed = True
            try:
                for image in job.images:
                    await upload(self._connection, image.data, self._left_s())
                return self._submit(job)
            except GramophoneError as failed:
                error = failed
        if self._loss is None:
            if not self._job_id or not (is_lost(error) or isinstance(error, ShuttingDown)):
                raise error
            self._loss = _Loss(error, time.monotonic(), gone=isinstance(error, ShuttingDown))
        elif isinstance(error, DeadlineExceeded):  # the call's time ended during the search
            raise self._loss.error from error
        elif isinstance(error, JobNotFound) and self._movable():
            self._loss.gone = True
        elif not (is_lost(error) or isinstance(error, ConnectionFailed | QueueFull)):
            raise error
        loss = self._loss
        lost_s = time.monotonic() - loss.since
        search_s = 0.0 if loss.gone else self._grace_s - lost_s
        patience_s = job.patience_s - lost_s if job is not None and self._movable() else 0.0
        left_s = min(max(search_s, patience_s), self._left_s())
        if left_s <= 0:
            if error is loss.error:
                raise error
            raise loss.error from error
        await asyncio.sleep(min(max(loss.pause_s, error.retry_after_s or 0.0), left_s))
        loss.pause_s = min(2 * loss.pause_s, REATTACH_S[1])
        if search_s > 0 or job is None:
            return self._watch()
        if not self._moving:
            job.spec = resumed_spec(job.spec, self._seed, self._checkpoint)
            job.request_id = str(uuid.uuid4())
            self._moving, self._moves, self._renewed, self._sequence = True, self._moves + 1, False, 0
        return self._submit(job)

    def _movable(self) -> bool:
        """Whether the job, lost as it is, may be sent again."""
        job, loss = self._submission, self._loss
        if job is None or job.patience_s <= 0 or (loss is not None and isinstance(loss.error, SlowReader)):
            return False
        return self._moving or self._moves < MOST_MOVES

    def _submit(self, job: Submission) -> Any:
        request = pb.StylizeStreamRequest(spec=job.spec, request_id=job.request_id)
        with self._connection.errors_rebuilt(self._timeout_s):
            return self._connection.service.StylizeStream(request, timeout=self._left_s())

    def _watch(self) -> Any:
        request = watch_request(self._job_id, self._sequence, self._frames, self._checkpoints)
        with self._connection.errors_rebuilt(self._timeout_s):
            return self._connection.service.WatchJob(request, timeout=self._left_s())

    def _left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())


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
