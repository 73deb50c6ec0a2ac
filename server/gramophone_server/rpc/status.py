"""Domain errors -> gRPC statuses with google.rpc details. The one table of the service's error codes."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.errors import (
    Cancelled,
    DeadlineUnattainable,
    Diverged,
    EngineFailed,
    GramophoneError,
    ImageNotFound,
    InvalidRequest,
    JobControlled,
    JobNotFound,
    ListingDisabled,
    NotReady,
    OutOfDeviceMemory,
    OutOfHostMemory,
    QueueFull,
    RequestIdTaken,
    ServerBusy,
    ShuttingDown,
    SlowReader,
    SlowSender,
    TooManyWatchers,
)

__all__ = ["CODES", "AbortStatus", "abort_status", "reason"]

DOMAIN = "gramophone"

# gRPC refuses trailers above 8 KiB at random and above 16 KiB always, which turns any status into RESOURCE_EXHAUSTED.
# Base64 turns 4 KiB of details into 5.4 KiB; a message that is not ASCII takes up to three times its length.
MAX_VIOLATIONS = 20
MAX_DETAILS_BYTES = 4096  # bytes
MAX_MESSAGE_LENGTH = 400  # characters

RETRY_SPREAD = 0.25  # of the retry delay
# Seconds. Jobs come and go, and are cancelled, so estimates of longer waits are rough; and gRPC's clients wait for a
# retry without a word.
MAX_RETRY_S = 30.0


class Code(NamedTuple):
    """The status code and reason of an exception class."""

    code: grpc.StatusCode
    reason: pb.ErrorReason


# Without `StartupError`, which never reaches a client.
CODES: Mapping[type[GramophoneError], Code] = {
    InvalidRequest: Code(grpc.StatusCode.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_REQUEST),
    QueueFull: Code(grpc.StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_QUEUE_FULL),
    DeadlineUnattainable: Code(grpc.StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_DEADLINE_UNATTAINABLE),
    NotReady: Code(grpc.StatusCode.UNAVAILABLE, pb.ERROR_REASON_NOT_READY),
    ShuttingDown: Code(grpc.StatusCode.UNAVAILABLE, pb.ERROR_REASON_SHUTTING_DOWN),
    JobNotFound: Code(grpc.StatusCode.NOT_FOUND, pb.ERROR_REASON_JOB_NOT_FOUND),
    ImageNotFound: Code(grpc.StatusCode.NOT_FOUND, pb.ERROR_REASON_IMAGE_NOT_FOUND),
    JobControlled: Code(grpc.StatusCode.FAILED_PRECONDITION, pb.ERROR_REASON_JOB_CONTROLLED),
    TooManyWatchers: Code(grpc.StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_TOO_MANY_WATCHERS),
    ServerBusy: Code(grpc.StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_SERVER_BUSY),
    SlowSender: Code(grpc.StatusCode.ABORTED, pb.ERROR_REASON_SLOW_SENDER),
    RequestIdTaken: Code(grpc.StatusCode.ALREADY_EXISTS, pb.ERROR_REASON_REQUEST_ID_TAKEN),
    ListingDisabled: Code(grpc.StatusCode.PERMISSION_DENIED, pb.ERROR_REASON_LISTING_DISABLED),
    Cancelled: Code(grpc.StatusCode.ABORTED, pb.ERROR_REASON_CANCELLED),
    SlowReader: Code(grpc.StatusCode.ABORTED, pb.ERROR_REASON_SLOW_READER),
    Diverged: Code(grpc.StatusCode.FAILED_PRECONDITION, pb.ERROR_REASON_DIVERGED),
    OutOfDeviceMemory: Code(grpc.StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_OUT_OF_MEMORY),
    OutOfHostMemory: Code(grpc.StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_OUT_OF_MEMORY),
    EngineFailed: Code(grpc.StatusCode.INTERNAL, pb.ERROR_REASON_INTERNAL),
}


class AbortStatus(NamedTuple):
    """The arguments of `context.abort`."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]


def reason(error: GramophoneError) -> str:
    """What `ErrorInfo`, the metrics and the access log call an error: "QUEUE_FULL"."""
    return pb.ErrorReason.Name(CODES[type(error)].reason).removeprefix("ERROR_REASON_")


def abort_status(error: GramophoneError) -> AbortStatus:
    """The status of an error, with `ErrorInfo` and, where they apply, `BadRequest` and `RetryInfo` in its details."""
    code = CODES[type(error)].code
    message = _cropped(str(error), MAX_MESSAGE_LENGTH)
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=reason(error), domain=DOMAIN)
    if isinstance(error, ImageNotFound):
        info.metadata["digests"] = ",".join(error.digests)
    status.details.append(_packed(info))
    trailers: list[tuple[str, str | bytes]] = []
    retry_ms = _retry_ms(error)
    if retry_ms is not None:
        retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration())
        retry.retry_delay.FromMilliseconds(retry_ms)
        status.details.append(_packed(retry))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # A client's retry policy waits this long. If the job would fail again, a negative delay forbids a retry,
        # although retry policies include its code.
        trailers.append(("grpc-retry-pushback-ms", "-1" if retry_ms is None else str(retry_ms)))
    if isinstance(error, InvalidRequest):
        room = MAX_DETAILS_BYTES - status.ByteSize() - 64  # the 64 are the envelope of the detail
        status.details.append(_packed(_bad_request(error, room)))
    trailers.append(("grpc-status-details-bin", status.SerializeToString()))
    return AbortStatus(code, message, tuple(trailers))


def _retry_ms(error: GramophoneError) -> int | None:
    """The delay before a retry; None if a retry does not help. It is random, because gRPC clients wait for exactly this
    time, and clients that were refused together would all retry together."""
    if not isinstance(error, QueueFull | DeadlineUnattainable | NotReady | OutOfHostMemory | ServerBusy | ShuttingDown):
        return None
    after_s = error.retry_after_s
    return None if after_s is None else round(1000 * min(after_s, MAX_RETRY_S) * random.uniform(1, 1 + RETRY_SPREAD))


def _bad_request(error: InvalidRequest, room: int) -> error_details_pb2.BadRequest:
    """As many violations as there is room for, and a last one with the number of those left out."""
    bad = error_details_pb2.BadRequest()
    last = MAX_VIOLATIONS if len(error.violations) <= MAX_VIOLATIONS else MAX_VIOLATIONS - 1
    for violation in error.violations[:last]:
        bad.field_violations.add(field=violation.field, description=_cropped(violation.description, 400))
        if bad.ByteSize() > room - 64:
            del bad.field_violations[-1]
            break
    left_out = len(error.violations) - len(bad.field_violations)
    if left_out:
        bad.field_violations.add(field="spec", description=f"has {left_out} more violations, which did not fit here")
    return bad


def _packed(
    detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo | error_details_pb2.BadRequest,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _cropped(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
