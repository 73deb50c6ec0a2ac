import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_server import main
from gramophone_server.config import Limits, Settings
from gramophone_server.errors import StartupError
from gramophone_server.scheduling.scheduler import Scheduler
from gramophone_server.scheduling.waiting_queue import WaitingQueue
from gramophone_server.telemetry.metrics import SERVICE
from tests.support import processes
from tests.support.clock import WITHIN_S, until
from tests.support.engines import FakeBatch, FakeEngine
from tests.support.serving import refused
from tests.support.specs import spec

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Process:
    """`main.serve` in this process, with real signals and its lines of standard output."""

    def __init__(self, capsys, engine, **settings):
        self.engine = engine
        self.out = ""
        self._capsys = capsys
        self.task = asyncio.create_task(main.serve(Settings(**{"port": 0, "drain_s": 5.0, **settings}), self._load))

    def _load(self):
        assert self.engine.go.wait(WITHIN_S)
        return self.engine

    async def line(self, start):
        """The rest of the line of standard output that starts with `start`. Waits for it."""

        def seen():
            self.out += self._capsys.readouterr().out
            return start in self.out or self.task.done()

        await until(seen)
        assert start in self.out, self.task.exception()
        return self.out.split(start, 1)[1].splitlines()[0]

    async def __aenter__(self):
        self.address = await self.line("listening on ")
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub = pb_grpc.StyleTransferServiceStub(self.channel)
        return self

    async def __aexit__(self, *error):
        self.engine.go.set()
        await self.channel.close()
        if not self.task.done():
            os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(StartupError, RuntimeError):
            await asyncio.wait_for(self.task, WITHIN_S)

    async def health(self, name=SERVICE.full_name):
        stub = health_pb2_grpc.HealthStub(self.channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status


async def test_health_is_not_serving_until_the_engine_is_warm(capsys):
    engine = FakeEngine()
    engine.go.clear()
    async with Process(capsys, engine) as p:
        assert p.address.startswith("127.0.0.1:")
        assert [await p.health(name) for name in ("", SERVICE.full_name)] == [NOT_SERVING, NOT_SERVING]
        assert (await refused(p.stub.Stylize(pb.StylizeRequest(spec=spec())))).code is grpc.StatusCode.UNAVAILABLE
        engine.go.set()
        assert float((await p.line("ready in ")).removesuffix(" s")) < 5
        assert [await p.health(name) for name in ("", SERVICE.full_name)] == [SERVING, SERVING]
        await p.stub.Stylize(pb.StylizeRequest(spec=spec()))


async def test_sigterm_drains_while_health_is_watched(capsys):
    engine = FakeEngine()
    async with Process(capsys, engine) as p:
        await p.line("ready in ")
        watch = health_pb2_grpc.HealthStub(p.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE.full_name))
        assert (await watch.read()).status == SERVING
        engine.go.clear()
        job = asyncio.ensure_future(p.stub.Stylize(pb.StylizeRequest(spec=spec())))
        await until(engine.under_way.is_set)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await watch.read()).status == NOT_SERVING
        got = await refused(p.stub.Stylize(pb.StylizeRequest(spec=spec())))
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        engine.go.set()
        assert (await job).result.iterations == 5
        assert await asyncio.wait_for(p.task, WITHIN_S) is True


async def test_health_and_control_work_when_the_queue_is_full(capsys):
    engine = FakeEngine()
    async with Process(capsys, engine, max_running=1, max_queued=1) as p:
        await p.line("ready in ")
        engine.go.clear()
        streams, ids = [], []
        for _ in range(2):  # one after the other: calls that start together arrive in any order
            streams.append(p.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec())))
            ids.append((await streams[-1].read()).event.accepted.job_id)
        got = await refused(p.stub.Stylize(pb.StylizeRequest(spec=spec())))
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert [await p.health(name) for name in ("", SERVICE.full_name)] == [SERVING, SERVING]
        watch = health_pb2_grpc.HealthStub(p.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE.full_name))
        assert (await watch.read()).status == SERVING
        watch.cancel()
        assert (await p.stub.GetServerInfo(pb.GetServerInfoRequest())).queued_jobs == 1
        assert (await p.stub.GetJob(pb.GetJobRequest(job_id=ids[1]))).job.queue_position == 1
        watcher = p.stub.WatchJob(pb.WatchJobRequest(job_id=ids[0]))
        assert (await watcher.read()).event.HasField("accepted")
        cancelled = await p.stub.CancelJob(pb.CancelJobRequest(job_id=ids[1]))
        assert cancelled.job.state == pb.JOB_STATE_CANCELLED
        engine.go.set()
        while (response := await watcher.read()) is not grpc.aio.EOF:
            last = response.event
        assert last.HasField("result")


