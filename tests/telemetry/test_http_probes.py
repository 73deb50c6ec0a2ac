import contextlib
import http.client
import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gramophone_server.errors import StartupError
from gramophone_server.telemetry import http_probes
from gramophone_server.telemetry.http_probes import HttpProbes
from gramophone_server.telemetry.metrics import Metrics
from tests.support.clock import ManualClock, until


class Problems:
    """What is wrong with the server, as a test sets it."""

    readiness = liveness = ""


@pytest.fixture
def problems():
    return Problems()


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def probes(problems, clock):
    """Probes that report `problems`."""
    started = HttpProbes(
        "127.0.0.1", 0, Metrics().registry, lambda: problems.readiness, lambda: problems.liveness, clock=clock
    )
    started.start()
    yield started
    started.close()


@pytest.fixture
def served(probes):
    """The address of the probes."""
    return f"127.0.0.1:{probes.port}"


def connect(address):
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), 5)


def got(address, path):
    """(status, text) of a page."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_metrics_are_in_prometheus_format(served):
    status, text = got(served, "/metrics")
    names = {family.name for family in text_string_to_metric_families(text)}
    assert status == 200
    assert {"grpc_server_started", "gramophone_queue_wait_seconds", "process_open_fds"} <= names


def test_probes_report_what_is_wrong(served, problems):
    assert got(served, "/healthz") == got(served, "/livez") == (200, "ok\n")
    problems.readiness = "loading the network"
    assert got(served, "/healthz") == (503, "loading the network\n")
    assert got(served, "/livez") == (200, "ok\n")
    problems.liveness = "the event loop has not run for 31 s"
    assert got(served, "/livez") == (503, "the event loop has not run for 31 s\n")


def test_an_unknown_path_lists_the_known_ones(served):
    status, text = got(served, "/")
    assert status == 404 and "/metrics" in text and "/healthz" in text


async def test_a_silent_client_is_disconnected_and_blocks_no_other(probes, served, clock):
    with connect(served) as silent:
        assert got(served, "/healthz")[0] == 200
        await until(lambda: probes.connections == 1)
        clock.advance(http_probes.REQUEST_TIMEOUT_S + 0.1)
        assert silent.recv(1) == b""  # the end of the connection


async def test_a_client_that_sends_single_bytes_is_disconnected_too(probes, served, clock):
    with connect(served) as dripping:
        await until(lambda: probes.connections == 1)

        def disconnected():
            dripping.sendall(b"G")
            clock.advance(http_probes.REQUEST_TIMEOUT_S / 10)
            with contextlib.suppress(TimeoutError):
                return dripping.recv(1) == b""

        dripping.settimeout(0.02)
        with contextlib.suppress(ConnectionError):
            await until(disconnected)


async def test_slow_clients_make_room_for_a_probe(probes, served, clock):
    holding = [connect(served) for _ in range(http_probes.MAX_CONNECTIONS)]
    try:
        await until(lambda: probes.connections == http_probes.MAX_CONNECTIONS)
        clock.advance(http_probes.REPLACEABLE_AFTER_S + 0.1)
        assert got(served, "/livez")[0] == 200
        assert holding[0].recv(1) == b""  # the oldest one
    finally:
        for one in holding:
            one.close()


async def test_connections_are_bounded(probes, served):
    holding = [connect(served) for _ in range(http_probes.MAX_CONNECTIONS)]
    try:
        await until(lambda: probes.connections == http_probes.MAX_CONNECTIONS)
        with pytest.raises((OSError, http.client.HTTPException)):
            got(served, "/healthz")
    finally:
        for one in holding:
            one.close()


def test_a_port_in_use_is_reported(served):
    port = int(served.split(":")[1])
    with pytest.raises(StartupError) as caught:
        HttpProbes("127.0.0.1", port, Metrics().registry, str, str)
    assert str(caught.value) == (
        f"cannot serve metrics on 127.0.0.1:{port}: Address already in use; "
        "choose another port with --metrics-port (0: any free one, -1: none)"
    )


def test_probes_that_were_not_started_can_be_closed():
    HttpProbes("127.0.0.1", 0, Metrics().registry, str, str).close()
