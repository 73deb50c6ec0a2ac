import json
import re
from pathlib import Path

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.telemetry.health import HealthMonitor
from gramophone_server.telemetry.metrics import Metrics
from tests.support.clock import until
from tests.support.engines import FakeEngine
from tests.support.serving import serving
from tests.support.specs import spec

DASHBOARD = Path(__file__).parent.parent.parent / "deploy" / "grafana.json"
NAME = re.compile(r"\b(?:grpc_server|gramophone|process)_[a-z_]+\b")


def shown():
    """The queries of all panels."""
    board = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


async def told():
    """Series that a server has behind one job, as {name: labels}."""
    metrics = Metrics()
    async with serving(FakeEngine(iteration_s=0.001), metrics=metrics) as s:
        HealthMonitor(s.scheduler, s.servicer.uploads, metrics, "1.0")
        await s.stub.Stylize(pb.StylizeRequest(spec=spec()))
        metrics.job_rejected("QUEUE_FULL")
        await until(lambda: metrics.registry.get_sample_value("gramophone_job_seconds_count") == 1)
        await s.servicer.idle()  # the call's own end is counted last
        found = {}
        for family in metrics.registry.collect():
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found


async def test_the_dashboard_asks_for_metrics_and_labels_that_there_are():
    there = await told()
    for query in shown():
        names = NAME.findall(query)
        assert names, query
        for name in names:
            assert name in there, f"{name} in {query}"
        for name, inside in re.findall(r"([a-z_]+){([^}]*)}", query):
            labels = set(re.findall(r"(\w+)(?:=~|!=|=)", inside)) - {"instance"}  # which Prometheus adds
            assert labels <= there[name], query
        for name, by in re.findall(r"by \(([^)]*)\) \((?:rate\()?([a-z_]+)", query):
            assert set(name.split(", ")) - {"instance"} <= there[by], query


def test_the_dashboard_shows_every_metric_of_the_service():
    queries = " ".join(shown())
    metrics = Metrics()
    for family in metrics.registry.collect():
        if not family.name.startswith("process_") and family.name != "grpc_server_handling_seconds":
            assert family.name in queries, family.name
