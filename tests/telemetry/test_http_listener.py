"""Connections to the port of the probes: silent, slow, half-closed, huge, many."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from gramophone_server.telemetry import http_listener
from gramophone_server.telemetry.http_listener import MAX_CONNECTIONS, MAX_REQUEST_BYTES, Answer, HttpListener
from tests.support.clock import ManualClock, until

LARGE = b"x" * 20_000_000  # more than the buffers of a connection
BODIES = {"/large": LARGE}


def answer(request):
    if request.path == "/defect":
        raise ValueError("a defect")
    return Answer(
        "200 OK", [("X-Asked", request.headers.get("x-asked", ""))], {"/large": LARGE}.get(request.path, b"ok")
    )


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def listener(clock):
    started = HttpListener(socket.AF_INET, ("127.0.0.1", 0), answer, clock=clock)
    started.start()
    yield started
    started.close()


@pytest.fixture
def connect(listener):
    """Opens connections, which end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection(("127.0.0.1", listener.port), 60))


def got(listener, path="/", headers=None):
    """(status, body) of a page."""
    connection = http.client.HTTPConnection("127.0.0.1", listener.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()


def received(connection):
    """All bytes until the end of the connection."""
    parts = []
    while part := connection.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def test_a_request_is_answered_and_its_connection_ends(connect):
    connection = connect()
    connection.sendall(b"GET /?query HTTP/1.1\r\nX-Asked: yes\r\n\r\n")
    head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [b"HTTP/1.1 200 OK", b"X-Asked: yes", b"Content-Length: 2", b"Connection: close"]
    assert body == b"ok"


def test_a_request_in_single_bytes_and_with_bare_newlines_is_answered(connect):
    connection = connect()
    for byte in b"GET / HTTP/1.0\n\n":
        connection.sendall(bytes([byte]))
    assert received(connection).endswith(b"\r\n\r\nok")


def test_head_has_no_body(connect):
    connection = connect()
    connection.sendall(b"HEAD / HTTP/1.1\r\n\r\n")
    assert received(connection).endswith(b"Connection: close\r\n\r\n")


def test_a_large_answer_arrives_whole(listener):
    assert got(listener, "/large") == (200, LARGE)


@pytest.mark.parametrize(
    "garbage", [b"\r\n\r\n", b"\x16\x03\x01\x02\x00\n\n", b"GET /\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
def test_garbage_is_refused(listener, connect, garbage):
    connection = connect()
    connection.sendall(garbage)
    assert connection.recv(100).startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert got(listener)[0] == 200


def test_headers_are_bounded(listener, connect):
    connection = connect()
    with contextlib.suppress(ConnectionError):  # it may end before all has been sent
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"y" * (2 * MAX_REQUEST_BYTES))
        assert received(connection).startswith(b"HTTP/1.1 431 ")
    assert got(listener)[0] == 200


async def test_a_client_that_ends_its_half_without_a_request_is_disconnected(listener, connect):
    connection = connect()
    connection.sendall(b"GET / HT")
    connection.shutdown(socket.SHUT_WR)
    assert received(connection) == b""
    await until(lambda: listener.connections == 0)


async def test_a_silent_client_is_disconnected(listener, connect, clock):
    connection = connect()
    await until(lambda: listener.connections == 1)
    clock.advance(http_listener.REQUEST_TIMEOUT_S + 0.1)
    assert received(connection) == b""


async def test_a_client_that_sends_single_bytes_is_disconnected_too(listener, connect, clock):
    dripping = connect()
    await until(lambda: listener.connections == 1)

    def disconnected():
        dripping.sendall(b"G")
        clock.advance(http_listener.REQUEST_TIMEOUT_S / 10)
        with contextlib.suppress(TimeoutError):
            return dripping.recv(1) == b""

    dripping.settimeout(0.02)
    with contextlib.suppress(ConnectionError):
        await until(disconnected)


async def test_a_client_that_does_not_read_is_disconnected(listener, connect, clock):
    connection = connect()
    connection.sendall(b"GET /large HTTP/1.1\r\n\r\n")
    await until(lambda: listener.connections == 1)
    clock.advance(http_listener.REQUEST_TIMEOUT_S + 0.1)
    await until(lambda: listener.connections == 0)


def test_silent_clients_make_room_at_once(listener, connect):
    """Without a time in which they may hold their place: the clock of this test stands still."""
    silent = [connect() for _ in range(MAX_CONNECTIONS + 50)]
    assert got(listener)[0] == 200
    assert listener.connections <= MAX_CONNECTIONS
    for connection in silent[:50]:
        assert received(connection) == b""  # the oldest
    silent[-1].sendall(b"GET / HTTP/1.1\r\n\r\n")  # the newest still has its place
    assert received(silent[-1]).endswith(b"ok")


async def test_clients_that_do_not_read_make_room_after_the_silent_ones(listener, connect):
    silent = connect()
    stopped = [connect() for _ in range(MAX_CONNECTIONS)]
    for connection in stopped:
        connection.sendall(b"GET /large HTTP/1.1\r\n\r\n")
    assert received(silent) == b""
    assert got(listener)[0] == 200
    assert listener.connections <= MAX_CONNECTIONS


def test_requests_are_answered_during_a_flood_of_silent_connections(listener):
    stop, opened = threading.Event(), []

    def flood():
        while not stop.is_set():
            with contextlib.suppress(OSError):
                opened.append(socket.create_connection(("127.0.0.1", listener.port), 2))
            if len(opened) > 500:
                opened.pop(0).close()

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        assert [got(listener)[0] for _ in range(100)] == [200] * 100
    finally:
        stop.set()
        flooding.join()
        for connection in opened:
            connection.close()


def test_a_defect_is_a_500_and_the_next_request_is_answered(listener, caplog):
    assert got(listener, "/defect")[0] == 500
    assert [record.message for record in caplog.records] == ["/defect cannot be answered"]
    assert got(listener)[0] == 200


# Uses up all descriptors, then reports the CPU seconds since then.
WITHOUT_DESCRIPTORS = """
import os, resource, socket, sys, time
from gramophone_server.telemetry.http_listener import Answer, HttpListener
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
listener = HttpListener(socket.AF_INET, ("127.0.0.1", 0), lambda request: Answer("200 OK", [], b"ok"))
listener.start()
print(listener.port, flush=True)
try:
    while True:
        os.dup(0)
except OSError:
    print("used up", flush=True)
began = time.process_time()
sys.stdin.readline()
print(time.process_time() - began, flush=True)
"""


def test_a_process_without_descriptors_answers_and_does_not_spin():
    child = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_DESCRIPTORS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with child:
        try:
            port = int(child.stdout.readline())
            child.stdout.readline()
            with contextlib.ExitStack() as stack:
                for _ in range(20):  # silent
                    stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
                for pause_s in (0.0, 0.2):  # between the connection and its request
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                    connection.connect()
                    time.sleep(pause_s)
                    connection.request("GET", "/livez")
                    assert connection.getresponse().read() == b"ok"
                    connection.close()
                waited_from = time.monotonic()
                while time.monotonic() - waited_from < 1.0:
                    time.sleep(0.05)
                child.stdin.write("\n")
                child.stdin.flush()
                assert float(child.stdout.readline()) < 0.5 * (time.monotonic() - waited_from)
        finally:
            child.kill()
