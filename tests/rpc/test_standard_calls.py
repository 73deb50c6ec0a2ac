"""Health checks and reflection: the limits of their calls and messages, apart from those of the service."""

import asyncio
import contextlib
import gzip

import grpc
import pytest
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from gramophone_server import main
from gramophone_server.config import Limits
from gramophone_server.rpc import registration
from gramophone_server.rpc.receiving import Receiver
from gramophone_server.rpc.standard_calls import MAX_PER_CONNECTION, StandardCalls
from tests.support.clock import until
from tests.support.raw_http2 import connection, prefixed

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
GZIP = [("grpc-encoding", "gzip")]


@contextlib.asynccontextmanager
async def serving(max_idle_s=20, max_calls=100):
    """A server of health checks and reflection alone; gives its address and the calls of health checks."""
    limits = Limits(max_idle_s=max_idle_s)
    server, receiver = grpc.aio.server(options=main.server_options(limits)), Receiver(limits)
    checks = StandardCalls(receiver, receiver.probes, max_calls, "health checks")
    registration.add_health(health.aio.HealthServicer(), checks, server)
    registration.add_reflection(StandardCalls(receiver, receiver.small, 10, "calls of reflection"), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", checks
    finally:
        await server.stop(0)
        receiver.close()


async def answered(raw, path, data, headers=(), end=True):
    stream = raw.open_stream(path, headers)
    await stream.send(data, end=end)
    return await stream.answer(within_s=60)


async def test_a_check_is_answered_plain_and_compressed():
    request = health_pb2.HealthCheckRequest().SerializeToString()
    async with serving() as (address, checks), connection(address) as raw:
        plain = await answered(raw, CHECK, prefixed(request))
        compressed = await answered(raw, CHECK, prefixed(gzip.compress(request), compressed=True), GZIP)
        unknown = await answered(raw, CHECK, prefixed(health_pb2.HealthCheckRequest(service="x").SerializeToString()))
        await until(lambda: not checks.places.taken)
    serving_now = health_pb2.HealthCheckResponse(status="SERVING")
    for answer in (plain, compressed):
        assert answer.code == "OK" and health_pb2.HealthCheckResponse.FromString(answer.messages[0]) == serving_now
    assert unknown.code == "NOT_FOUND"


async def test_a_watch_is_told_of_changes():
    async with serving() as (address, _), grpc.aio.insecure_channel(address) as channel:
        watch = channel.unary_stream(WATCH, response_deserializer=health_pb2.HealthCheckResponse.FromString)(b"")
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_reflection_answers_each_message():
    def wanted(**fields):
        return prefixed(reflection_pb2.ServerReflectionRequest(**fields).SerializeToString())

    async with serving() as (address, _), connection(address) as raw:
        messages = wanted(list_services="") + wanted(file_containing_symbol="grpc.health.v1.Health")
        answer = await answered(raw, REFLECTION, messages)
    assert answer.code == "OK" and len(answer.messages) == 2
    names, files = map(reflection_pb2.ServerReflectionResponse.FromString, answer.messages)
    assert "grpc.health.v1.Health" in [service.name for service in names.list_services_response.service]
    assert files.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize("path", [CHECK, WATCH, REFLECTION])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (prefixed(b"\xff\xff"), "bytes that cannot be parsed as one"),
        (prefixed(b"\x0a\0" * 200_000), "must have at most 65536 bytes"),
        (prefixed(b"\x0a\0" * 30_000), "occurs more than 100 times"),
        (prefixed(gzip.compress(bytes(2**24)), compressed=True), "expands to more than 65536 bytes"),
    ],
    ids=["no message", "large", "many fields", "a bomb"],
)
async def test_bad_messages_are_refused(path, data, words, caplog):
    async with serving() as (address, _), connection(address) as raw:
        answer = await answered(raw, path, data, GZIP)
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST") and words in answer.message
    assert "Traceback" not in caplog.text


async def test_a_call_without_a_message_is_refused_or_ends():
    async with serving() as (address, _), connection(address) as raw:
        for path, code in ((CHECK, "INVALID_ARGUMENT"), (WATCH, "INVALID_ARGUMENT"), (REFLECTION, "OK")):
            assert (await raw.open_stream(path, end=True).answer(within_s=60)).code == code


