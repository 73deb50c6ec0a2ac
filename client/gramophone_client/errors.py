"""The errors of a call, rebuilt from the status that the server sent. `GramophoneError` is the base of all of them.

GramophoneError
├── InvalidRequestError        the request breaks a rule; `violations` lists every field
├── MessageTooLargeError       a request or reply is larger than one side accepts
├── ConnectionFailedError      there is no server, or the connection was lost
│   ├── NotReadyError          the server is still starting; `retry_after_s`
│   ├── ShuttingDownError      the server accepts no new jobs; `retry_after_s`
│   └── SlowReaderError        the server dropped this reader; its job may continue
├── ExhaustedError             the server has no room for this job
│   ├── QueueFullError         too many jobs wait; `retry_after_s`
│   ├── ServerBusyError        other calls use up what this call needs; `retry_after_s`
│   ├── DeadlineUnattainableError  the job would not be done in time; `retry_after_s` if waiting may help
│   ├── TooManyWatchersError   the job has as many watchers as the server allows
│   └── OutOfDeviceMemoryError the job does not fit on the device
├── SlowSenderError            this client did not send a message for which the server waited
├── DeadlineExceededError      the call's own time limit passed
├── JobNotFoundError           the server has no job with this id, or no longer
├── JobControlledError         another client controls the job
├── JobEndedError              the job ended before a command reached it
├── ImageNotFoundError         the server does not have an uploaded image or checkpoint, or no longer
├── RequestIdTakenError        the request_id belongs to a job with another spec
├── AccessDeniedError          a proxy, or the server, refuses this client
│   └── ListingDisabledError   the server does not list its jobs
├── CallCancelledError         the call or the job was stopped
│   └── ClientClosedError      the client was closed during the call, or before
├── ClientUsageError           the client, or a stream of it, is used where it cannot work
├── DivergedError              the loss stopped being finite; `frame` is the last good picture
└── ServerFailedError          a defect of the server, or an answer that this client does not understand
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from gramophone.recipe import Violation
from gramophone_client.deprecations import of_old_name

if TYPE_CHECKING:
    from gramophone_client.types.updates import Checkpoint, Frame
else:  # unseen by type checkers, which would accept any name otherwise

    def __getattr__(name: str) -> object:
        return of_old_name(__name__, name)


__all__ = [
    "AccessDeniedError",
    "CallCancelledError",
    "ClientClosedError",
    "ClientUsageError",
    "ConnectionFailedError",
    "DeadlineExceededError",
    "DeadlineUnattainableError",
    "DivergedError",
    "ErrorReason",
    "ExhaustedError",
    "GramophoneError",
    "ImageNotFoundError",
    "InvalidRequestError",
    "JobControlledError",
    "JobEndedError",
    "JobNotFoundError",
    "ListingDisabledError",
    "MessageTooLargeError",
    "NotReadyError",
    "OutOfDeviceMemoryError",
    "QueueFullError",
    "RequestIdTakenError",
    "ServerBusyError",
    "ServerFailedError",
    "ShuttingDownError",
    "SlowReaderError",
    "SlowSenderError",
    "TooManyWatchersError",
    "from_rpc",
]


class ErrorReason(StrEnum):
    """Why the service refused or ended a call, as in the proto. gRPC's own errors have no reason."""

    INVALID_REQUEST = "INVALID_REQUEST"
    QUEUE_FULL = "QUEUE_FULL"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    DIVERGED = "DIVERGED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    INTERNAL = "INTERNAL"
    NOT_READY = "NOT_READY"
    JOB_NOT_FOUND = "JOB_NOT_FOUND"
    REQUEST_ID_TAKEN = "REQUEST_ID_TAKEN"
    CANCELLED = "CANCELLED"
    SLOW_READER = "SLOW_READER"
    LISTING_DISABLED = "LISTING_DISABLED"
    DEADLINE_UNATTAINABLE = "DEADLINE_UNATTAINABLE"
    JOB_CONTROLLED = "JOB_CONTROLLED"
    IMAGE_NOT_FOUND = "IMAGE_NOT_FOUND"
    TOO_MANY_WATCHERS = "TOO_MANY_WATCHERS"
    SERVER_BUSY = "SERVER_BUSY"
    SLOW_SENDER = "SLOW_SENDER"
    UNKNOWN = "UNKNOWN"  # a reason newer than this client


