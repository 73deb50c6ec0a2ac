"""Connections that the server ends."""

import asyncio
import contextlib
import resource
import socket
import urllib.parse

import pytest

from gramophone_server.rpc import connections
from gramophone_server.rpc.connections import close_connections, count_connections
from tests.support.clock import until

NOWHERE = "ipv4:127.0.0.1:9"  # no connection


@contextlib.contextmanager
def without_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(("family", "host"), [("ipv4", "127.0.0.1"), ("ipv6", "::1")])
async def test_the_connection_of_a_peer_is_closed_and_no_other(family, host):
    accepted = []
    try:
        server = await asyncio.start_server(lambda *both: accepted.append(both), host, 0)
    except OSError:
        pytest.skip(f"no {family} here")
    async with server:
        port = server.sockets[0].getsockname()[1]
        (reader, writer), (other_reader, other) = [await asyncio.open_connection(host, port) for _ in range(2)]
        own_port = writer.get_extra_info("sockname")[1]
        address = f"[{host}]" if family == "ipv6" else host
        peer = f"{family}:{urllib.parse.quote(address)}:{own_port}"  # as gRPC writes it: ipv6:%5B::1%5D:51234
        assert close_connections({NOWHERE, peer}) == {peer}
        assert await reader.read() == b""
        writer.close()
        other.write(b"x")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await other_reader.read()
        other.close()
        for _, end in accepted:
            end.close()


def test_a_peer_that_has_gone_is_no_error():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert not close_connections({f"ipv4:127.0.0.1:{listening.getsockname()[1]}", "unix:/tmp/socket"})
    assert not close_connections(())


async def test_several_are_closed_with_one_look_at_the_descriptors(monkeypatch):
    looks = []
    listdir = connections.os.listdir
    monkeypatch.setattr(connections.os, "listdir", lambda path: looks.append(path) or listdir(path))
    accepted = []
    async with await asyncio.start_server(lambda *both: accepted.append(both), "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        ends = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        names = [f"ipv4:127.0.0.1:{writer.get_extra_info('sockname')[1]}" for _, writer in ends]
        assert close_connections(names[:2]) == set(names[:2])
        assert [await reader.read() for reader, _ in ends[:2]] == [b"", b""]
        assert len(looks) == 1
        with without_descriptors():
            assert not close_connections(names[2:])
        assert close_connections(names[2:]) == set(names[2:])
        for _, writer in (*ends, *accepted):
            writer.close()


async def test_only_the_connections_to_the_port_of_the_server_are_counted():
    accepted = []
    async with (
        await asyncio.start_server(lambda *both: accepted.append(both), "127.0.0.1", 0) as one,
        await asyncio.start_server(lambda *both: accepted.append(both), "127.0.0.1", 0) as other,
    ):
        ports = [server.sockets[0].getsockname()[1] for server in (one, other)]
        assert [count_connections(port) for port in ports] == [0, 0]  # they listen
        writers = [(await asyncio.open_connection("127.0.0.1", port))[1] for port in (ports[0], ports[0], ports[1])]
        await until(lambda: len(accepted) == 3)
        assert [count_connections(port) for port in ports] == [2, 1]
        with without_descriptors():
            assert count_connections(ports[0]) is None
        assert [count_connections(port) for port in ports] == [2, 1]
        for writer in (*writers, *(writer for _, writer in accepted)):
            writer.close()
        await until(lambda: count_connections(ports[0]) == 0)
