"""What can go wrong with a call, rebuilt from what the server sent. Catch `GramophoneError` for all of it.

GramophoneError
├── InvalidRequest        the request breaks a rule; `violations` lists every field
├── MessageTooLarge       a request or reply is larger than one side takes
├── ConnectionFailed      no server there, or the connection was lost
│   ├── NotReady          still starting; `retry_after_s`
│   ├── ShuttingDown      takes no new jobs; `retry_after_s`
│   └── SlowReader        the server dropped this reader; its job may go on
├── Exhausted             the server has no room for this job
│   ├── QueueFull         too many jobs wait; `retry_after_s`
│   ├── DeadlineUnattainable  it would not be done in time; `retry_after_s` if that may pass
│   ├── TooManyWatchers   as many watch the job as may
│   └── OutOfDeviceMemory the job does not fit on the device
├── DeadlineExceeded      the call's own time limit passed
├── JobNotFound           no job of this id, or no longer
├── JobControlled         somebody controls the job already
├── JobEnded              the job ended before a command reached it
├── ImageNotFound         the server does not keep an uploaded image, or no longer
├── RequestIdTaken        the request_id belongs to a job with another spec
├── ListingDisabled       this server does not say which jobs it has
├── Cancelled             somebody stopped the call or the job
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
    """A call that did not succeed. Its text says what happened and what to do."""

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
        self.code = code  # of gRPC; None if the call never left this process
        self.reason = reason  # of the service, as in the proto's ErrorReason without its prefix; "" if it gave none
        self.violations = violations
        self.retry_after_s = retry_after_s  # when the server said so
        self.frame: Frame | None = None  # the newest picture that arrived before the error
        self.checkpoint: Checkpoint | None = None  # the newest state that did: `resume` goes on from it


class InvalidRequest(GramophoneError):
    """The request breaks at least one rule; `violations` has a field path and a sentence for each."""


class MessageTooLarge(GramophoneError):
    """A message is larger than this client or the server takes; send a smaller image, or raise that side's limit."""


class ConnectionFailed(GramophoneError):
    """No server answered at the address, or the connection was lost on the way."""


class NotReady(ConnectionFailed):
    """The server is still starting; or, from `wait_until_ready`, it was not there and serving in time."""


class ShuttingDown(ConnectionFailed):
    """The server takes no new jobs; another one, or the same one later, may."""


class SlowReader(ConnectionFailed):
    """A message was left untaken for too long. The job has lost this watcher only; `watch` finds it while it goes on."""


class Exhausted(GramophoneError):
    """The server has no room for this job."""


class QueueFull(Exhausted):
    """As many jobs wait as may wait; come back after `retry_after_s`."""


class DeadlineUnattainable(Exhausted):
    """By the server's estimate the job would not be done within `timeout_s`: allow more time, or set a `time_budget`.

    `retry_after_s` says when the load may have gone; it is None where the job itself takes too long.
    """


class TooManyWatchers(Exhausted):
    """As many watch this job as may; `get_job` still tells how it stands."""


class OutOfDeviceMemory(Exhausted):
    """The device, or the server itself, cannot hold a job of this size."""


class DeadlineExceeded(GramophoneError):
    """The call took longer than its `timeout_s`; the job has lost this watcher."""


class JobNotFound(GramophoneError):
    """The server has no job of this id: it never was, or it ended and was forgotten."""


class JobControlled(GramophoneError):
    """Somebody else controls the job: `watch` it, or try again when they have left."""


class JobEnded(GramophoneError):
    """The job ended with its result before the command reached it; iterating, or `result`, tells it."""


class ImageNotFound(GramophoneError):
    """The server keeps no image of this digest: it was not uploaded there, or made room for others; `upload` it again.

    The client does that by itself, once for each request, with the images that its own `upload` returned.
    """


class RequestIdTaken(GramophoneError):
    """The `request_id` belongs to a job with another spec; a new job needs a new id."""


class ListingDisabled(GramophoneError):
    """The server does not list its jobs, because their ids are secrets."""


class Cancelled(GramophoneError):
    """The call was stopped because this client was closed, or the job by `cancel_job` or for want of a watcher."""


class Diverged(GramophoneError):
    """The loss became NaN or infinite; `frame` is the last good picture, if the call streamed."""


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

# For errors that gRPC itself or a proxy made, and for reasons younger than this client.
CODES: Mapping[grpc.StatusCode, type[GramophoneError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNAVAILABLE: ConnectionFailed,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def from_rpc(error: grpc.aio.AioRpcError, *, target: str, timeout_s: float) -> GramophoneError:
    """The exception that `error` stands for, to be raised from it."""
    code, said = error.code(), error.details() or ""
    reason, violations, retry_after_s = _details(error)
    kind = REASONS.get(reason) or CODES.get(code, ServerFailed)
    message = said or f"the server answered {code.name} and no more"
    if not reason:
        # gRPC's own words for these name sockets and C++ files; what to do is not among them.
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in said:
            kind = MessageTooLarge
            message = f"a message is too large ({said}); send or ask for a smaller picture, or raise that side's limit"
        elif code is grpc.StatusCode.UNAVAILABLE:
            cause = said.rpartition(": ")[2]  # the rest is the way through gRPC's layers
            message = f"no connection to a gramophone server at {target} ({cause}); is it running there?"
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"not done within {timeout_s:g} s; allow more time, or ask for fewer iterations or a smaller size"
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            message = (
                f"the server at {target} does not know this call ({said}); is it a gramophone server of this version?"
            )
    return kind(message, code=code, reason=reason, violations=violations, retry_after_s=retry_after_s)


def _details(error: grpc.aio.AioRpcError) -> tuple[str, tuple[Violation, ...], float | None]:
    """(reason, violations, seconds to wait) of the google.rpc details, empty where there are none."""
    reason, violations, retry_after_s = "", [], None
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # a proxy changed the code or the message: the details no longer belong to them
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
