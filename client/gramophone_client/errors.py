"""The errors of a call, rebuilt from the status that the server sent. `GramophoneError` is the base of all of them.

GramophoneError
├── InvalidRequest        the request breaks a rule; `violations` lists every field
├── MessageTooLarge       a request or reply is larger than one side accepts
├── ConnectionFailed      there is no server, or the connection was lost
│   ├── NotReady          the server is still starting; `retry_after_s`
│   ├── ShuttingDown      the server accepts no new jobs; `retry_after_s`
│   └── SlowReader        the server dropped this reader; its job may continue
├── Exhausted             the server has no room for this job
│   ├── QueueFull         too many jobs wait; `retry_after_s`
│   ├── DeadlineUnattainable  the job would not be done in time; `retry_after_s` if waiting may help
│   ├── TooManyWatchers   the job has as many watchers as the server allows
│   └── OutOfDeviceMemory the job does not fit on the device
├── DeadlineExceeded      the call's own time limit passed
├── JobNotFound           the server has no job with this id, or no longer
├── JobControlled         another client controls the job
├── JobEnded              the job ended before a command reached it
├── ImageNotFound         the server does not have an uploaded image, or no longer
├── RequestIdTaken        the request_id belongs to a job with another spec
├── ListingDisabled       the server does not list its jobs
├── Cancelled             the call or the job was stopped
├── Diverged              the loss stopped being finite; `frame` is the last good picture
└── ServerFailed          a defect of the server, or an answer that this client does not understand
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from gramophone.recipe import Violation

if TYPE_CHECKING:
    from gramophone_client.types.updates import Checkpoint, Frame

__all__ = [
    "Cancelled",
    "ConnectionFailed",
    "DeadlineExceeded",
    "DeadlineUnattainable",
    "Diverged",
    "Exhausted",
    "GramophoneError",
    "ImageNotFound",
    "InvalidRequest",
    "JobControlled",
    "JobEnded",
    "JobNotFound",
    "ListingDisabled",
    "MessageTooLarge",
    "NotReady",
    "OutOfDeviceMemory",
    "QueueFull",
    "RequestIdTaken",
    "ServerFailed",
    "ShuttingDown",
    "SlowReader",
    "TooManyWatchers",
    "from_rpc",
]


class GramophoneError(Exception):
    """A call that failed. The message states what happened and what to do."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        violations: tuple[Violation, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code  # None if the call never left this process
        self.reason = reason  # the service's ErrorReason without its prefix; "" if there is none
        self.violations = violations
        self.retry_after_s = retry_after_s  # None if the server gave no time
        self.frame: Frame | None = None  # the newest picture that arrived before the error
        # The newest state that arrived before it; `resume` continues from there.
        self.checkpoint: Checkpoint | None = None


class InvalidRequest(GramophoneError):
    """The request breaks at least one rule; `violations` has a field path and a description for each."""


class MessageTooLarge(GramophoneError):
    """A message is larger than this client or the server accepts; send a smaller image, or raise that limit."""


class ConnectionFailed(GramophoneError):
    """No server answered at the address, or the connection was lost during the call."""


class NotReady(ConnectionFailed):
    """The server is still starting; or, from `wait_until_ready`, it was not serving in time."""


class ShuttingDown(ConnectionFailed):
    """The server accepts no new jobs; another server, or the same one later, may."""


class SlowReader(ConnectionFailed):
    """This reader left a message unread for too long and was dropped. The job may continue; `watch` it again."""


class Exhausted(GramophoneError):
    """The server has no room for this job."""


class QueueFull(Exhausted):
    """The queue is full; try again after `retry_after_s`."""


class DeadlineUnattainable(Exhausted):
    """By the server's estimate the job would not be done within `timeout_s`: allow more time, or set a `time_budget`.

    `retry_after_s` is the time until the current load may be over; None if the job takes too long by itself.
    """


class TooManyWatchers(Exhausted):
    """The job has as many watchers as the server allows; `get_job` still returns its status."""


class OutOfDeviceMemory(Exhausted):
    """The device, or the server itself, cannot hold a job of this size."""


