"""The errors of a call: each status of the server as the right exception."""

import copy
import pickle

import grpc
import pytest

from gramophone.recipe import Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import AsyncGramophoneClient, Checkpoint, errors
from gramophone_server import errors as server_errors
from gramophone_server.rpc.status import CODES as SERVER_CODES
from gramophone_server.rpc.status import abort_status
from tests.support.fake_service import (
    NO_RETRIES,
    PAINTING,
    PHOTO,
    accepted,
    checkpoint,
    frame,
    refused,
    rpc_status,
)
from tests.support.updates import collected

ERROR_ARGUMENTS = {
    server_errors.InvalidRequest: [Violation("spec.recipe.beta", "must be x"), Violation("spec.seed", "must be y")],
    server_errors.QueueFull: (4, 4, 12.5),
    server_errors.Diverged: (17,),
    server_errors.OutOfDeviceMemory: (4096, 4096),
    server_errors.JobNotFound: ("j1",),
    server_errors.RequestIdTaken: ("r1",),
    server_errors.ImageNotFound: ("sha256:0",),
    server_errors.JobControlled: ("j1",),
    server_errors.TooManyWatchers: (8,),
    server_errors.DeadlineUnattainable: (3.0, 5.0, 6.0),
    server_errors.SlowReader: (60.0,),
    server_errors.ServerBusy: ("all 8 calls are taken", 3.0),
    server_errors.SlowSender: (20.0,),
}
CLIENT_NAMES = {"EngineFailed": "ServerFailed", "OutOfHostMemory": "OutOfDeviceMemory", "Cancelled": "CallCancelled"}


def server_error(kind):
    arguments = ERROR_ARGUMENTS.get(kind, ())
    return kind(arguments) if isinstance(arguments, list) else kind(*arguments)


@pytest.mark.parametrize("kind", SERVER_CODES, ids=lambda kind: kind.__name__)
async def test_every_error_of_the_server_is_rebuilt(service, kind):
    error = server_error(kind)
    service.scripts = [[refused(error)]]
    async with AsyncGramophoneClient(service.target, timeout=60, max_retries=0) as client:
        for call in (client.stylize(PHOTO, PAINTING), collected(client.stream(PHOTO, PAINTING))):
            with pytest.raises(errors.GramophoneError) as raised:
                await call
            assert type(raised.value).__name__ == CLIENT_NAMES.get(kind.__name__, kind.__name__) + "Error"
            assert str(raised.value) == str(error)
            assert raised.value.code is SERVER_CODES[kind].code
            assert raised.value.violations == getattr(error, "violations", ())
            told_s = getattr(error, "retry_after_s", None)
            assert raised.value.retry_after_s == (told_s if told_s is None else pytest.approx(told_s, rel=0.26))


def test_every_reason_of_the_proto_has_its_exception():
    reasons = {name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert {reason.value for reason in errors.ErrorReason} == reasons | {"UNKNOWN"}
    assert errors.REASONS.keys() == reasons


async def test_a_reason_newer_than_this_client_is_unknown(service):
    code, message, trailers = abort_status(server_errors.QueueFull(4, 4, 12.5))
    newer = [(key, value.replace(b"QUEUE_FULL", b"MOON_PHASE")) for key, value in trailers if key.endswith("-bin")]
    service.scripts = [[rpc_status(code, message, (*newer, *NO_RETRIES))]]
    async with AsyncGramophoneClient(service.target, max_retries=0) as client:
        with pytest.raises(errors.ExhaustedError) as raised:
            await client.stylize(PHOTO, PAINTING)
    assert (type(raised.value), raised.value.reason) == (errors.ExhaustedError, errors.ErrorReason.UNKNOWN)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
async def test_errors_can_be_sent_to_another_process(service, copied):
    service.scripts = [[accepted(), frame(3), checkpoint(3), refused(server_errors.QueueFull(4, 4, 12.5))]]
    async with AsyncGramophoneClient(service.target, max_retries=0) as client:
        with pytest.raises(errors.QueueFullError) as raised:
            await collected(client.stream(PHOTO, PAINTING))
    error = raised.value
    other = copied(error)
    assert type(other) is errors.QueueFullError and str(other) == str(error)
    assert vars(other) == vars(error) and other.frame.iteration == other.checkpoint.iteration == 3


def test_an_error_shows_what_it_knows():
    assert repr(errors.JobNotFoundError("none")) == "JobNotFoundError('none')"
    error = errors.QueueFullError(
        "full", code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason=errors.ErrorReason.QUEUE_FULL, retry_after_s=2.5
    )
    shown = "code=RESOURCE_EXHAUSTED, reason=QUEUE_FULL, retry_after_s=2.5"
    assert repr(error) == f"QueueFullError('full', {shown})"
    error.checkpoint = Checkpoint(7, light=True, data=b"")
    assert repr(error) == f"QueueFullError('full', {shown}, checkpoint of iteration 7)"


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "no", errors.InvalidRequestError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "quota", errors.ExhaustedError),
        (grpc.StatusCode.UNAVAILABLE, "gone", errors.ConnectionFailedError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "late", errors.DeadlineExceededError),
        (grpc.StatusCode.CANCELLED, "stopped", errors.CallCancelledError),
        (grpc.StatusCode.UNIMPLEMENTED, "what?", errors.ServerFailedError),
        (grpc.StatusCode.UNKNOWN, "", errors.ServerFailedError),
        (grpc.StatusCode.PERMISSION_DENIED, "no", errors.AccessDeniedError),
        (grpc.StatusCode.UNAUTHENTICATED, "who?", errors.AccessDeniedError),
    ],
    ids=lambda value: getattr(value, "name", None),
)
async def test_errors_without_a_reason_depend_on_the_code(service, code, message, kind):
    service.scripts = [[rpc_status(code, message)]]
    async with AsyncGramophoneClient(service.target, max_retries=0) as client:
        with pytest.raises(errors.GramophoneError) as raised:
            await client.stylize(PHOTO, PAINTING)
    assert type(raised.value) is kind
    assert str(raised.value)


async def test_a_refusal_of_a_proxy_asks_for_a_token(service):
    service.scripts = [[rpc_status(grpc.StatusCode.UNAUTHENTICATED, "Received http2 header with status: 401")]]
    async with AsyncGramophoneClient(service.target, max_retries=0) as client:
        with pytest.raises(errors.AccessDeniedError) as raised:
            await client.stylize(PHOTO, PAINTING)
    assert str(raised.value) == (
        f"access to {service.target} was denied (Received http2 header with status: 401); "
        "does `metadata` have a valid token?"
    )


def test_the_docstring_draws_the_class_tree():
    drawn = [line for line in errors.__doc__.splitlines() if "──" in line]
    kinds = [line.split("── ")[1].split()[0] for line in drawn]
    assert sorted([*kinds, "ErrorReason", "GramophoneError", "from_rpc"]) == errors.__all__
    for line, name in zip(drawn, kinds, strict=True):
        depth = line.index("──") // 4 + 1
        assert len(getattr(errors, name).__mro__) == depth + len(errors.GramophoneError.__mro__)


async def test_metadata_that_is_too_large_for_the_server_is_named(service):
    async with AsyncGramophoneClient(service.target, timeout=60, max_retries=0) as client:
        with pytest.raises(errors.MessageTooLargeError, match="metadata of the call is too large for the"):
            await client.server_info(metadata={"x-big": "x" * 100_000})
