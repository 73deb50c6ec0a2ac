import asyncio
import datetime
import json
import logging
import os
import shutil

import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.errors import StartupError
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


def test_a_log_that_was_moved_away_is_created_again(tmp_path):
    path = tmp_path / "access.log"
    access = AccessLog(str(path))
    access.write(method="A")
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
    assert [record.message.partition(": ")[0] for record in caplog.records] == [
        "the access log cannot be written; calls are missing from it from now on",
        "the access log cannot be closed",
    ]
    assert all(record.message.endswith("No space left on device") for record in caplog.records)
    assert capsys.readouterr().err == ""


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
