"""Which call follows a failed one: the states of a job that can lose its connection or its server.

                Accepted                 connection lost
    SENDING ───────────────► FOLLOWING ──────────────────► SEARCHING
                              │     ▲ ▲                    │       │
                              │     │ └──── any event ─────┘       │
           server shuts down, │     │                              │ job not found,
        or lost without grace │     │ Accepted                     │ or grace is over
                              ▼     │                              │
                             RESENDING ◄───────────────────────────┘

    state      next call after an error               errors that keep the state
    SENDING    the same request                       server not ready or shutting down, connection lost
    FOLLOWING  (the next state's)                     none
    SEARCHING  asks for the job where it was          no connection, queue full, server busy, job controlled
    RESENDING  the job from its newest checkpoint     no connection, queue full, server busy, job not found

A job starts in SENDING, or in FOLLOWING if the caller knows its id already. After its first loss a job in SENDING stays
there on the errors of RESENDING as well. Any other error is final and is raised as it is. When the time for a search or
for resends is over, or a deadline passes during them, the loss that started them is raised.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import grpc

from gramophone_client.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    GramophoneError,
    JobControlledError,
    JobNotFoundError,
    NotReadyError,
    QueueFullError,
    ServerBusyError,
    ShuttingDownError,
    SlowReaderError,
)

__all__ = ["SETTLED_S", "NextCall", "RecoveryState", "RecoveryStates", "Retry", "is_connection_loss", "is_job_loss"]

RETRY_PAUSE_S = (0.2, 2.0)  # first and longest pause before a retry; each is twice the one before
SETTLED_S = 10.0  # a job that has run for so long is not what ends its servers


def is_connection_loss(error: GramophoneError) -> bool:
    """Whether only the connection has ended and the job may still run: an error of the service would have a reason."""
    is_lost = error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL) and error.reason is None
    return is_lost or isinstance(error, SlowReaderError)


def is_job_loss(error: GramophoneError) -> bool:
    """Whether the job was lost with its connection or its server, and did not fail by itself."""
    return is_connection_loss(error) or isinstance(error, ShuttingDownError | JobNotFoundError)


class RecoveryState(Enum):
    """What is known of a job."""

    SENDING = auto()  # no server has accepted it yet
    FOLLOWING = auto()  # a server has it, and its updates arrive
    SEARCHING = auto()  # its connection was lost; it may still run where it was
    RESENDING = auto()  # its server was lost; no other one has accepted it yet


class NextCall(Enum):
    """The call that follows a failed one."""

    ATTACH = auto()  # asks for the job where it was
    REPEAT = auto()  # sends the last request once more
    RESEND = auto()  # sends the job again, which counts towards `max_resends`


@dataclass(frozen=True)
class Retry:
    """The next call and the pause before it."""

    call: NextCall
    pause_s: float


@dataclass
class ConnectionLoss:
    """The first error of a search or of resends, and the pause before the next retry."""

    error: GramophoneError
    since_s: float
    pause_s: float = field(default_factory=lambda: RETRY_PAUSE_S[0])


class RecoveryStates:
    """The state machine of one job. It makes no calls and reads no clock.

    After a loss the job is looked for where it was for `grace_s` seconds, and sent again for `patience_s` seconds, both
    counted from the loss; with a `patience_s` of 0 it is never sent again. It is sent again at most `max_resends` times
    until it has run for `SETTLED_S` after one acceptance, so that a job that crashes its servers does not crash them
    for ever. Running is what its events show, from the first to the newest of them, without pauses and without the
    queue; a newer checkpoint alone proves nothing, because each iteration before a crash leaves one.
    """

    def __init__(self, *, is_accepted: bool, grace_s: float, patience_s: float, max_resends: int) -> None:
        self.state = RecoveryState.FOLLOWING if is_accepted else RecoveryState.SENDING
        self._grace_s = grace_s
        self._patience_s = patience_s
        self._max_resends = max_resends
        self._resends = 0  # since the job has run for `SETTLED_S`
        self._ran_s = 0.0  # since it was accepted
        self._ran_at_s: float | None = None  # the newest event of a running job; None while it does not run
        self._is_paused = False
        self._loss: ConnectionLoss | None = None  # None in FOLLOWING, and in SENDING before the first error

    @property
    def losses(self) -> int:
        """How often the job was lost without running for `SETTLED_S` in between, if it is lost now."""
        return self._resends + 1

    @property
    def has_used_up_resends(self) -> bool:
        """Whether the next loss is final because of the losses before it."""
        return self._patience_s > 0 and 0 < self._max_resends <= self._resends

    @property
    def loss(self) -> GramophoneError | None:
        """The error that it recovers from now; None unless it does."""
        return None if self._loss is None else self._loss.error

    def accepted(self) -> None:
        """A server has accepted the job."""
        self.state, self._loss = RecoveryState.FOLLOWING, None
        self._ran_s, self._ran_at_s, self._is_paused = 0.0, None, False

    def event_received(self) -> None:
        """An event of the job has arrived. `Accepted` is always the first event of a job that is sent."""
        if self.state is RecoveryState.SEARCHING:
            self.state, self._loss = RecoveryState.FOLLOWING, None

    def was_running(self, at_s: float) -> None:
        """An event that arrived at `at_s` shows that the job runs. A paused one sends pictures on request, too."""
        if self._is_paused:
            return
        if self._ran_at_s is not None:
            self._ran_s += at_s - self._ran_at_s
        self._ran_at_s = at_s
        if self._ran_s >= SETTLED_S:
            self._resends = 0

    def was_waiting(self) -> None:
        """The job is in the queue."""
        self._ran_at_s = None

    def was_paused(self, at_s: float) -> None:
        """The job stands still from `at_s` on."""
        self.was_running(at_s)
        self._ran_at_s, self._is_paused = None, True

    def was_resumed(self) -> None:
        """The pause is over."""
        self._is_paused = False

    def call_failed(self, error: GramophoneError, *, now_s: float, left_s: float, was_connected: bool) -> Retry:
        """The transition after a failed call. Raises `error`, or the loss that it follows, if the job is given up.

        `left_s` is what is left of the job's time at `now_s`. `was_connected` is whether there was a connection when
        the call started: without one, no server is there, and the job cannot have been lost on it.
        """
        loss, has_lost_connection = self._loss, was_connected and is_connection_loss(error)
        is_first = loss is None
        if loss is None:
            if not self._starts_recovery(error, has_lost_connection):
                raise error
            loss = self._loss = ConnectionLoss(error, now_s)
        elif isinstance(error, DeadlineExceededError):
            raise loss.error from error

        # Before the job is accepted, repeating a refused request is harmless. A lost connection counts as a resend: it
        # may be this job that crashes its servers.
        counts = (
            is_first or has_lost_connection
            if self.state is RecoveryState.SENDING
            else self.state is not RecoveryState.RESENDING
        )
        can_resend = (
            self._patience_s > 0
            and not isinstance(loss.error, SlowReaderError)
            and (not counts or self._resends < self._max_resends)
        )
        if not is_first and not _keeps_trying(error, can_resend):
            raise error

        lost_s = now_s - loss.since_s
        state = self._next_state(error, lost_s)
        search_s = self._grace_s - lost_s if state is RecoveryState.SEARCHING else 0.0
        # A controlled job still runs: its controller may be the lost connection, which the server has not noticed yet.
        resend_s = self._patience_s - lost_s if can_resend and not isinstance(error, JobControlledError) else 0.0
        wait_s = min(max(search_s, resend_s), left_s)
        if wait_s <= 0:
            if error is loss.error:
                raise error
            raise loss.error from error

        self.state = state
        pause_s = min(max(loss.pause_s, error.retry_after_s or 0.0), wait_s)
        loss.pause_s = min(2 * loss.pause_s, RETRY_PAUSE_S[1])
        if state is RecoveryState.SEARCHING:
            return Retry(NextCall.ATTACH, pause_s)
        if counts:
            self._resends += 1
            return Retry(NextCall.RESEND, pause_s)
        return Retry(NextCall.REPEAT, pause_s)

    def _starts_recovery(self, error: GramophoneError, has_lost_connection: bool) -> bool:
        """Whether the first error is a loss, or in SENDING a refusal that may pass."""
        if self.state is RecoveryState.SENDING:
            return has_lost_connection or isinstance(error, ShuttingDownError | NotReadyError)
        return is_connection_loss(error) or isinstance(error, ShuttingDownError)

    def _next_state(self, error: GramophoneError, lost_s: float) -> RecoveryState:
        match self.state:
            case RecoveryState.FOLLOWING:
                is_gone = isinstance(error, ShuttingDownError)
            case RecoveryState.SEARCHING:
                is_gone = isinstance(error, JobNotFoundError)
            case other:
                return other
        return RecoveryState.RESENDING if is_gone or lost_s >= self._grace_s else RecoveryState.SEARCHING


def _keeps_trying(error: GramophoneError, can_resend: bool) -> bool:
    """Whether an error during a search or during resends may pass."""
    if isinstance(error, JobNotFoundError):
        return can_resend
    return is_connection_loss(error) or isinstance(
        error, ConnectionFailedError | QueueFullError | ServerBusyError | JobControlledError
    )
