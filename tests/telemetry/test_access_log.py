import asyncio
import datetime
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.errors import StartupError
from gramophone_server.telemetry import access_log
from gramophone_server.telemetry.access_log import AccessLog, trace_id
from tests.support.clock import until
from tests.support.engines import FakeEngine
from tests.support.serving import refused, serving, start_stream
from tests.support.specs import spec

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("traceparent", "trace"),
    [
        (f"00-{TRACE}-{SPAN}-01", TRACE),
        (f"01-{TRACE}-{SPAN}-01-more", TRACE),  # a later version of the format
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        (f"00-{TRACE}-{SPAN}-01\n", None),
        ('{"job": "another"}', None),
        (b"00-", None),
    ],
)
def test_only_a_valid_traceparent_has_a_trace(traceparent, trace):
    assert trace_id((("user-agent", "x"), ("traceparent", traceparent))) == trace


def test_no_metadata_has_no_trace():
    assert trace_id(None) is trace_id(()) is None


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_each_call_has_a_line(tmp_path):
    path = tmp_path / "access.log"
    access = AccessLog(str(path))
    async with serving(FakeEngine(), Limits(max_running=1, max_queued=0), access_log=access) as s:
        wanted = spec(iterations=2)
        wanted.frames.SetInParent()
        call = s.stub.StylizeStream(
            pb.StylizeStreamRequest(spec=wanted), metadata=(("traceparent", f"00-{TRACE}-{SPAN}-01"),)
        )
        events = [response.event async for response in call]
        await refused(s.stub.GetJob(pb.GetJobRequest(job_id="nothing")))
        for ask in (s.stub.GetJob, s.stub.CancelJob):
            kind = pb.GetJobRequest if ask is s.stub.GetJob else pb.CancelJobRequest
            await ask(kind(job_id=events[0].accepted.job_id))
        await until(lambda: len(lines(path)) == 4)
    access.close()
    first, second, *others = lines(path)
    assert [(line["method"], line["job"]) for line in others] == [
        (method, events[0].accepted.job_id) for method in ("GetJob", "CancelJob")
    ]
    took_ms, at, peer = (first.pop(name) for name in ("ms", "time", "peer"))
    assert first == {
        "method": "StylizeStream",
        "code": "OK",
        "reason": None,
        "job": events[0].accepted.job_id,
        "trace": TRACE,
        "received": 1,
        "sent": len(events),
        "frames": sum(event.HasField("frame") for event in events),
        "dropped": 0,
    }
    assert 0 < took_ms < 5000 and peer.startswith("ipv4:127.0.0.1:")
    assert abs(datetime.datetime.fromisoformat(at) - datetime.datetime.now(datetime.UTC)).total_seconds() < 60
    assert (second["method"], second["code"], second["reason"]) == ("GetJob", "NOT_FOUND", "JOB_NOT_FOUND")
    assert (second["job"], second["trace"], second["sent"]) == (None, None, 0)


async def test_a_client_that_leaves_has_a_line_too(tmp_path):
    path, engine = tmp_path / "access.log", FakeEngine()
    access = AccessLog(str(path))
    async with serving(engine, access_log=access) as s:
        (await start_stream(s, engine)).cancel()
        await until(lambda: lines(path))
    access.close()
    assert [(line["method"], line["code"], line["reason"]) for line in lines(path)] == [
        ("StylizeStream", "CANCELLED", None)
    ]


async def test_a_log_that_was_moved_away_is_created_again(tmp_path):
    path = tmp_path / "access.log"
    access = AccessLog(str(path))
    access.write(method="A")
    await until(lambda: lines(path))
    path.rename(tmp_path / "access.log.1")
    access.write(method="B")
    access.close()
    assert [line["method"] for line in lines(path)] == ["B"]


