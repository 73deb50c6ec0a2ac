import json
import re
from pathlib import Path

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.telemetry.health import HealthMonitor, Usage
from gramophone_server.telemetry.metrics import Metrics
from tests.support.clock import until
from tests.support.engines import FakeEngine
from tests.support.serving import serving
from tests.support.specs import spec

DASHBOARD = Path(__file__).parent.parent.parent / "deploy" / "grafana.json"
NAME = re.compile(r"\b(?:grpc_server|gramophone|process)_[a-z_]+\b")


def dashboard_queries():
    """The queries of all panels."""
    board = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


async def served_series():
    """The series of a server after one job, as {name: labels}."""
    metrics = Metrics()
    async with serving(FakeEngine(iteration_s=0.001), metrics=metrics) as s:
        used = {"calls": Usage(1, 2)}
        HealthMonitor(
            s.scheduler,
            s.servicer.uploads,
            metrics,
            "1.0",
            dropped_lines=lambda: {"stderr": 0},
            budgets=lambda: used,
            places=lambda: used,
        )
        await s.stub.Stylize(pb.StylizeRequest(spec=spec()))
        metrics.job_rejected("QUEUE_FULL")
        await until(lambda: metrics.registry.get_sample_value("gramophone_job_seconds_count") == 1)
        await s.servicer.idle()  # the end of the call is counted last
        found = {}
        for family in metrics.registry.collect():
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found


async def test_the_dashboard_queries_only_metrics_and_labels_that_exist():
    series = await served_series()
    for query in dashboard_queries():
        names = NAME.findall(query)
        assert names, query
        for name in names:
            assert name in series, f"{name} in {query}"
        for name, inside in re.findall(r"([a-z_]+){([^}]*)}", query):
            labels = set(re.findall(r"(\w+)(?:=~|!=|=)", inside)) - {"instance"}  # Prometheus adds it
            assert labels <= series[name], query
        for name, by in re.findall(r"by \(([^)]*)\) \((?:rate\()?([a-z_]+)", query):
            assert set(name.split(", ")) - {"instance"} <= series[by], query


def test_the_dashboard_shows_every_metric_of_the_service():
    queries = " ".join(dashboard_queries())
    metrics = Metrics()
    for family in metrics.registry.collect():
        if not family.name.startswith("process_") and family.name != "grpc_server_handling_seconds":
            assert family.name in queries, family.name
