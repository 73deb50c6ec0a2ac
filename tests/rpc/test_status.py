"""The gRPC status of each error: code, message, details and retry delay."""

import asyncio
import inspect

import grpc
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2

from gramophone.recipe import Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server import errors
from gramophone_server.rpc import status
from gramophone_server.rpc.admission import Admission
from tests.support.engines import FakeEngine
from tests.support.serving import (
    refused,
    serving,
)
from tests.support.specs import spec

EXAMPLES = {
    "InvalidRequest": errors.InvalidRequest([Violation("spec.content", "is odd")]),
    "NotReady": errors.NotReady(),
    "QueueFull": errors.QueueFull(16, 16, 12.3),
    "DeadlineUnattainable": errors.DeadlineUnattainable(wait_s=12.3, run_s=4, left_s=5),
    "ShuttingDown": errors.ShuttingDown(),
    "JobNotFound": errors.JobNotFound("j1"),
    "ImageNotFound": errors.ImageNotFound("sha256:0"),
    "JobControlled": errors.JobControlled("j1"),
    "TooManyWatchers": errors.TooManyWatchers(16),
    "RequestIdTaken": errors.RequestIdTaken("r1"),
    "ServerBusy": errors.ServerBusy("all 8 calls are taken", 3),
    "SlowSender": errors.SlowSender(20),
    "ListingDisabled": errors.ListingDisabled(),
    "Cancelled": errors.Cancelled(),
    "SlowReader": errors.SlowReader(30),
    "Diverged": errors.Diverged(2),
    "OutOfDeviceMemory": errors.OutOfDeviceMemory(64, 32),
    "OutOfHostMemory": errors.OutOfHostMemory(),
    "EngineFailed": errors.EngineFailed(),
}


RAISED = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.GramophoneError) and name not in ("GramophoneError", "StartupError")
}


def test_a_violation_of_no_field_is_only_its_sentence():
    error = errors.InvalidRequest([Violation("", "came too early"), Violation("spec.content", "is odd")])
    assert str(error) == "came too early; spec.content: is odd"


@pytest.mark.parametrize("count", [1, 20, 21, 1000])
@pytest.mark.parametrize("length", [1, 1000])
def test_details_stay_within_4_kib(count, length):
    error = errors.InvalidRequest(Violation(f"spec.f[{i}]", "\N{SNOWMAN}" * length) for i in range(count))
    got = status.abort_status(error)
    assert len(dict(got.trailers)["grpc-status-details-bin"]) <= 4096
    assert len(got.message) <= 400


def test_every_exception_has_a_code_and_an_example():
    assert status.CODES.keys() == set(RAISED.values()), "CODES of rpc/status.py has the code of each exception"
    assert EXAMPLES.keys() == RAISED.keys(), "EXAMPLES, above, has one of each exception"


@pytest.mark.parametrize("name", EXAMPLES)
async def test_every_exception_has_its_code_reason_and_details(name):
    error = EXAMPLES[name]
    code, reason = status.CODES[RAISED[name]]
    async with serving(FakeEngine(fails_at=2, error=error)) as s:
        for call in (
            s.stub.Stylize(pb.StylizeRequest(spec=spec())),
            s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec())),
        ):
            got = await refused(call)
            assert got.code is code
            assert got.message == str(error)
            assert f"ERROR_REASON_{got.ErrorInfo.reason}" == pb.ErrorReason.Name(reason)
            assert hasattr(got, "RetryInfo") == hasattr(error, "retry_after_s")
            assert hasattr(got, "BadRequest") == (name == "InvalidRequest")


@pytest.mark.parametrize(
    ("name", "least"),
    # A delay if a retry may help, -1 if it would be refused again, none if the client's policy decides.
    [
        (
            name,
            {
                "QueueFull": 12300,
                "ServerBusy": 3000,
                "DeadlineUnattainable": 12300,
                "OutOfDeviceMemory": -1,
                "OutOfHostMemory": 5000,
                "TooManyWatchers": -1,
            }.get(name),
        )
        for name in EXAMPLES
    ],
)
def test_retry_pushback_is_a_delay_or_never(name, least):
    pushback = dict(status.abort_status(EXAMPLES[name]).trailers).get("grpc-retry-pushback-ms")
    assert pushback == least if least is None else least <= int(pushback) <= max(1.25 * least, -1)


def test_clients_refused_together_do_not_retry_together():
    delays = {dict(status.abort_status(EXAMPLES["QueueFull"]).trailers)["grpc-retry-pushback-ms"] for _ in range(100)}
    assert len(delays) > 50 and max(map(int, delays)) - min(map(int, delays)) > 1000


def test_a_job_that_takes_too_long_by_itself_is_not_retried():
    aborted = status.abort_status(errors.DeadlineUnattainable(wait_s=1, run_s=20, left_s=10.5))
    assert aborted.message == (
        "the job would need at least 21.0 s: 1.00 s until its turn, 20.0 s for its iterations; "
        "the call ends in 10.5 s; allow more time, set a time_budget, or ask for fewer iterations or a smaller size"
    )
    trailers = dict(aborted.trailers)
    assert trailers["grpc-retry-pushback-ms"] == "-1"
    sent = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert not any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in sent.details)


def test_every_reason_is_used():
    reasons = [reason for _, reason in status.CODES.values()]
    assert set(reasons) == set(pb.ErrorReason.values()) - {pb.ERROR_REASON_UNSPECIFIED}
    shared = [reason for reason in reasons if reasons.count(reason) > 1]
    assert shared == [pb.ERROR_REASON_OUT_OF_MEMORY] * 2  # of the device and of the host: the client reacts alike


async def test_an_unexpected_exception_is_not_disclosed(caplog):
    async with serving(FakeEngine(fails_at=1, error=ZeroDivisionError("secret"))) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=spec())))
    assert got.code is grpc.StatusCode.INTERNAL
    assert got.message == "the server failed while working on this job; its log has the details"
    assert not any("secret" in str(value) for value in got.trailers.values())
    assert "secret" in caplog.text


class Unencodable(FakeEngine):
    """An engine whose pictures cannot be read back."""

    def batch(self, shape, slots):
        batch = super().batch(shape, slots)

        def wait():
            raise torch.OutOfMemoryError("secret")

        batch.snapshot = lambda slot: wait
        return batch


@pytest.mark.parametrize("place", ["decoding", "encoding"])
async def test_running_out_of_host_memory_has_its_own_reason(place, monkeypatch, caplog):
    async def cannot(*_):
        raise MemoryError("secret")

    if place == "decoding":
        monkeypatch.setattr(Admission, "prepare", cannot)
    async with serving(Unencodable() if place == "encoding" else FakeEngine()) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=spec())))
        assert s.scheduler.queued == 0
    assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY")
    assert (
        got.message
        == "the server ran out of memory while it worked on this; ask for a smaller size, or retry after about 5 s"
    )
    assert "secret" in caplog.text


async def test_an_internal_cancellation_never_hangs_a_client(monkeypatch, caplog):
    async def cancelled(*_):
        raise asyncio.CancelledError

    monkeypatch.setattr(Admission, "prepare", cancelled)
    async with serving(FakeEngine()) as s:
        for call in (
            s.stub.Stylize(pb.StylizeRequest(spec=spec())),
            s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec())),
        ):
            assert (await refused(call)).code is grpc.StatusCode.INTERNAL
        assert s.scheduler.queued == 0
