"""What is sent with every call, and the log of the calls."""

import logging

import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

from gramophone_client import AsyncGramophoneClient, GramophoneClient
from gramophone_server import errors as server_errors
from tests.support.fake_service import LOST, PAINTING, PHOTO, accepted, checkpoint, refused, result
from tests.support.updates import collected

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OWN = {"authorization": "Bearer t0ken"}  # of the client
CALLS = {"CancelJob", "GetJob", "GetServerInfo", "ListJobs", "Stylize", "StylizeInteractive", "StylizeStream"}
CALLS |= {"UploadImage", "Watch", "WatchJob"}  # `Watch` is that of the health service


def check(service, expected):
    """Every call was made, each with the expected metadata."""
    assert {name for name, _ in service.metadata} == CALLS
    for name, metadata in service.metadata:
        assert expected.items() <= set(metadata), name


async def test_metadata_is_sent_with_every_call(service):
    service.set_health(HealthCheckResponse.SERVING)
    more = {"metadata": {"traceparent": TRACE, "raw-bin": b"\x00\xff"}}
    async with AsyncGramophoneClient(service.target, metadata=OWN) as client:
        await client.wait_until_ready(5, **more)
        await client.server_info(**more)
        image = await client.upload(PAINTING, **more)
        await client.stylize(PHOTO, image, **more)
        await collected(client.stream(PHOTO, image, **more))
        await collected(client.watch("j1", **more))
        async with client.control(PHOTO, image, **more) as job:
            await job.result()
        async with client.control_job("j1", **more) as job:
            await job.result()
        await client.get_job("j1", **more)
        await client.list_jobs(**more)
        await client.cancel_job("j1", **more)
        check(service, OWN | more["metadata"])
        service.metadata.clear()
        await client.get_job("j1")
        ((_, plain),) = service.metadata
        assert OWN.items() <= set(plain) and "traceparent" not in dict(plain)


def test_metadata_is_sent_with_every_synchronous_call(service):
    service.set_health(HealthCheckResponse.SERVING)
    more = {"metadata": [("traceparent", TRACE)]}
    with GramophoneClient(service.target, metadata=OWN) as client:
        client.wait_until_ready(5, **more)
        client.server_info(**more)
        image = client.upload(PAINTING, **more)
        client.stylize(PHOTO, image, **more)
        list(client.stream(PHOTO, image, **more))
        list(client.watch("j1", **more))
        with client.control(PHOTO, image, **more) as job:
            job.result()
        with client.control_job("j1", **more) as job:
            job.result()
        client.get_job("j1", **more)
        client.list_jobs(**more)
        client.cancel_job("j1", **more)
        check(service, OWN | {"traceparent": TRACE})


@pytest.mark.usefixtures("short_pauses")
async def test_metadata_is_sent_again_after_a_loss(service):
    gone = refused(server_errors.JobNotFound("j1"))
    service.scripts = [[accepted(), checkpoint(2), LOST], [gone], [accepted(resumed_at=2), result()]]
    async with AsyncGramophoneClient(service.target, metadata=OWN) as client:
        image = await client.upload(PAINTING)
        service.images.clear()  # so that it is uploaded again as well
        await collected(client.stream(PHOTO, image, detach_grace=5, metadata={"traceparent": TRACE}))
    names = [name for name, _ in service.metadata]
    assert {"StylizeStream", "WatchJob", "UploadImage"} == set(names) and names.count("StylizeStream") > 2
    assert all(OWN.items() <= set(metadata) for _, metadata in service.metadata)
    assert all(("traceparent", TRACE) in metadata for _, metadata in service.metadata[1:])


async def test_a_key_may_have_several_values_and_a_calls_replace_the_clients(service):
    async with AsyncGramophoneClient(service.target, metadata=[("tag", "a"), ("tag", "b"), ("x", "y")]) as client:
        await client.get_job("j1")
        await client.get_job("j1", metadata=[("tag", "c"), ("tag", "d")])
        await client.get_job("j1", metadata={})
    found = [[pair for pair in metadata if pair[0] in ("tag", "x")] for _, metadata in service.metadata]
    first = [("tag", "a"), ("tag", "b"), ("x", "y")]
    assert found == [first, [("x", "y"), ("tag", "c"), ("tag", "d")], first]


async def test_calls_are_logged_without_their_contents(client, service, caplog):
    caplog.set_level(logging.DEBUG, "gramophone_client")
    await client.stylize(PHOTO, PAINTING, timeout=20, metadata={"authorization": "Bearer t0ken"})
    await client.get_job("j1")  # has a timeout of its own
    assert [record.getMessage() for record in caplog.records] == [
        f"Stylize of {service.target}, within 20.0 s",
        f"GetJob of {service.target}, within 10.0 s",
    ]
