"""gRPC's options: gRPC ignores names that it does not know, so all must be known. Clients may ping as promised."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import re
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc

from gramophone_client.transport.channel import channel_options
from gramophone_server import main
from gramophone_server.config import Limits
from tests.support.clock import WITHIN_S
from tests.support.processes import ROOT

LIBRARY = Path(cygrpc.__file__).read_bytes()
FOLDERS = ("server", "client", "tests", "benchmarks", "deploy", "examples", "tools")
UNKNOWN = "grpc.http2.min_recv_ping_interval_without_data_ms"  # after the constant's name in gRPC's C++ code

# HTTP/2, RFC 9113: the preface of a connection, and the types of frames. A ping has the length 8.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
ACK = 1  # the flag of an answer to a ping or to settings
PING_EVERY_S = 10.0  # what the server promises
PINGS = 6  # the server forgives two that come too early
MIN_INTERVAL = "grpc.http2.min_ping_interval_without_data_ms"
FASTER = 50  # by this factor a test's pings, and the interval that its server demands, are shorter than real ones


def is_known(option: str) -> bool:
    """Whether the compiled part of grpcio contains the option as a string of C."""
    return option.encode() + b"\0" in LIBRARY


def options_in(path: Path) -> Iterator[str]:
    """The names in pairs like `("grpc.so_reuseport", 0)`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.elts[0], ast.Constant):
            name = node.elts[0].value
            if isinstance(name, str) and name.startswith("grpc."):
                yield name


def test_grpc_knows_every_option_that_is_set() -> None:
    used = {name: path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") for name in options_in(path)}
    assert {"grpc.so_reuseport", "grpc.http2.bdp_probe", "grpc.enable_retries"} <= used.keys()
    unknown = {name: str(path.relative_to(ROOT)) for name, path in used.items() if not is_known(name)}
    assert not unknown
    assert not is_known(UNKNOWN)


def test_node_knows_every_option_that_its_client_sets() -> None:
    known = ROOT / "examples/node/node_modules/@grpc/grpc-js/build/src/channel-options.js"
    if not known.exists():
        pytest.skip("the packages of Node.js are not installed: make other-clients")
    used = re.findall(r"'(grpc\.[\w.]+)':", (ROOT / "examples/node/stylize.mjs").read_text())
    assert used and [name for name in used if f"'{name}'" not in known.read_text()] == []


@contextlib.asynccontextmanager
async def server_with_interval_shorter_by(factor: int) -> AsyncIterator[int]:
    """The port of a server with our options, in which the shortest interval between pings is divided by `factor`."""
    options = dict(main.server_options(Limits()))
    options[MIN_INTERVAL] //= factor
    server = grpc.aio.server(options=list(options.items()))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def answer_to_pings(port: int, every_s: float) -> bytes:
    """Sends `PINGS` pings on a connection without calls. Returns the server's reason to end it; empty if it stands."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(PREFACE + frame(SETTINGS, b""))
        for number in range(PINGS):
            ping = struct.pack(">Q", number)
            writer.write(frame(PING, ping))
            async with asyncio.timeout(WITHIN_S):
                while (received := await next_frame(reader)) != (PING, ping):
                    if received[0] == GOAWAY:
                        return received[1][8:]  # after the last stream and the error code
            await asyncio.sleep(every_s)
        return b""
    finally:
        await close(writer)


async def close(writer: asyncio.StreamWriter) -> None:
    """Closes a connection, which its other end may have closed."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def frame(kind: int, payload: bytes, flags: int = 0) -> bytes:
    """A frame of the connection itself: stream 0."""
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, 0) + payload


async def next_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The type and the payload of the next frame."""
    length_and_kind, _, _ = struct.unpack(">IBI", await reader.readexactly(9))
    return length_and_kind & 255, await reader.readexactly(length_and_kind >> 8)


async def test_clients_may_ping_every_ten_seconds() -> None:
    async with server_with_interval_shorter_by(FASTER) as port:
        assert await answer_to_pings(port, PING_EVERY_S / FASTER) == b""


async def test_clients_may_not_ping_far_more_often() -> None:
    async with server_with_interval_shorter_by(1) as port:
        assert await answer_to_pings(port, PING_EVERY_S / FASTER) == b"too_many_pings"


async def test_the_client_pings_all_the_time_during_a_silent_call() -> None:
    """Otherwise it would not notice a dead server as soon as it promises."""
    ended = asyncio.Event()

    async def silent_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(PREFACE))
        writer.write(frame(SETTINGS, b""))
        pings = 0
        while pings < 4:  # by default the fourth would come after a minute
            kind, payload = await next_frame(reader)
            if kind == PING:
                writer.write(frame(PING, payload, ACK))
                pings += 1
            elif kind == SETTINGS and payload:
                writer.write(frame(SETTINGS, b"", ACK))
        server.close()  # before the connection, so that there is no other
        await close(writer)
        ended.set()

    server = await asyncio.start_server(silent_server, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    options = dict(channel_options(2**20)) | {"grpc.keepalive_time_ms": 1000}  # gRPC pings once a second at most
    async with grpc.aio.insecure_channel(f"{host}:{port}", list(options.items())) as channel:
        call = channel.unary_unary("/service/method")(b"")
        async with asyncio.timeout(15):
            await ended.wait()
        call.cancel()
