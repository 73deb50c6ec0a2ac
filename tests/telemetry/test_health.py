import asyncio
import re
import threading

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.domain.engine_api import KernelReport
from gramophone_server.telemetry.health import HealthMonitor
from gramophone_server.telemetry.metrics import Metrics
from tests.support.clock import WITHIN_S, ManualClock, until
from tests.support.engines import FakeEngine
from tests.support.serving import serving, start_stream
from tests.support.specs import spec


def monitor_of(s, metrics, **options):
    return HealthMonitor(s.scheduler, s.servicer.uploads, metrics, "1.2.3", **options)


async def test_the_gauges_show_the_present_state():
    metrics, engine = Metrics(), FakeEngine()
    async with serving(engine, Limits(max_running=1), metrics=metrics) as s:
        monitor_of(s, metrics)

        def value(name, **labels):
            return metrics.registry.get_sample_value(f"gramophone_{name}", labels)

        running = await start_stream(s, engine)
        waiting = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec()))
        await waiting.read()
        assert [value("jobs", state=state) for state in ("queued", "running", "paused")] == [1, 1, 0]
        assert value("device_memory_bytes", kind="batches") == 1000 * 64 * 32
        assert value("device_memory_bytes", kind="limit") == engine.memory_bytes
        assert value("engine_heartbeat_seconds") > 0
        assert value("cache_hits_total", cache="styles") == 3 and value("cache_misses_total", cache="styles") == 2
        assert value("cache_bytes", cache="uploads") == 0
        assert value("library_ops") == 0
        engine.kernels = KernelReport({"gram": "error 0.1"}, 0.05)
        assert value("library_ops") == 1
        labels = {"version": "1.2.3", "device": "fake", "precision": "fp32", "backbone": "vgg19"}
        assert value("build_info", **labels) == value("ready") == 1
        waiting.cancel(), running.cancel()
        engine.go.set()
        await until(lambda: value("jobs", state="running") == value("jobs", state="queued") == 0)
        await until(lambda: value("engine_heartbeat_seconds") == 0)
        await until(lambda: value("device_memory_bytes", kind="batches") == 0)


async def test_a_server_that_loads_or_drains_is_not_ready_but_alive():
    release = threading.Event()
    engine, metrics = FakeEngine(), Metrics()

    def load():
        release.wait(WITHIN_S)
        return engine

    async with serving(engine, load=load, metrics=metrics) as s:
        monitor = monitor_of(s, metrics)
        assert monitor.readiness_problem() == "loading the network"
        assert metrics.registry.get_sample_value("gramophone_ready") == 0
        release.set()
        await s.scheduler.ready()
        assert monitor.readiness_problem() == ""
        monitor.draining = True
        assert monitor.readiness_problem() == "shutting down"
        assert monitor.liveness_problem() == ""


async def test_a_compute_thread_that_does_not_return_is_a_liveness_problem():
    metrics, engine = Metrics(), FakeEngine()
    async with serving(engine, metrics=metrics) as s:
        monitor = monitor_of(s, metrics, max_step_s=0.1)
        call = await start_stream(s, engine)
        await until(lambda: monitor.liveness_problem())
        for problem in (monitor.liveness_problem(), monitor.readiness_problem()):
            assert re.fullmatch(r"the compute thread has been in one iteration for \d+ s", problem)
        call.cancel()
        engine.go.set()
        await until(lambda: not monitor.liveness_problem())


async def test_a_blocked_event_loop_is_noticed_from_another_thread():
    metrics, clock = Metrics(), ManualClock()
    async with serving(FakeEngine(), metrics=metrics) as s:
        monitor = monitor_of(s, metrics, clock=clock)
        pulse = asyncio.create_task(monitor.watch())
        await until(lambda: metrics.registry.get_sample_value("gramophone_event_loop_tasks") > 0)
        seen = []

        def look():
            for after_s in (30.0, 1.0):
                clock.advance(after_s)
                seen.append(monitor.liveness_problem())

        looker = threading.Thread(target=look)
        looker.start()
        looker.join()  # the event loop is blocked here
        assert seen == ["", "the event loop has not run for 31 s"]
        await until(lambda: not monitor.liveness_problem())
        late_s = metrics.registry.get_sample_value("gramophone_event_loop_lag_seconds_sum")
        assert late_s > 30
        pulse.cancel()
