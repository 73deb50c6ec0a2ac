import asyncio
import threading
import time

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.telemetry import health
from gramophone_server.telemetry.health import Vitals
from gramophone_server.telemetry.metrics import Metrics
from tests.support.clock import until
from tests.support.engines import FakeEngine
from tests.support.serving import serving, start_stream
from tests.support.specs import spec


def watched(s, metrics):
    return Vitals(s.scheduler, s.servicer.uploads, metrics, "1.2.3")


async def test_the_gauges_tell_what_is_there():
    metrics, engine = Metrics(), FakeEngine()
    async with serving(engine, Limits(max_running=1), metrics=metrics) as s:
        watched(s, metrics)

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
        labels = {"version": "1.2.3", "device": "fake", "precision": "fp32", "backbone": "vgg19"}
        assert value("build_info", **labels) == value("ready") == 1
        waiting.cancel(), running.cancel()
        engine.go.set()
        await until(lambda: value("jobs", state="running") == value("jobs", state="queued") == 0)
        await until(lambda: value("engine_heartbeat_seconds") == 0)
        await until(lambda: value("device_memory_bytes", kind="batches") == 0)


async def test_a_server_that_loads_or_drains_is_absent_but_not_ill():
    release = threading.Event()
    engine, metrics = FakeEngine(), Metrics()

    def load():
        release.wait(5)
        return engine

    async with serving(engine, load=load, metrics=metrics) as s:
        v = watched(s, metrics)
        assert v.absence() == "loading the network"
        assert metrics.registry.get_sample_value("gramophone_ready") == 0
        release.set()
        await s.scheduler.ready()
        assert v.absence() == ""
        v.draining = True
        assert v.absence() == "shutting down"
        assert v.illness() == ""


async def test_a_compute_thread_that_does_not_come_back_is_an_illness(monkeypatch):
    monkeypatch.setattr(health, "LONGEST_TURN_S", 0.1)
    metrics, engine = Metrics(), FakeEngine()
    async with serving(engine, metrics=metrics) as s:
        v = watched(s, metrics)
        call = await start_stream(s, engine)
        await until(lambda: v.illness())
        assert v.illness() == v.absence() == "the compute thread has been in one iteration for 0 s"
        call.cancel()
        engine.go.set()
        await until(lambda: not v.illness())


async def test_a_loop_that_stands_still_is_noticed_from_another_thread(monkeypatch):
    monkeypatch.setattr(health, "LONGEST_LAG_S", 0.1)
    metrics = Metrics()
    async with serving(FakeEngine(), metrics=metrics) as s:
        v = watched(s, metrics)
        pulse = asyncio.create_task(v.watch())
        await until(lambda: metrics.registry.get_sample_value("gramophone_event_loop_tasks") > 0)
        seen = []
        looker = threading.Thread(target=lambda: (time.sleep(0.6), seen.append(v.illness())))
        looker.start()
        time.sleep(0.9)  # noqa: ASYNC251 - the event loop stands still
        looker.join()
        assert seen[0].startswith("the event loop has stood still for ")
        await until(lambda: not v.illness())
        late_s = metrics.registry.get_sample_value("gramophone_event_loop_lag_seconds_sum")
        assert late_s > 0.5
        pulse.cancel()