async def test_a_job_that_outlasts_the_drain_ends_with_shutting_down(capsys):
    engine = FakeEngine(iteration_s=0.001)
    async with Process(capsys, engine, drain_s=0.05) as p:
        await p.line("ready in ")
        job = p.stub.Stylize(pb.StylizeRequest(spec=spec(iterations=5000)))
        await until(engine.under_way.is_set)
        os.kill(os.getpid(), signal.SIGTERM)
        got = await refused(job)
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert await asyncio.wait_for(p.task, WITHIN_S) is True
        assert engine.iterations < 5000


async def test_a_drain_waits_for_the_running_iteration_and_its_picture(capsys, monkeypatch):
    monkeypatch.setattr(main, "LAST_MESSAGES_S", 0.1)
    engine, started, release = FakeEngine(), threading.Event(), threading.Event()
    advance = FakeBatch.advance

    def hold_the_second(batch, iterations=1):
        if engine.iterations == 1:
            started.set()
            assert release.wait(WITHIN_S)
        return advance(batch, 1)

    monkeypatch.setattr(FakeBatch, "advance", hold_the_second)
    async with Process(capsys, engine, drain_s=0.0) as p:
        await p.line("ready in ")
        wanted = spec(iterations=50)
        wanted.frames.SetInParent()
        wanted.checkpoints.SetInParent()
        job = p.stub.StylizeStream(pb.StylizeStreamRequest(spec=wanted))
        responses = [await job.read()]
        await until(started.is_set)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(1.0)  # longer than the drain waits for messages and cancelled calls
        monkeypatch.setattr(main, "LAST_MESSAGES_S", 30.0)  # for the picture, after the iteration
        release.set()
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
            while True:
                responses.append(await job.read())
        frames = [event.frame for event in (response.event for response in responses) if event.HasField("frame")]
        assert responses[-1].event.checkpoint.iteration == frames[-1].iteration == 2
        assert await asyncio.wait_for(p.task, WITHIN_S) is True


async def test_a_server_whose_compute_thread_fails_ends(capsys, monkeypatch, caplog):
    engine = FakeEngine(iteration_s=0.005)
    schedulers = []
    monkeypatch.setattr(main, "Scheduler", lambda *wanted: schedulers.append(Scheduler(*wanted)) or schedulers[-1])
    async with Process(capsys, engine) as p:
        await p.line("ready in ")
        job = p.stub.Stylize(pb.StylizeRequest(spec=spec(iterations=5000)))
        await until(engine.under_way.is_set)
        monkeypatch.setattr(WaitingQueue, "report_positions", None)
        got = await refused(job)
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        with pytest.raises(RuntimeError, match="the compute thread has ended because of a defect"):
            await asyncio.wait_for(asyncio.shield(p.task), WITHIN_S)
    assert "the server ends, to be replaced by another one" in caplog.text


async def test_a_second_signal_ends_at_once_even_inside_an_iteration(capsys, caplog):
    caplog.set_level("INFO", "gramophone_server")
    engine = FakeEngine()
    async with Process(capsys, engine, drain_s=3600) as p:
        await p.line("ready in ")
        engine.go.clear()
        job = asyncio.ensure_future(p.stub.Stylize(pb.StylizeRequest(spec=spec())))
        await until(engine.under_way.is_set)
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: "draining for up to 3600 s" in caplog.text)
        assert not p.task.done()
        os.kill(os.getpid(), signal.SIGINT)
        assert await asyncio.wait_for(p.task, WITHIN_S) is False  # the compute thread has not ended
        with pytest.raises(grpc.aio.AioRpcError):
            await job


async def test_a_signal_while_the_engine_loads_ends_the_server(capsys):
    engine = FakeEngine()
    engine.go.clear()
    async with Process(capsys, engine) as p:
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(p.task, WITHIN_S) is False


async def test_a_port_in_use_is_reported_in_one_sentence(capsys):
    async with Process(capsys, FakeEngine()) as p:
        port = int(p.address.rpartition(":")[2])
        with pytest.raises(StartupError) as caught:
            await main.serve(Settings(port=port), FakeEngine)
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port}: Address already in use; "
        "choose another address with --host and --port (--port 0: any free one)"
    )