async def test_calls_end_normally_if_the_log_cannot_be_written(tmp_path, caplog):
    folder = tmp_path / "logs"
    folder.mkdir()
    path = folder / "access.log"
    access = AccessLog(str(path))
    async with serving(FakeEngine(), access_log=access) as s:
        shutil.rmtree(folder)
        for _ in range(3):
            await s.stub.GetServerInfo(pb.GetServerInfoRequest())
        await asyncio.wait_for(s.servicer.idle(), 5)
        assert len(s.servicer.calls) == 0
        await until(lambda: access.dropped == 3)
        folder.mkdir()
        await s.stub.GetServerInfo(pb.GetServerInfoRequest())
        await until(path.exists)
        await until(lambda: len(lines(path)) == 1)
    access.close()
    first, last = [
        record.message for record in caplog.records if record.name == "gramophone_server.telemetry.access_log"
    ]
    assert first.startswith(
        "the access log cannot be written; calls are missing from it from now on: [Errno 2] No such"
    )
    assert last == "the access log is written again; 3 calls are missing from it"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_reported_once(caplog, capsys):
    access = AccessLog("/dev/full")
    for _ in range(3):
        access.write(method="A")
    access.close()
    (record,) = caplog.records
    assert record.message == (
        "the access log cannot be written; calls are missing from it from now on: [Errno 28] No space left on device"
    )
    assert access.dropped == 3
    assert capsys.readouterr().err == ""


async def test_a_pipe_that_nobody_reads_drops_lines_and_no_call_waits(tmp_path, caplog):
    path = tmp_path / "access.pipe"
    os.mkfifo(path)
    access = AccessLog(str(path))  # without a reader
    async with serving(FakeEngine(), access_log=access) as s:
        await s.stub.GetServerInfo(pb.GetServerInfoRequest())
        await until(lambda: access.dropped == 1)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        await s.stub.GetServerInfo(pb.GetServerInfoRequest())
        await until(lambda: len(caplog.records) == 2)
        assert caplog.records[1].message == "the access log is written again; 1 calls are missing from it"
        for _ in range(20_000):  # more than the pipe and the queue take
            access.write(method="A" * 100)
        await s.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=60)
        assert access.dropped > 1000
        assert caplog.records[2].message.endswith("calls are missing from it from now on: nobody reads it")
        text = b""
        while True:  # the reader is there again
            try:
                text += os.read(reader, 1 << 20)
            except BlockingIOError:
                if len(caplog.records) == 4:
                    break
                await asyncio.sleep(0.001)
    access.close()
    os.close(reader)
    assert caplog.records[3].message.startswith("the access log is written again; ")
    written = [json.loads(line)["method"] for line in text.splitlines()]  # each is a whole line
    assert written.count("A" * 100) + access.dropped - 1 == 20_000
    assert written[-1] == "GetServerInfo"  # the oldest are dropped


def test_a_pipe_that_nobody_reads_does_not_hold_the_end_of_the_server(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(access_log, "CLOSE_S", 0.05)
    path = tmp_path / "access.pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    access = AccessLog(str(path))
    for _ in range(2_000):
        access.write(method="A" * 100)
    access.close()
    (record,) = caplog.records
    os.close(reader)
    assert record.message.startswith("the access log is closed before its last lines are written")


def test_a_line_that_was_torn_by_a_full_disk_does_not_spoil_the_next(tmp_path):
    """The disk takes half of a line, which a limit of the process does as well."""
    path = tmp_path / "access.log"
    program = (
        "import resource, signal, sys\n"
        "from gramophone_server.telemetry.access_log import AccessLog\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "access = AccessLog(sys.argv[1])\n"
        "access.write(method='A')\n"
        "access.close()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "access = AccessLog(sys.argv[1])\n"
        "access.write(method='B')\n"
        "while not access.dropped: pass\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "access.write(method='C')\n"
        "access.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program, str(path)], env=environment, timeout=60, check=True)
    first, torn, last = path.read_text().splitlines()
    assert (json.loads(first)["method"], json.loads(last)["method"]) == ("A", "C")
    assert not torn.endswith("}")


def test_a_dash_is_standard_error_and_no_other_log(capsys, caplog):
    caplog.set_level(logging.DEBUG)
    AccessLog("-").write(method="A", code="OK")
    output = capsys.readouterr()
    assert json.loads(output.err)["method"] == "A" and not output.out
    assert not caplog.records


def test_a_log_that_cannot_be_opened_is_a_startup_error(tmp_path):
    with pytest.raises(StartupError) as caught:
        AccessLog(str(tmp_path / "missing" / "access.log"))
    assert str(caught.value).startswith("--access-log: cannot write to ")
    assert str(caught.value).endswith("access.log: No such file or directory")
