"""The server's event loop handles all events of gRPC's poller in one turn."""

import asyncio
import contextlib
import functools
import socket

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from gramophone_server.rpc.event_loop import ServerEventLoop

BYTES = 200  # fewer than fit into a socket


class PollerCompletionQueue:
    """Reads one byte per turn, as gRPC's class of this name does."""

    def __init__(self, wakeups):
        self.wakeups, self.turns = wakeups, 0

    def handle_events(self, loop):
        with contextlib.suppress(BlockingIOError):
            self.wakeups.recv(1)
        self.turns += 1


@pytest.fixture
def loop():
    loop = ServerEventLoop()
    yield loop
    loop.close()


def turns_for_bytes(loop, add_reader):
    """How often the handler runs for `BYTES` bytes that are there at the same time."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        queue = PollerCompletionQueue(ours)
        for _ in range(BYTES):
            theirs.send(b"1")
        add_reader(ours, functools.partial(queue.handle_events, loop))
        loop.run_until_complete(asyncio.sleep(0.01))
        while not queue.turns:
            loop.run_until_complete(asyncio.sleep(0.01))
        loop.remove_reader(ours)
        theirs.setblocking(False)
        for _ in range(BYTES):  # there is room for the next events
            theirs.send(b"1")
        return queue.turns


def test_all_events_take_one_turn(loop):
    assert turns_for_bytes(loop, loop.add_reader) == 1


def test_other_readers_are_left_alone(loop):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"all of it")
        read = loop.create_future()
        loop.add_reader(ours, lambda: read.done() or read.set_result(ours.recv(100)))
        assert loop.run_until_complete(asyncio.wait_for(read, 5)) == b"all of it"
        loop.remove_reader(ours)


class Readers(asyncio.SelectorEventLoop):
    """Keeps what it is asked to watch."""

    def __init__(self):
        self.callbacks = []
        super().__init__()

    def add_reader(self, fd, callback, *args):
        self.callbacks.append(callback)
        super().add_reader(fd, callback, *args)


class RecordingLoop(ServerEventLoop, Readers):
    """The server's loop, and how it watches."""


def test_the_poller_of_this_version_of_grpc_is_recognised():
    """If this fails after an update of grpcio: read in its aio/completion_queue.pyx.pxi whether one byte per turn is
    still all that it reads."""

    async def check():
        server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        await server.stop(0)
        return answer.status

    with asyncio.Runner(loop_factory=RecordingLoop) as runner:
        callbacks = runner.get_loop().callbacks
        assert runner.run(check()) == health_pb2.HealthCheckResponse.SERVING
    assert [type(callback.args[1].func.__self__).__name__ for callback in callbacks if hasattr(callback, "args")] == [
        "PollerCompletionQueue"
    ]
