import http.client
import socket
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gramophone_server.errors import StartupError
from gramophone_server.telemetry import http_probes
from gramophone_server.telemetry.http_probes import Probes
from gramophone_server.telemetry.metrics import Metrics


class Patient:
    """What is wrong with the server, as a test says."""

    absence = illness = ""


@pytest.fixture
def patient():
    return Patient()


@pytest.fixture
def served(patient):
    """The address of probes that ask the patient."""
    shown = Probes("127.0.0.1", 0, Metrics().registry, lambda: patient.absence, lambda: patient.illness)
    shown.start()
    yield f"127.0.0.1:{shown.port}"
    shown.close()


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


def test_probes_say_what_is_wrong(served, patient):
    assert got(served, "/healthz") == got(served, "/livez") == (200, "ok\n")
    patient.absence = "loading the network"
    assert got(served, "/healthz") == (503, "loading the network\n")
    assert got(served, "/livez") == (200, "ok\n")
    patient.illness = "the event loop has stood still for 31 s"
    assert got(served, "/livez") == (503, "the event loop has stood still for 31 s\n")


def test_another_path_is_told_which_there_are(served):
    status, text = got(served, "/")
    assert status == 404 and "/metrics" in text and "/healthz" in text


def test_a_client_that_says_nothing_is_let_go_and_holds_nobody_up(served, monkeypatch):
    monkeypatch.setattr(http_probes, "PATIENCE_S", 0.2)
    host, port = served.split(":")
    with socket.create_connection((host, int(port)), 5) as silent:
        assert got(served, "/healthz")[0] == 200
        assert silent.recv(1) == b""  # the end, after the patience


def test_a_client_that_drips_is_let_go_too(served, monkeypatch):
    monkeypatch.setattr(http_probes, "PATIENCE_S", 0.5)
    host, port = served.split(":")
    with socket.create_connection((host, int(port)), 5) as dripping, pytest.raises(OSError):
        for _ in range(500):
            dripping.sendall(b"G")
            time.sleep(0.02)


def test_clients_that_take_long_make_room_for_a_probe(served, monkeypatch):
    monkeypatch.setattr(http_probes, "LONG_S", 0.2)
    host, port = served.split(":")
    holding = [socket.create_connection((host, int(port)), 5) for _ in range(http_probes.MOST_CONNECTIONS)]
    try:
        time.sleep(0.4)
        assert got(served, "/livez")[0] == 200
        assert holding[0].recv(1) == b""  # who came first
    finally:
        for one in holding:
            one.close()


def test_connections_are_bounded(served, monkeypatch):
    monkeypatch.setattr(http_probes, "LONG_S", 60)
    monkeypatch.setattr(http_probes, "PATIENCE_S", 60)
    host, port = served.split(":")
    holding = [socket.create_connection((host, int(port)), 5) for _ in range(http_probes.MOST_CONNECTIONS)]
    try:
        with pytest.raises((OSError, http.client.HTTPException)):
            # Those before may still be on their way to their threads, but one of so many more finds no room.
            for _ in range(50):
                got(served, "/healthz")
                holding.append(socket.create_connection((host, int(port)), 5))
    finally:
        for one in holding:
            one.close()


def test_a_port_that_is_taken_is_told(served):
    port = int(served.split(":")[1])
    with pytest.raises(StartupError) as caught:
        Probes("127.0.0.1", port, Metrics().registry, str, str)
    assert str(caught.value) == (
        f"cannot serve metrics on 127.0.0.1:{port}: Address already in use; "
        "choose another port with --metrics-port (0: any free one, -1: none)"
    )


def test_probes_that_never_began_can_be_closed():
    Probes("127.0.0.1", 0, Metrics().registry, str, str).close()
