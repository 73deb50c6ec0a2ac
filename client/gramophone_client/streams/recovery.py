"""What is done for a job that has lost its connection or its server: come back to it, send it again, or give it up."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    GramophoneError,
    ImageNotFound,
    JobControlled,
    JobNotFound,
    NotReady,
    QueueFull,
    ShuttingDown,
    SlowReader,
)
from gramophone_client.transport.connection import Connection
from gramophone_client.transport.job_spec import resumed_spec
from gramophone_client.transport.parsing import update
from gramophone_client.transport.uploads import upload
from gramophone_client.types.options import UploadedImage
from gramophone_client.types.updates import Accepted, Checkpoint, Frame, Result, Update

__all__ = ["PATIENCE_S", "Recovery", "ResendableJob", "is_lost"]

PATIENCE_S = 30.0  # without any server, before a lost job is given up
REATTACH_S = (0.2, 2.0)  # first pause before a lost job is asked for again, longest; each is twice the one before
MOST_MOVES = 3  # without a newer checkpoint: a job that takes its servers down must not go round


def is_lost(error: GramophoneError) -> bool:
    """Whether only the connection has ended, as far as one can tell: the service itself would have given a reason."""
    lost = error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL) and not error.reason
    return lost or isinstance(error, SlowReader)


@dataclass
class ResendableJob:
    """A job that can be sent again."""

    spec: pb.JobSpec
    request_id: str
    images: Sequence[UploadedImage]  # that the spec only names
    patience_s: float  # for which a server is looked for after a loss; 0: the job is not sent again


@dataclass
class ConnectionLoss:
    """The job's updates have stopped, and it did not end."""

    error: GramophoneError
    since: float  # of time.monotonic
    gone: bool  # the job is not where it was, so there is nothing to come back to
    pause_s: float = field(default_factory=lambda: REATTACH_S[0])


class Recovery:
    """One job, as far as it is known here, and what to ask for after an error.

    Without a submission the job `job_id` is there already, and `sequence` is that of the last event that the caller has.
    For `grace_s` after a loss the job is looked for where it was; then, if it was sent from here, it is sent again.

    A job that no server has accepted yet is sent again, too, as the same request: when the server takes no jobs now, or is
    lost. Where there was no connection to lose, nobody is there, and that is told at once.
    """

    def __init__(
        self, connection: Connection, *, timeout_s: float, grace_s: float, job_id: str = "", sequence: int = 0
    ) -> None:
        self.timeout_s = timeout_s
        self.job_id = job_id
        self.sequence = sequence  # of the newest event
        self.submission: ResendableJob | None = None
        self.frame: Frame | None = None
        self.checkpoint: Checkpoint | None = None
        self.result: Result | None = None
        self._connection = connection
        self._grace_s = grace_s
        self._end = 0.0  # of time.monotonic
        self._told = 0  # of the newest event before the present call
        self._connected = False  # as the present call began
        self._renewed = False  # the images of this request were uploaded again
        self._moving = False  # the job was sent again and not accepted yet
        self._moves = 0  # since there was a newer checkpoint
        self._seed = 0
        self._loss: ConnectionLoss | None = None

    def begin(self, submission: ResendableJob | None) -> None:
        """The job's time begins."""
        self.submission = submission
        self._end = time.monotonic() + self.timeout_s

    @property
    def left_s(self) -> float:
        """Seconds of it that are left."""
        return max(0.0, self._end - time.monotonic())

    def start_call(self) -> None:
        """Events up to the newest of the calls before are known; within one call they are as it tells them."""
        self._told = self.sequence
        self._connected = self._connection.is_connected

    def take(self, event: pb.JobEvent) -> Update | None:
        """The update that an event is. None if the caller has it already, or if this client does not know its kind."""
        self._loss = None
        if 0 < event.sequence <= self._told:
            return None
        self.sequence = max(self.sequence, event.sequence)
        arrived = update(event)
        match arrived:
            case Accepted():
                self.job_id, self._seed, self._moving = arrived.job_id, arrived.seed, False
            case Frame():
                self.frame = arrived
            case Checkpoint():
                if self.checkpoint is None or arrived.iteration > self.checkpoint.iteration:
                    self._moves = 0
                self.checkpoint = arrived
            case Result():
                self.result = arrived
        return arrived

    def with_partial_result(self, error: GramophoneError) -> GramophoneError:
        """The error, with the newest frame and checkpoint."""
        error.frame, error.checkpoint = self.frame, self.checkpoint
        return error

    async def next_attempt(self, error: GramophoneError) -> bool:
        """Returns when it is time for the next call, and whether that sends the submission or asks for the job where it was.
        Raises `error`, or the loss that it follows, if there shall be none."""
        job = self.submission
        if isinstance(error, ImageNotFound) and job is not None and job.images and not self._renewed:
            self._renewed = True
            try:
                for image in job.images:
                    await upload(self._connection, image.data, self.left_s)
                return True
            except GramophoneError as failed:
                error = failed
        if not self.job_id and self._was_lost(error):
            self._moving = False  # the next sending counts: it may be the job that takes its servers down
        if self._loss is None:
            if not self._is_loss(error):
                raise error
            self._loss = ConnectionLoss(
                error, time.monotonic(), gone=not self.job_id or isinstance(error, ShuttingDown)
            )
        elif isinstance(error, DeadlineExceeded):  # the call's time ended during the search
            raise self._loss.error from error
        elif isinstance(error, JobNotFound) and self._movable():
            self._loss.gone = True
        elif not (is_lost(error) or isinstance(error, ConnectionFailed | QueueFull | JobControlled)):
            raise error
        loss = self._loss
        lost_s = time.monotonic() - loss.since
        search_s = 0.0 if loss.gone else self._grace_s - lost_s
        # A job that is controlled is there, if only by a lost connection that the server takes for a live one.
        there = isinstance(error, JobControlled)
        patience_s = job.patience_s - lost_s if job is not None and self._movable() and not there else 0.0
        left_s = min(max(search_s, patience_s), self.left_s)
        if left_s <= 0:
            if error is loss.error:
                raise error
            raise loss.error from error
        await asyncio.sleep(min(max(loss.pause_s, error.retry_after_s or 0.0), left_s))
        loss.pause_s = min(2 * loss.pause_s, REATTACH_S[1])
        if search_s > 0 or job is None:
            return False
        if not self._moving:
            if self.job_id:
                job.spec, job.request_id = resumed_spec(job.spec, self._seed, self.checkpoint), str(uuid.uuid4())
            self._moving, self._moves, self._renewed, self.sequence = True, self._moves + 1, False, 0
        await self._connection.wait_until_connected()
        return True

    def _is_loss(self, error: GramophoneError) -> bool:
        """Whether a job has lost its server, or one that was not accepted the server that it was sent to."""
        if self.job_id:
            return is_lost(error) or isinstance(error, ShuttingDown)
        return isinstance(error, ShuttingDown | NotReady) or self._was_lost(error)

    def _was_lost(self, error: GramophoneError) -> bool:
        """Whether there was a connection that the call could lose; where there was none, no server is there."""
        return self._connected and is_lost(error)

    def _movable(self) -> bool:
        """Whether the job, lost as it is, may be sent again."""
        job, loss = self.submission, self._loss
        if job is None or job.patience_s <= 0 or (loss is not None and isinstance(loss.error, SlowReader)):
            return False
        return self._moving or self._moves < MOST_MOVES
