"""Recovers a job that has lost its connection or its server: attaches to it again, sends it again, or gives it up."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.errors import GramophoneError, ImageNotFoundError, SlowSenderError
from gramophone_client.streams.job_uploads import JobUploads
from gramophone_client.streams.recovery_states import (
    SETTLED_S,
    NextCall,
    RecoveryState,
    RecoveryStates,
    Retry,
    is_job_loss,
)
from gramophone_client.transport.attachments import Attachments, detach, named
from gramophone_client.transport.connection import Connection
from gramophone_client.transport.job_spec import resumed_spec
from gramophone_client.transport.parsing import update
from gramophone_client.types.updates import (
    Accepted,
    Changed,
    Checkpoint,
    Frame,
    Paused,
    Progress,
    Result,
    Resumed,
    Update,
    UploadProgress,
    Waiting,
)

__all__ = ["PATIENCE_S", "Recovery", "ResendableJob"]

log: logging.Logger = logging.getLogger("gramophone_client")

PATIENCE_S = 30.0  # without any server, before a lost job is given up


@dataclass
class ResendableJob:
    """A job that can be sent again."""

    spec: pb.JobSpec
    request_id: str
    attachments: Attachments  # named in the spec by digest only
    patience_s: float  # after a loss, how long the client tries to send the job again; 0: never

    def detach_all(self) -> bool:
        """Leaves no image and no checkpoint in the spec. Returns whether there was one. For a thread."""
        attachments = detach(self.spec, 0)
        self.attachments = self.attachments | attachments
        return bool(attachments)

    def resume(self, seed: int, checkpoint: Checkpoint | None) -> None:
        """Changes the job to the same one from the checkpoint, or from its start with this seed. For a thread."""
        spec = resumed_spec(self.spec, seed, checkpoint)
        attachments = self.attachments | detach(spec)
        in_spec = named(spec)
        self.attachments = {digest: attachments[digest] for digest in attachments if digest in in_spec}
        self.spec, self.request_id = spec, str(uuid.uuid4())


class Recovery:
    """What the client knows of one job, and which call follows after an error; see `recovery_states`.

    Without a `ResendableJob` the job `job_id` exists already, and `sequence` is that of the last event that the caller
    has. After a loss the job is looked for where it was for `grace_s` seconds; then it is sent again if it was sent
    from here.

    A job that no server has accepted yet is sent again as the same request while the server takes no jobs, or if its
    connection was lost. If there was no connection to lose, the error is raised at once.
    """

    def __init__(
        self, connection: Connection, *, timeout_s: float, grace_s: float, job_id: str = "", sequence: int = 0
    ) -> None:
        self.timeout_s = timeout_s
        self.job_id: str = job_id
        self.sequence: int = sequence  # of the newest event
        self.job: ResendableJob | None = None
        self.accepted: Accepted | None = None  # the newest
        self.frame: Frame | None = None
        self.checkpoint: Checkpoint | None = None
        self.result: Result | None = None
        self._connection = connection
        self._grace_s = grace_s
        self._end_s = 0.0  # of time.monotonic
        self._known_sequence = 0  # of the newest event before the current call
        self._was_connected = False  # when the current call started
        self._uploads = JobUploads(connection, timeout_s)
        self._states = self._new_states(patience_s=0.0)

    def start(self, job: ResendableJob | None) -> None:
        """Starts the job's time."""
        self.job = job
        self._end_s = time.monotonic() + self.timeout_s
        self._states = self._new_states(patience_s=0.0 if job is None else job.patience_s)

    def _new_states(self, *, patience_s: float) -> RecoveryStates:
        return RecoveryStates(
            is_accepted=bool(self.job_id),
            grace_s=self._grace_s,
            patience_s=patience_s,
            max_resends=self._connection.max_retries,
        )

    @property
    def upload_progress(self) -> UploadProgress | None:
        """How much of what the server is missing has been uploaded; None unless it is being uploaded now."""
        return self._uploads.progress

    @property
    def loss(self) -> GramophoneError | None:
        """The error that the job is recovered from now; None unless it is."""
        return self._states.loss

    @property
    def left_s(self) -> float:
        """Seconds of the job's time that are left."""
        return max(0.0, self._end_s - time.monotonic())

    def start_call(self) -> None:
        """Marks the start of a call: events up to the newest one of the calls before are known to the caller."""
        self._known_sequence = self.sequence
        self._was_connected = self._connection.is_connected

    def receive(self, event: pb.JobEvent, at_s: float) -> Update | None:
        """The update of an event that arrived at `at_s`, of time.monotonic. None if the caller has it already, or if
        this client does not know its kind."""
        self._states.event_received()
        if 0 < event.sequence <= self._known_sequence:
            return None
        self.sequence = max(self.sequence, event.sequence)
        arrived = update(event)
        match arrived:
            case Accepted():
                self.job_id, self.accepted = arrived.job_id, arrived
                self._states.accepted()
            case Frame():
                self.frame = arrived
            case Checkpoint():
                self.checkpoint = arrived
            case Result():
                self.result = arrived
        match arrived:
            case Progress() | Frame() | Checkpoint() | Changed():
                self._states.was_running(at_s)
            case Waiting():
                self._states.was_waiting()
            case Paused():
                self._states.was_paused(at_s)
            case Resumed():
                self._states.was_resumed()
        return arrived

    def with_partial_result(self, error: GramophoneError) -> GramophoneError:
        """The error, with the newest frame and checkpoint."""
        error.frame, error.checkpoint = self.frame, self.checkpoint
        return error

    async def next_attempt(self, error: GramophoneError) -> bool:
        """Waits until it is time for the next call. Returns whether that call sends the job; if not, it asks for the
        job where it was. Raises `error`, or the loss that it follows, if the job is given up."""
        job = self.job
        if isinstance(error, ImageNotFoundError) and job is not None:
            try:
                await self._uploads.send_missing(error, job.attachments, self.left_s, self._name)
                return True
            except GramophoneError as failed:
                error = failed
        elif isinstance(error, SlowSenderError) and job is not None and await asyncio.to_thread(job.detach_all):
            log.info("%s: its request takes too long to send; uploads its images in pieces", self._name)
            return True
        try:
            retry = self._states.call_failed(
                error, now_s=time.monotonic(), left_s=self.left_s, was_connected=self._was_connected
            )
        except GramophoneError as final:
            if self._states.has_used_up_resends and is_job_loss(final):
                raise self._given_up(final) from final
            raise
        self._log(retry, error)
        await asyncio.sleep(retry.pause_s)
        if retry.call is NextCall.ATTACH or job is None:
            return False
        self._uploads.start_call()
        if retry.call is NextCall.RESEND:
            if self._states.state is RecoveryState.RESENDING and self.accepted is not None:
                await asyncio.to_thread(job.resume, self.accepted.seed, self.checkpoint)
            self.sequence = 0
        await self._connection.wait_until_connected()
        return True

    def _given_up(self, loss: GramophoneError) -> GramophoneError:
        """The error of a job that was lost too often: the last loss, and what to do."""
        times = f"{self._states.losses} times"
        if self.accepted is not None:
            times += f" without {SETTLED_S:g} s of running in between"
        by_hand = "send it again"
        if self.checkpoint is not None:
            by_hand += f" with `resume` and the error's `checkpoint`, of iteration {self.checkpoint.iteration}"
        return type(loss)(
            f"the job was lost {times}, perhaps because of the job itself, and is not sent again; "
            f"to go on by hand, {by_hand}; the last loss: {loss}",
            code=loss.code,
            reason=loss.reason,
            violations=loss.violations,
            retry_after_s=loss.retry_after_s,
        )

    @property
    def _name(self) -> str:
        """The job in the log. All of its id would be enough to use it; the messages of errors can have it."""
        return f"job {self.job_id[:8]}" if self.job_id else "a job without an id yet"

    def _log(self, retry: Retry, error: GramophoneError) -> None:
        name, kind, pause_s = self._name, type(error).__name__, retry.pause_s
        match retry.call:
            case NextCall.ATTACH:
                log.warning("%s: %s; asks for it again in %.1f s", name, kind, pause_s)
            case NextCall.REPEAT:
                log.info("%s: %s; sends it again in %.1f s", name, kind, pause_s)
            case NextCall.RESEND:
                since = "its start" if self.checkpoint is None else f"iteration {self.checkpoint.iteration}"
                log.warning("%s: %s; sends it again from %s in %.1f s", name, kind, since, pause_s)
