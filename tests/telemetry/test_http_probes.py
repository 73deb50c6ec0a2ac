import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from gramophone_server.errors import StartupError
from gramophone_server.telemetry.http_probes import HttpProbes, MetricsPages
from gramophone_server.telemetry.metrics import Metrics
from tests.support.clock import ManualClock

OPEN = "application/openmetrics-text;version=1.0.0"


class Problems:
    """What is wrong with the server, as a test sets it."""

    readiness = liveness = ""


@pytest.fixture
def problems():
    return Problems()


@pytest.fixture
def probes(problems):
    """Probes that report `problems`."""
    started = HttpProbes("127.0.0.1", 0, Metrics().registry, lambda: problems.readiness, lambda: problems.liveness)
    started.start()
    yield started
    started.close()


@pytest.fixture
def served(probes):
    """The address of the probes."""
    return f"127.0.0.1:{probes.port}"


def got(address, path):
    """(status, text) of a page."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=60) as page:
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


def test_both_formats_of_prometheus_are_served(served):
    for accept, content_type in (("text/plain;version=0.0.4", "text/plain"), (OPEN, "application/openmetrics-text")):
        asked = urllib.request.Request(f"http://{served}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(asked, timeout=60) as page:
            assert page.headers.get_content_type() == content_type
            assert page.read().endswith(b"# EOF\n") == (accept == OPEN)


def test_a_page_is_kept_for_twenty_times_as_long_as_making_it_took():
    clock, pages = ManualClock(), []

    class Slow(Collector):
        def collect(self):
            pages.append(clock.now)
            clock.advance(0.01)
            return []

    registry = CollectorRegistry()
    registry.register(Slow())
    pages.clear()  # registering asks, too
    metrics = MetricsPages(registry, clock=clock)
    for _ in range(1000):
        assert metrics.answer("").status == "200 OK"
        clock.advance(0.001)
    assert len(pages) == pytest.approx(1.0 / 0.2, abs=1)
    metrics.answer(OPEN)
    assert metrics.answer(OPEN).headers != metrics.answer("").headers


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