@pytest.mark.parametrize("path", [CHECK, WATCH, REFLECTION])
async def test_a_message_that_does_not_come_ends_the_call(path):
    async with serving(max_idle_s=1) as (address, checks), connection(address) as raw:
        answer = await answered(raw, path, prefixed(b"", length=100), end=False)
        assert (answer.code, answer.reason) == ("ABORTED", "SLOW_SENDER")
        await until(lambda: not checks.places.taken)


async def test_calls_are_limited_by_connection_and_in_all():
    async with contextlib.AsyncExitStack() as stack:
        address, checks = await stack.enter_async_context(serving(max_calls=MAX_PER_CONNECTION + 2))
        first, second, third = [await stack.enter_async_context(connection(address)) for _ in range(3)]
        watches = [first.open_stream(WATCH) for _ in range(MAX_PER_CONNECTION)]
        for watch in watches:
            await watch.send(prefixed(b""), end=True)
        await until(lambda: checks.places.taken == MAX_PER_CONNECTION)
        refused = await answered(first, CHECK, prefixed(b""))
        assert refused.reason == "SERVER_BUSY" and "this connection has 64 health checks" in refused.message
        for _ in range(2):
            await second.open_stream(WATCH).send(prefixed(b""), end=True)
        await until(lambda: checks.places.taken == MAX_PER_CONNECTION + 2)
        refused = await answered(second, CHECK, prefixed(b""))
        assert refused.reason == "SERVER_BUSY" and "it has 66 health checks" in refused.message
        # The watches of others do not shut out the check of a connection that has none.
        assert (await answered(third, CHECK, prefixed(b""))).code == "OK"
        watches[0].cancel()
        await until(lambda: checks.places.taken == MAX_PER_CONNECTION + 1)
        assert (await answered(second, CHECK, prefixed(b""))).code == "OK"


async def test_checks_are_answered_beside_those_that_do_not_arrive():
    async with contextlib.AsyncExitStack() as stack:
        address, _ = await stack.enter_async_context(serving())
        for _ in range(20):
            raw = await stack.enter_async_context(connection(address))
            await raw.open_stream(CHECK).send(prefixed(b"", length=1000))
        raw = await stack.enter_async_context(connection(address))
        async with asyncio.timeout(15):
            for _ in range(5):
                assert (await answered(raw, CHECK, prefixed(b""))).code == "OK"


@pytest.mark.parametrize("path", [CHECK, WATCH, REFLECTION])
async def test_headers_are_bounded_before_a_client_has_acknowledged_the_settings(path):
    async with serving() as (address, checks), connection(address) as raw:
        raw.pause_reading()  # so they are not acknowledged
        stream = raw.open_stream(path, [(f"x-{i}", "y" * 1000) for i in range(20)])
        await stream.send(prefixed(b""), end=True)
        raw.resume_reading()
        answer = await stream.answer(within_s=10)
        assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
        assert "must have at most 16384 bytes of headers, got 20" in answer.message and checks.places.taken == 0


@pytest.mark.parametrize("path", [CHECK, REFLECTION])
async def test_no_thread_inflates_small_messages(path):
    """It would let health checks wait behind a flood of large compressed requests."""
    async with serving() as (address, checks), connection(address) as raw:
        checks.receiver.close()  # stops the thread
        answer = await answered(raw, path, prefixed(gzip.compress(b""), compressed=True), GZIP)
        assert answer.code == "OK"


async def test_a_check_whose_response_is_not_read_keeps_its_place():
    """As long as gRPC keeps the response."""
    async with serving() as (address, checks):
        async with connection(address, window=0) as raw:
            streams = [raw.open_stream(CHECK) for _ in range(MAX_PER_CONNECTION)]
            for stream in streams:
                await stream.send(prefixed(b""), end=True)
            await until(lambda: checks.places.taken == MAX_PER_CONNECTION)
            busy = await answered(raw, CHECK, prefixed(b""))
            assert (busy.code, busy.reason) == ("RESOURCE_EXHAUSTED", "SERVER_BUSY")
            async with connection(address) as other:
                assert (await answered(other, CHECK, prefixed(b""))).code == "OK"
                await until(lambda: checks.places.taken == MAX_PER_CONNECTION)  # the place of this check is free again
        await until(lambda: not checks.places.taken)
