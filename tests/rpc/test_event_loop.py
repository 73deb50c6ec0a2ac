"""The server's event loop takes all events of gRPC's poller at once, and handles a few of them in each turn."""

import asyncio
import collections
import contextlib
import functools
import socket
import time

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from gramophone_server.rpc.event_loop import MAX_EVENTS, MIN_EVENTS, ServerEventLoop, call_after_events, events_handled
from tests.support.clock import WITHIN_S

BYTES = 200  # fewer than fit into a socket


class PollerCompletionQueue:
    """Reads one byte per turn and completes the futures of all events, as gRPC's class of this name does."""

    def __init__(self, wakeups, events=()):
        self.wakeups, self.turns, self.events = wakeups, 0, list(events)

    def handle_events(self, loop):
        with contextlib.suppress(BlockingIOError):
            self.wakeups.recv(1)
        self.turns += 1
        while self.events:
            self.events.pop(0).set_result(None)


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
        assert loop.run_until_complete(asyncio.wait_for(read, WITHIN_S)) == b"all of it"
        loop.remove_reader(ours)


async def handle_crowd(loop, number, handle, during=None):
    """Handles so many events, which arrive at the same time, each by a task; awaits `during` as soon as they are there.
    Returns (event, turn of the loop) of each."""
    handled, turn = [], 0

    def next_turn():
        nonlocal turn
        turn += 1
        loop.call_soon(next_turn)

    async def one(event, arrival):
        await arrival
        handle(event)
        handled.append((event, turn))

    next_turn()
    arrivals = [loop.create_future() for _ in range(number)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        tasks = [asyncio.create_task(one(*numbered)) for numbered in enumerate(arrivals)]
        await asyncio.sleep(0)
        loop.add_reader(ours, functools.partial(PollerCompletionQueue(ours, arrivals).handle_events, loop))
        theirs.send(b"1")
        if during is not None:
            await during()
        await asyncio.gather(*tasks)
        loop.remove_reader(ours)
    return handled


def test_a_crowd_of_events_is_handled_a_few_in_each_turn_and_in_order(loop):
    """500 clients that leave together, with four calls each, stopped the loop for 540 ms."""
    handled = loop.run_until_complete(handle_crowd(loop, 1000, lambda _: None))
    assert [event for event, _ in handled] == list(range(1000))
    assert max(collections.Counter(turn for _, turn in handled).values()) <= MAX_EVENTS


def test_dear_events_are_fewer_in_a_turn(loop):
    handled = loop.run_until_complete(handle_crowd(loop, 100, lambda _: time.sleep(0.002)))
    assert list(collections.Counter(turn for _, turn in handled).values())[-5:-1] == [MIN_EVENTS] * 4


def test_a_callback_after_the_events_comes_after_all_that_have_arrived(loop):
    order = []

    async def during():
        call_after_events(lambda: order.append("callback"))
        await events_handled()
        order.append("awaited")

    loop.run_until_complete(handle_crowd(loop, 100, order.append, during))
    assert order == [*range(100), "callback", "awaited"]


async def test_without_the_servers_loop_a_callback_comes_after_the_events_of_the_next_turn():
    await events_handled()


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
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        await server.stop(0)
        return answer.status

    with asyncio.Runner(loop_factory=RecordingLoop) as runner:
        callbacks = runner.get_loop().callbacks
        assert runner.run(check()) == health_pb2.HealthCheckResponse.SERVING
    assert [type(callback.args[1].func.__self__).__name__ for callback in callbacks if hasattr(callback, "args")] == [
        "PollerCompletionQueue"
    ]
