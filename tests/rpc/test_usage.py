"""The gauges of budgets and places, beside their limits."""

import asyncio

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits, Settings
from gramophone_server.memory_bound import memory_terms
from gramophone_server.rpc import usage
from gramophone_server.rpc.standard_calls import StandardCalls
from gramophone_server.telemetry.health import HealthMonitor
from gramophone_server.telemetry.metrics import Metrics
from tests.support.clock import until
from tests.support.engines import FakeEngine
from tests.support.serving import serving, start_stream
from tests.support.specs import spec

LIMITS = Limits(max_running=1, max_queued=1, max_calls=10, max_connections=7, max_sending_bytes=2**24)


def health_checks(s):
    receiver = s.servicer.receiver
    return StandardCalls(receiver, receiver.probes, LIMITS.max_probe_calls, "health checks")


async def test_budgets_have_the_names_of_the_parts_of_the_bound():
    async with serving(FakeEngine(), LIMITS) as s:
        budgets = usage.budgets(s.servicer, s.scheduler, LIMITS)
        names = {term.name for term in memory_terms(Settings())}
        assert set(budgets) - {"health checks"} <= names
        assert budgets["sending"] == (0, 2**24) and budgets["receiving"].limit == LIMITS.max_receiving_bytes
        assert budgets["decoded"] == (0, LIMITS.max_decoded_bytes) and budgets["kept jobs"].limit == 256 * 2**20


async def test_a_running_job_is_seen_in_the_gauges_until_it_has_ended():
    engine, metrics = FakeEngine(), Metrics()
    async with serving(engine, LIMITS, metrics=metrics) as s:
        port, checks = int(s.address.rpartition(":")[2]), health_checks(s)
        HealthMonitor(
            s.scheduler,
            s.servicer.uploads,
            metrics,
            "1.0",
            budgets=lambda: usage.budgets(s.servicer, s.scheduler, LIMITS),
            places=lambda: usage.places(s.servicer, checks, LIMITS, port),
        )

        def value(name, of, kind="used"):
            return metrics.registry.get_sample_value(f"gramophone_{name}", {"of": of, "kind": kind})

        assert value("places", "calls") == value("budget_bytes", "decoded") == 0
        call = await start_stream(s, engine)
        assert (value("places", "calls"), value("places", "calls", "limit")) == (1, 10)
        assert (value("places", "connections"), value("places", "connections", "limit")) == (1, 7)
        assert (value("places", "decoders"), value("places", "decoders", "limit")) == (0, 2)
        assert 0 < value("budget_bytes", "decoded") < value("budget_bytes", "decoded", "limit") == 2**30
        checks.places.take("ipv4:127.0.0.1:1")
        assert value("places", "health checks") == 1
        call.cancel()
        engine.go.set()
        engine.jobs.clear(), engine.joined.clear()
        await until(lambda: value("places", "calls") == value("budget_bytes", "decoded") == 0)


async def test_uploads_and_kept_results_are_counted():
    async with serving(FakeEngine(iteration_s=0.001), LIMITS) as s:
        await s.stub.Stylize(pb.StylizeRequest(spec=spec()))
        await s.servicer.idle()
        budgets = usage.budgets(s.servicer, s.scheduler, LIMITS)
        assert 0 < budgets["kept jobs"].used < budgets["kept jobs"].limit
        data = spec().content.data
        await s.stub.UploadImage(iter([pb.UploadImageRequest(chunk=data)]))
        assert usage.budgets(s.servicer, s.scheduler, LIMITS)["uploads"] == (len(data), LIMITS.max_uploads_bytes)


async def test_the_gauges_may_be_read_on_another_thread():
    """While jobs come and go, as a scrape does."""
    async with serving(FakeEngine(iteration_s=0.0001), Limits()) as s:
        checks = health_checks(s)

        def read():
            for _ in range(200):
                usage.budgets(s.servicer, s.scheduler, LIMITS)
                usage.places(s.servicer, checks, LIMITS, 1)

        reading = asyncio.create_task(asyncio.to_thread(read))
        while not reading.done():
            await s.stub.Stylize(pb.StylizeRequest(spec=spec()))
        await reading