class GramophoneError(Exception):
    """A call that failed. The message states what happened and what to do."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: ErrorReason | None = None,
        violations: tuple[Violation, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code  # None if the call never left this process
        self.reason = reason  # None if the error is not the service's: gRPC's, a proxy's or this client's
        self.violations = violations
        self.retry_after_s = retry_after_s  # None if the server gave no time
        self.frame: Frame | None = None  # the newest picture that arrived before the error
        # The newest state that arrived before it; `resume` continues from there.
        self.checkpoint: Checkpoint | None = None

    def __repr__(self) -> str:
        shown = [repr(str(self))]
        if self.code is not None:
            shown.append(f"code={self.code.name}")
        if self.reason is not None:
            shown.append(f"reason={self.reason.name}")
        if self.retry_after_s is not None:
            shown.append(f"retry_after_s={self.retry_after_s:g}")
        if self.frame is not None:
            shown.append(f"frame of iteration {self.frame.iteration}")
        if self.checkpoint is not None:
            shown.append(f"checkpoint of iteration {self.checkpoint.iteration}")
        return f"{type(self).__name__}({', '.join(shown)})"


class InvalidRequestError(GramophoneError):
    """The request breaks at least one rule; `violations` has a field path and a description for each."""


class MessageTooLargeError(GramophoneError):
    """A message is larger than this client or the server accepts; send a smaller image, or raise that limit."""


class ConnectionFailedError(GramophoneError):
    """No server answered at the address, or the connection was lost during the call."""


class NotReadyError(ConnectionFailedError):
    """The server is still starting; or, from `wait_until_ready`, it was not serving in time."""


class ShuttingDownError(ConnectionFailedError):
    """The server accepts no new jobs; another server, or the same one later, may."""


class SlowReaderError(ConnectionFailedError):
    """This reader left a message unread for too long and was dropped. The job may continue; `watch` it again."""


class ExhaustedError(GramophoneError):
    """The server has no room for this job."""


class QueueFullError(ExhaustedError):
    """The queue is full; try again after `retry_after_s`."""


class ServerBusyError(ExhaustedError):
    """Other calls use up what this call needs: the server's calls, its memory for requests or images, or its files.

    Try again after `retry_after_s`.
    """


class DeadlineUnattainableError(ExhaustedError):
    """By the server's estimate the job would not be done within `timeout`: allow more time, or set a `time_budget`.

    `retry_after_s` is the time until the current load may be over; None if the job takes too long by itself.
    """


class TooManyWatchersError(ExhaustedError):
    """The job has as many watchers as the server allows; `get_job` still returns its status."""


class OutOfDeviceMemoryError(ExhaustedError):
    """The device, or the server itself, cannot hold a job of this size."""


class SlowSenderError(GramophoneError):
    """This client did not send a message for which the server waited; is the connection too slow?"""


class DeadlineExceededError(GramophoneError):
    """The call took longer than its `timeout`; the job has lost this watcher."""


class JobNotFoundError(GramophoneError):
    """The server has no job with this id: it never existed, or it ended and has expired."""


class JobControlledError(GramophoneError):
    """Another client controls the job: `watch` it, or try again after that client has left."""


class JobEndedError(GramophoneError):
    """The job ended with its result before the command reached it; iterating, or `result`, returns the result."""


class ImageNotFoundError(GramophoneError):
    """The server has no upload of this digest: it was not uploaded there, or was evicted; `upload` it again.

    The client does that automatically, with what it has found too large for a request and with the images that its own
    `upload` returned, before up to three attempts of a call.
    """

    digests: tuple[str, ...] = ()  # of all that is missing; empty if the server is too old to list them


class RequestIdTakenError(GramophoneError):
    """The `request_id` belongs to a job with another spec; a new job needs a new id."""


class AccessDeniedError(GramophoneError):
    """A proxy before the server, or the server, refuses this client: give a valid token in `metadata`."""


class ListingDisabledError(AccessDeniedError):
    """The server does not list its jobs, because their ids are secrets."""


class CallCancelledError(GramophoneError):
    """The call was stopped because this client was closed, or the job by `cancel_job` or because it had no watcher."""


class ClientClosedError(CallCancelledError):
    """The client was closed during the call or before it."""


class ClientUsageError(GramophoneError):
    """The client, or a stream of it, is used where it cannot work: in another event loop than its own or without one,
    in a process that was forked from its own, in its own thread, or after a stream was closed."""


class DivergedError(GramophoneError):
    """The loss became NaN or infinite; `frame` is the last valid picture if the call streamed frames."""


class ServerFailedError(GramophoneError):
    """A defect of the server, whose log has the details, or an answer that this client does not understand."""


REASONS: Mapping[ErrorReason, type[GramophoneError]] = {
    ErrorReason.INVALID_REQUEST: InvalidRequestError,
    ErrorReason.NOT_READY: NotReadyError,
    ErrorReason.QUEUE_FULL: QueueFullError,
    ErrorReason.DEADLINE_UNATTAINABLE: DeadlineUnattainableError,
    ErrorReason.TOO_MANY_WATCHERS: TooManyWatchersError,
    ErrorReason.SHUTTING_DOWN: ShuttingDownError,
    ErrorReason.DIVERGED: DivergedError,
    ErrorReason.OUT_OF_MEMORY: OutOfDeviceMemoryError,
    ErrorReason.INTERNAL: ServerFailedError,
    ErrorReason.JOB_NOT_FOUND: JobNotFoundError,
    ErrorReason.JOB_CONTROLLED: JobControlledError,
    ErrorReason.IMAGE_NOT_FOUND: ImageNotFoundError,
    ErrorReason.REQUEST_ID_TAKEN: RequestIdTakenError,
    ErrorReason.LISTING_DISABLED: ListingDisabledError,
    ErrorReason.CANCELLED: CallCancelledError,
    ErrorReason.SLOW_READER: SlowReaderError,
    ErrorReason.SERVER_BUSY: ServerBusyError,
    ErrorReason.SLOW_SENDER: SlowSenderError,
}

# For errors of gRPC itself or of a proxy, and for reasons newer than this client.
CODES: Mapping[grpc.StatusCode, type[GramophoneError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.UNAVAILABLE: ConnectionFailedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExhaustedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.UNAUTHENTICATED: AccessDeniedError,
    grpc.StatusCode.PERMISSION_DENIED: AccessDeniedError,
}


def from_rpc(error: grpc.aio.AioRpcError, *, target: str, timeout_s: float) -> GramophoneError:
    """The exception for an error of gRPC, to be raised from it."""
    code, details = error.code(), error.details() or ""
    reason, violations, retry_after_s, digests = _details(error)
    kind = REASONS.get(reason) if reason is not None else None
    kind = kind or CODES.get(code, ServerFailedError)
    message = details or f"the server returned {code.name} without a message"
    if reason is None:
        # gRPC's own messages for these name sockets and C++ files, and not what to do.
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
            kind = MessageTooLargeError
            message = f"a message is too large ({details}); send or request a smaller picture, or raise that limit"
        elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and "metadata size exceeds" in details:
            kind = MessageTooLargeError
            limit = details.partition(";")[0]  # after it, the size of every entry
            message = f"the metadata of the call is too large for the server ({limit}); send less"
        elif code is grpc.StatusCode.UNAVAILABLE:
            cause = details.rpartition(": ")[2]  # before it, the names of gRPC's layers
            message = f"no connection to a gramophone server at {target} ({cause}); is it running there?"
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"not done within {timeout_s:g} s; allow more time, or ask for fewer iterations or a smaller size"
        elif kind is AccessDeniedError:
            message = f"access to {target} was denied ({details or code.name}); does `metadata` have a valid token?"
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            message = (
                f"the server at {target} does not know this call ({details}); "
                "is it a gramophone server of this version?"
            )
    rebuilt = kind(message, code=code, reason=reason, violations=violations, retry_after_s=retry_after_s)
    if isinstance(rebuilt, ImageNotFoundError):
        rebuilt.digests = digests
    return rebuilt


class Details(NamedTuple):
    """What the google.rpc details of an error state; the defaults stand for what they do not."""

    reason: ErrorReason | None = None
    violations: tuple[Violation, ...] = ()
    retry_after_s: float | None = None
    digests: tuple[str, ...] = ()  # of missing uploads


def _details(error: grpc.aio.AioRpcError) -> Details:
    reason: ErrorReason | None = None
    digests: tuple[str, ...] = ()
    violations: list[Violation] = []
    retry_after_s: float | None = None
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # a proxy changed the code or the message, so that the details no longer match
        status = None
    for detail in status.details if status is not None else ():
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == "gramophone":
            known = info.reason in ErrorReason.__members__
            reason = ErrorReason(info.reason) if known else ErrorReason.UNKNOWN
            digests = tuple(filter(None, info.metadata["digests"].split(",")))
        elif detail.Unpack(bad):
            violations += [Violation(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return Details(reason, tuple(violations), retry_after_s, digests)