async def test_an_address_of_another_machine_is_refused():
    with pytest.raises(StartupError, match=r"cannot listen on 192\.0\.2\.1:1234: Cannot assign requested address"):
        await main.serve(Settings(host="192.0.2.1", port=1234), FakeEngine)


def test_a_defect_while_the_engine_loads_ends_the_process():
    program = (
        "import time; from gramophone_server import main; from gramophone_server.config import Settings\n"
        "async def start(self): self.scheduler.start(); raise RuntimeError('no heartbeat')\n"
        "main.Server.start, main.load_engine = start, lambda settings: time.sleep(600)\n"
        "main.run(Settings(port=0))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=processes.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 1
    assert "CRITICAL gramophone_server: the server ends because of a defect" in ran.stderr
    assert ran.stderr.rstrip().endswith("RuntimeError: no heartbeat")


async def test_an_engine_that_cannot_start_ends_the_server():
    def load():
        raise StartupError("no such weights file")

    with pytest.raises(StartupError, match="no such weights file"):
        await main.serve(Settings(port=0), load)


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
async def test_plaintext_beyond_this_machine_is_logged_as_a_warning(capsys, caplog, host, warned):
    async with Process(capsys, FakeEngine(), host=host) as p:
        await p.line("ready in ")
    assert (
        "not a loopback address: any client that reaches it can use this server, in plaintext" in caplog.text
    ) == warned


async def test_reflection_is_served_only_if_enabled(capsys):
    async def services(p):
        stub = reflection_pb2_grpc.ServerReflectionStub(p.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        return [service.name for service in (await call.read()).list_services_response.service]

    async with Process(capsys, FakeEngine(), reflection=True) as p:
        assert SERVICE.full_name in await services(p)
    async with Process(capsys, FakeEngine()) as p:
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await services(p)


def test_the_port_is_not_shared_and_messages_are_as_large_as_the_limits():
    limits = Limits(max_message_bytes=6 * 2**20, max_connections=7)
    options = dict(main.server_options(limits))
    assert options["grpc.so_reuseport"] == 0
    assert options["grpc.max_receive_message_length"] == 6 * 2**20
    assert options["grpc.max_allowed_incoming_connections"] == 7
    assert options["grpc.max_send_message_length"] > 3 * 2048**2


@pytest.mark.parametrize(("chosen", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_compute_threads_sleep_while_they_wait_unless_configured_otherwise(chosen, used):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "TRUE"} | ({"OMP_WAIT_POLICY": chosen} if chosen else {})
    command = [sys.executable, "-c", "import gramophone_server.main"]
    loaded = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert f"OMP_WAIT_POLICY = '{used}'" in loaded.stderr  # printed by OpenMP when it is loaded


def page(url):
    """(status, text)"""
    try:
        with urllib.request.urlopen(url, timeout=60) as shown:
            return shown.status, shown.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_metrics_and_probes_have_a_port_of_their_own(capsys):
    engine = FakeEngine()
    engine.go.clear()
    async with Process(capsys, engine, metrics_port=0) as p:
        metrics = await p.line("metrics on ")
        healthz = metrics.replace("/metrics", "/healthz")
        assert metrics.startswith("http://127.0.0.1:")
        assert await asyncio.to_thread(page, healthz) == (503, "loading the network\n")
        engine.go.set()
        await p.line("ready in ")
        assert await asyncio.to_thread(page, healthz) == (200, "ok\n")
        await p.stub.Stylize(pb.StylizeRequest(spec=spec()))
        engine.go.clear()
        running = p.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec()))
        await running.read()
        async with asyncio.timeout(60):
            status, text = 200, ""
            while 'gramophone_jobs{state="running"} 1.0' not in text and status == 200:  # it starts after `accepted`
                status, text = await asyncio.to_thread(page, metrics)
        assert status == 200
        assert 'gramophone_jobs_finished_total{outcome="ITERATIONS_DONE"} 1.0' in text
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(60):
            while (await asyncio.to_thread(page, healthz))[1] != "shutting down\n":
                pass
        engine.go.set()
    with pytest.raises(OSError):
        page(metrics)


async def test_a_metrics_port_in_use_is_reported(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"cannot serve metrics on 127.0.0.1:{port}: Address already in use"):
            await main.serve(Settings(port=0, metrics_port=port), FakeEngine)
