import http.client
import socket
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gramophone_server.errors import StartupError
from gramophone_server.telemetry import http_probes
from gramophone_server.telemetry.http_probes import HttpProbes
from gramophone_server.telemetry.metrics import Metrics


class Problems:
    """What is wrong with the server, as a test sets it."""

    readiness = liveness = ""


@pytest.fixture
def problems():
    return Problems()


@pytest.fixture
def serve(problems):
    """Starts probes that report `problems`; keyword arguments are those of HttpProbes. Returns their address."""
    started = []

    def start(**times):
        probes = HttpProbes(
            "127.0.0.1", 0, Metrics().registry, lambda: problems.readiness, lambda: problems.liveness, **times
        )
        probes.start()
        started.append(probes)
        return f"127.0.0.1:{probes.port}"

    yield start
    for probes in started:
        probes.close()


@pytest.fixture
def served(serve):
    """The address of probes."""
    return serve()


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


def test_a_silent_client_is_disconnected_and_blocks_no_other(serve):
    address = serve(request_timeout_s=0.2)
    with connect(address) as silent:
        assert got(address, "/healthz")[0] == 200
        assert silent.recv(1) == b""  # the end, after the timeout


def test_a_client_that_sends_single_bytes_is_disconnected_too(serve):
    address = serve(request_timeout_s=0.5)
    with connect(address) as dripping, pytest.raises(OSError):
        for _ in range(500):
            dripping.sendall(b"G")
            time.sleep(0.02)


def test_slow_clients_make_room_for_a_probe(serve):
    address = serve(replaceable_after_s=0.2)
    holding = [connect(address) for _ in range(http_probes.MOST_CONNECTIONS)]
    try:
        time.sleep(0.4)
        assert got(address, "/livez")[0] == 200
        assert holding[0].recv(1) == b""  # the oldest one
    finally:
        for one in holding:
            one.close()


def test_connections_are_bounded(serve):
    address = serve(replaceable_after_s=60, request_timeout_s=60)
    holding = [connect(address) for _ in range(http_probes.MOST_CONNECTIONS)]
    try:
        with pytest.raises((OSError, http.client.HTTPException)):
            # The server may not have accepted all of these yet, but one of this many more finds no room.
            for _ in range(50):
                got(address, "/healthz")
                holding.append(connect(address))
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
