"""Whatever hundreds of connections send, a server's memory stays below its bound, and others are served."""

import asyncio
import contextlib
import os

import grpc
import pytest
from grpc_health.v1 import health_pb2

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_server import command_line
from gramophone_server.memory_bound import memory_terms
from tests.support.processes import Server
from tests.support.raw_http2 import StreamOver, connect, prefixed
from tests.support.specs import spec

PATH = "/gramophone.v1.StyleTransferService/"
MIB = 2**20
CONNECTIONS = 200
FLAGS = (
    *(
        "--engine",
        "fake",
        "--iter-ms",
        "1",
        "--max-message-bytes",
        f"{5 * MIB}",
        "--max-receiving-bytes",
        f"{20 * MIB}",
    ),
    *("--max-image-bytes", f"{8 * MIB}", "--max-checkpoint-bytes", f"{8 * MIB}", "--max-uploads-bytes", f"{8 * MIB}"),
    *("--max-connections", "256", "--max-calls", "400", "--max-idle-s", "3"),
)


def bytes_that_may_arrive():
    """The parts of the bound that these clients can fill."""
    settings, _ = command_line.load(list(FLAGS), {})
    names = {"connections", "calls", "receiving", "small messages", "commands", "uploads"}
    return sum(term.bytes for term in memory_terms(settings) if term.name in names)


def resident_bytes(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def send_as_allowed(stream, data, seconds=6.0):
    """Sends as much as the server takes in this time."""
    with contextlib.suppress(StreamOver, TimeoutError):
        async with asyncio.timeout(seconds):
            await stream.send(data)


async def unfinished(raw):
    """A message whose last byte never comes."""
    await send_as_allowed(raw.open_stream(PATH + "Stylize"), prefixed(bytes(5 * MIB - 1), length=5 * MIB))


async def pausing(raw):
    chunk = prefixed(pb.UploadImageRequest(chunk=os.urandom(MIB)).SerializeToString())
    await send_as_allowed(raw.open_stream(PATH + "UploadImage"), chunk * 7)


async def silent(raw):
    for method in ("Stylize", "GetJob", "WatchJob", "StylizeInteractive"):
        raw.open_stream(PATH + method)
    await asyncio.sleep(6)


async def nothing(raw):
    await asyncio.sleep(6)


async def one_byte_at_a_time(raw):
    stream = raw.open_stream(PATH + "Stylize")
    with contextlib.suppress(StreamOver):
        for byte in prefixed(bytes(100), length=5 * MIB):
            stream.send_now(bytes([byte]))
            await asyncio.sleep(0.06)


async def headers(raw):
    with contextlib.suppress(StreamOver):
        for i in range(15):
            raw.open_stream(PATH + "GetJob", [("x", f"{i}" * 1500)])
            await asyncio.sleep(0.3)


async def refused_and_still_sending(raw):
    for _ in range(20):
        await send_as_allowed(raw.open_stream(PATH + "GetJob"), prefixed(bytes(5 * MIB)), seconds=0.3)


async def resets(raw):
    with contextlib.suppress(StreamOver):
        for _ in range(100):
            stream = raw.open_stream(PATH + "Stylize")
            stream.send_now(prefixed(bytes(1000), length=5 * MIB))
            stream.cancel()
            await asyncio.sleep(0.05)


KINDS = (unfinished, pausing, silent, nothing, one_byte_at_a_time, headers, refused_and_still_sending, resets)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_hundreds_of_connections_stay_below_the_bound(kind, tmp_path):
    with Server(*FLAGS, cwd=tmp_path) as server:
        before, peak = resident_bytes(server.pid), 0
        raws = [await connect(server.address) for _ in range(CONNECTIONS)]
        hostile = asyncio.gather(*(kind(raw) for raw in raws), return_exceptions=True)
        served = 0
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = pb_grpc.StyleTransferServiceStub(channel)
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            while not hostile.done():
                await check(health_pb2.HealthCheckRequest().SerializeToString(), timeout=10)
                if kind is not resets:  # gRPC itself refuses calls while more than `max_calls` wait for a handler
                    await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)
                    await stub.Stylize(pb.StylizeRequest(spec=spec()), timeout=15)
                served += 1
                peak = max(peak, resident_bytes(server.pid))
                await asyncio.sleep(0.05)
        for raw in raws:
            raw.abort()
        assert server.exit_code is None and served >= 2
        assert peak - before < bytes_that_may_arrive()
        assert "Traceback" not in server.read_output()
