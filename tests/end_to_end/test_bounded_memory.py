"""Whatever hundreds of connections send, a server's memory stays below its bound, and others are served."""

import asyncio
import contextlib
import itertools
import os

import grpc
import pytest
from grpc_health.v1 import health_pb2

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_server import command_line
from gramophone_server.memory_bound import memory_terms
from tests.support.processes import WITHIN_S, Server
from tests.support.raw_http2 import StreamOver, connect, prefixed
from tests.support.specs import spec

PATH = "/gramophone.v1.StyleTransferService/"
MIB = 2**20
CONNECTIONS = 200
TURN_S = 2.0  # at least; refused clients would otherwise be back at once, and only the processor would be tested
ROUNDS = 3  # of another client's calls, which succeed during each attack, however long they take
FLAGS = (
    *("--engine", "fake", "--iter-ms", "1"),
    *("--max-message-bytes", f"{5 * MIB}", "--max-receiving-bytes", f"{20 * MIB}"),
    *("--max-image-bytes", f"{8 * MIB}", "--max-checkpoint-bytes", f"{8 * MIB}", "--max-uploads-bytes", f"{8 * MIB}"),
    *("--max-connections", "256", "--max-calls", "400", "--max-idle-s", "2"),
)
# All hostile clients send the same bytes, so that this process does not need gigabytes for them.
UNFINISHED = prefixed(bytes(5 * MIB - 1), length=5 * MIB)
TOO_LARGE = prefixed(bytes(5 * MIB))
CHUNK = prefixed(pb.UploadImageRequest(chunk=os.urandom(MIB)).SerializeToString())


def bytes_that_may_arrive():
    """The parts of the bound that these clients can fill."""
    settings, _ = command_line.load(list(FLAGS), {})
    names = {"connections", "calls", "receiving", "small messages", "commands", "uploads"}
    return sum(term.bytes for term in memory_terms(settings) if term.name in names)


def resident_bytes(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# One turn of a hostile client. It ends early if the server closes the connection.


async def send_as_allowed(stream, data, seconds=3.0):
    """Sends as much as the server takes in this time. Raises `StreamOver`, or TimeoutError if that is not all."""
    async with asyncio.timeout(seconds):
        await stream.send(data)


async def unfinished(raw):
    """A message whose last byte never comes."""
    stream = raw.open_stream(PATH + "Stylize")
    await send_as_allowed(stream, UNFINISHED)
    await stream.answer(within_s=3)


async def pausing(raw):
    stream = raw.open_stream(PATH + "UploadImage")
    for _ in range(7):
        await send_as_allowed(stream, CHUNK)
    await stream.answer(within_s=3)


async def silent(raw):
    for method in ("Stylize", "GetJob", "WatchJob", "StylizeInteractive"):
        stream = raw.open_stream(PATH + method)
    await stream.answer(within_s=3)


async def nothing(raw):
    async with asyncio.timeout(3):
        await raw.closed.wait()


async def one_byte_at_a_time(raw):
    stream = raw.open_stream(PATH + "Stylize")
    for byte in prefixed(bytes(30), length=5 * MIB):
        stream.send_now(bytes([byte]))
        await asyncio.sleep(0.06)


async def headers(raw):
    for i in range(15):
        raw.open_stream(PATH + "GetJob", [("x", f"{i}" * 1500)])
        await asyncio.sleep(0.2)


async def refused_and_still_sending(raw):
    for _ in range(5):
        with contextlib.suppress(TimeoutError, StreamOver):
            await send_as_allowed(raw.open_stream(PATH + "GetJob"), TOO_LARGE, seconds=0.3)


async def resets(raw):
    for _ in range(30):
        stream = raw.open_stream(PATH + "Stylize")
        stream.send_now(prefixed(bytes(1000), length=5 * MIB))
        stream.cancel()
        await asyncio.sleep(0.05)


KINDS = (unfinished, pausing, silent, nothing, one_byte_at_a_time, headers, refused_and_still_sending, resets)


class Attack:
    """The same kind of hostile client on many connections, one turn after another, until the block ends."""

    def __init__(self, kind, address):
        self._kind, self._address = kind, address
        self._first_turn_over = [asyncio.Event() for _ in range(CONNECTIONS)]

    async def __aenter__(self):
        self._clients = [asyncio.create_task(self._play(event)) for event in self._first_turn_over]
        return self

    async def __aexit__(self, *_):
        for client in self._clients:
            client.cancel()
        ended = await asyncio.gather(*self._clients, return_exceptions=True)
        assert all(isinstance(error, asyncio.CancelledError) for error in ended), ended

    @property
    def has_had_its_effect(self):
        """Whether each client has had a turn."""
        return all(event.is_set() for event in self._first_turn_over)

    async def _play(self, first_turn_over):
        while True:
            with contextlib.suppress(StreamOver, TimeoutError, OSError):
                raw = await connect(self._address)
                try:
                    while not raw.is_closed:
                        await asyncio.gather(self._kind(raw), asyncio.sleep(TURN_S))
                        first_turn_over.set()
                finally:
                    raw.abort()
            first_turn_over.set()
            await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(*FLAGS, cwd=tmp_path_factory.mktemp("server")) as server:
        server.line("ready in ")
        server.resident_bytes_idle = resident_bytes(server.pid)
        yield server


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_hundreds_of_connections_stay_below_the_bound(kind, server):
    """All kinds attack one server, one after another: what it keeps of one counts for the next."""
    peak = 0
    async with grpc.aio.insecure_channel(server.address) as channel, Attack(kind, server.address) as attack:
        stub = pb_grpc.StyleTransferServiceStub(channel)
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        for served in itertools.count(1):
            await check(health_pb2.HealthCheckRequest().SerializeToString(), timeout=WITHIN_S)
            if kind is not resets:  # gRPC itself refuses calls while more than `max_calls` wait for a handler
                await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WITHIN_S)
                await stub.Stylize(pb.StylizeRequest(spec=spec()), timeout=WITHIN_S)
            peak = max(peak, resident_bytes(server.pid))
            if served >= ROUNDS and attack.has_had_its_effect:
                break
            await asyncio.sleep(0.05)
    assert server.exit_code is None
    assert peak - server.resident_bytes_idle < bytes_that_may_arrive()
    assert "Traceback" not in server.read_output()