class DeadlineExceeded(GramophoneError):
    """The call took longer than its `timeout_s`; the job has lost this watcher."""


class JobNotFound(GramophoneError):
    """The server has no job with this id: it never existed, or it ended and has expired."""


class JobControlled(GramophoneError):
    """Another client controls the job: `watch` it, or try again after that client has left."""


class JobEnded(GramophoneError):
    """The job ended with its result before the command reached it; iterating, or `result`, returns the result."""


class ImageNotFound(GramophoneError):
    """The server has no image of this digest: it was not uploaded there, or was evicted; `upload` it again.

    The client does that automatically, once per request, with the images that its own `upload` returned.
    """


class RequestIdTaken(GramophoneError):
    """The `request_id` belongs to a job with another spec; a new job needs a new id."""


class ListingDisabled(GramophoneError):
    """The server does not list its jobs, because their ids are secrets."""


class Cancelled(GramophoneError):
    """The call was stopped because this client was closed, or the job by `cancel_job` or because it had no watcher."""


class Diverged(GramophoneError):
    """The loss became NaN or infinite; `frame` is the last valid picture if the call streamed frames."""


class ServerFailed(GramophoneError):
    """A defect of the server, whose log has the details, or an answer that this client does not understand."""


REASONS: Mapping[str, type[GramophoneError]] = {
    "INVALID_REQUEST": InvalidRequest,
    "NOT_READY": NotReady,
    "QUEUE_FULL": QueueFull,
    "DEADLINE_UNATTAINABLE": DeadlineUnattainable,
    "TOO_MANY_WATCHERS": TooManyWatchers,
    "SHUTTING_DOWN": ShuttingDown,
    "DIVERGED": Diverged,
    "OUT_OF_MEMORY": OutOfDeviceMemory,
    "INTERNAL": ServerFailed,
    "JOB_NOT_FOUND": JobNotFound,
    "JOB_CONTROLLED": JobControlled,
    "IMAGE_NOT_FOUND": ImageNotFound,
    "REQUEST_ID_TAKEN": RequestIdTaken,
    "LISTING_DISABLED": ListingDisabled,
    "CANCELLED": Cancelled,
    "SLOW_READER": SlowReader,
}

# For errors of gRPC itself or of a proxy, and for reasons newer than this client.
CODES: Mapping[grpc.StatusCode, type[GramophoneError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNAVAILABLE: ConnectionFailed,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def from_rpc(error: grpc.aio.AioRpcError, *, target: str, timeout_s: float) -> GramophoneError:
    """The exception for an error of gRPC, to be raised from it."""
    code, details = error.code(), error.details() or ""
    reason, violations, retry_after_s = _details(error)
    kind = REASONS.get(reason) or CODES.get(code, ServerFailed)
    message = details or f"the server returned {code.name} without a message"
    if not reason:
        # gRPC's own messages for these name sockets and C++ files, and not what to do.
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
            kind = MessageTooLarge
            message = f"a message is too large ({details}); send or request a smaller picture, or raise that limit"
        elif code is grpc.StatusCode.UNAVAILABLE:
            cause = details.rpartition(": ")[2]  # before it, the names of gRPC's layers
            message = f"no connection to a gramophone server at {target} ({cause}); is it running there?"
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"not done within {timeout_s:g} s; allow more time, or ask for fewer iterations or a smaller size"
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            message = (
                f"the server at {target} does not know this call ({details}); "
                "is it a gramophone server of this version?"
            )
    return kind(message, code=code, reason=reason, violations=violations, retry_after_s=retry_after_s)


def _details(error: grpc.aio.AioRpcError) -> tuple[str, tuple[Violation, ...], float | None]:
    """(reason, violations, seconds to wait) of the google.rpc details; "", () and None without them."""
    reason, violations, retry_after_s = "", [], None
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # a proxy changed the code or the message, so that the details no longer match
        status = None
    for detail in status.details if status is not None else ():
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == "gramophone":
            reason = info.reason
        elif detail.Unpack(bad):
            violations += [Violation(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return reason, tuple(violations), retry_after_s
