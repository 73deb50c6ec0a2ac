"""The command `gramophone bench`: its outputs, and the errors in its flags and files."""

import errno
import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import AsyncGramophoneClient
from gramophone_client.bench import command, report
from gramophone_client.bench.measure import Recorder
from gramophone_client.bench.report import read_report
from gramophone_client.types.picture import write_atomically
from tests.support.bench_reports import parse_page
from tests.support.fake_service import encoded

CONTENT, STYLE = encoded("red"), encoded("yellow")
QUICK = "bench --warm-up 0 --window 10 --duration 0.3"


def test_the_command_writes_its_reports(gramophone, service, folder):
    code, out, err = gramophone(f"{QUICK} --concurrency 1,2 --rate 20 --size 64 --json a.json --html a.html")
    assert (code, err) == (0, [])
    assert out.startswith("gramophone 1.2.3 on cpu (a test), fp32, vgg19")
    assert "1 at a time" in out and "20 jobs/s" in out
    report = read_report(folder / "a.json")
    assert [str(step.load) for step in report.steps] == ["1 at a time", "2 at a time", "20 jobs/s"]
    assert report.settings["mix"][0]["overrides"] == {"size": 64}
    assert report.server["version"] == "1.2.3" and "presets" not in report.server
    assert "jobs_per_s" in json.loads((folder / "a.json").read_text())["steps"][0]
    parse_page((folder / "a.html").read_text())
    assert service.specs[0].content.data != service.specs[0].styles[0].image.data

    code, out, _ = gramophone("bench --compare a.json a.json --html b.html")
    assert code == 0
    assert "throughput, jobs/s" in out and "1.00" in out
    parse_page((folder / "b.html").read_text())


def test_the_command_takes_pictures_and_a_mix(gramophone, service, folder):
    (folder / "photo.png").write_bytes(CONTENT)
    (folder / "painting.png").write_bytes(STYLE)
    (folder / "mix.toml").write_text('[[job]]\nname = "a"\nsize = 64\n[[job]]\nname = "b"\n')
    code, _, _ = gramophone(f"{QUICK} photo.png painting.png --mix mix.toml --preset quality --beta 5 --json a.json")
    assert code == 0
    assert {spec.content.data for spec in service.specs} == {CONTENT}
    assert {(spec.recipe.preset, spec.recipe.beta) for spec in service.specs} == {(pb.PRESET_QUALITY, 5.0)}
    settings = read_report(folder / "a.json").settings
    assert [kind["name"] for kind in settings["mix"]] == ["a", "b"]
    assert settings["pictures"] == ["photo.png", "painting.png"]


def test_an_interrupt_ends_the_bench_with_a_report(gramophone, service, folder, monkeypatch):
    record_end, jobs = Recorder.record_end, []

    def interrupting(self, number, sample):
        record_end(self, number, sample)
        jobs.append(sample)
        if len(jobs) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recorder, "record_end", interrupting)
    code, out, err = gramophone("bench --warm-up 0 --concurrency 1,2 --json a.json")
    assert (code, err) == (130, ["gramophone: interrupted"])
    assert "1 at a time: interrupted before three windows agreed" in out
    (step,) = read_report(folder / "a.json").steps
    assert step.ending == "interrupted" and step.tally.ok >= 3


def test_completed_steps_are_reported_if_the_server_becomes_unreachable(gramophone, service, folder, monkeypatch):
    server_info, calls = AsyncGramophoneClient.server_info, []

    async def failing(self, **kwargs):
        calls.append(kwargs)
        if len(calls) > 2:  # after the calls at the start and before the first step
            await self.close()
        return await server_info(self, **kwargs)

    monkeypatch.setattr(AsyncGramophoneClient, "server_info", failing)
    code, out, err = gramophone(f"{QUICK} --concurrency 1,2")
    assert code == 5 and len(err) == 1
    assert "1 at a time" in out and "2 at a time" not in out


@pytest.mark.parametrize("lost", ["json", "html"])
def test_the_table_and_other_files_survive_a_file_that_cannot_be_written(gramophone, folder, monkeypatch, lost):
    def full(path, data):
        if Path(path).suffix == f".{lost}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_atomically(path, data)

    for module in (command, report):
        monkeypatch.setattr(module, "write_atomically", full)
    code, out, err = gramophone(f"{QUICK} --concurrency 1 --json a.json --html a.html")
    assert code == 2 and "1 at a time" in out
    assert err == [
        f"gramophone: a.{lost}: not written: No space left on device",
        "gramophone: not all files of the report were written; the table above has the results",
    ]
    assert {path.name for path in folder.iterdir()} == {"a.json", "a.html"} - {f"a.{lost}"}


def test_the_files_are_written_if_the_table_cannot_be_printed(gramophone, folder, monkeypatch):
    class FullDisk(io.StringIO):
        encoding = "utf-8"

        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", FullDisk())
    code, _, err = gramophone(f"{QUICK} --concurrency 1 --json a.json --html a.html")
    assert (code, err) == (2, ["gramophone: [Errno 28] No space left on device"])
    assert {path.name for path in folder.iterdir()} == {"a.json", "a.html"}


def test_names_outside_the_output_encoding_are_printed_with_question_marks(gramophone, folder, monkeypatch):
    (folder / "mix.toml").write_text('[[job]]\nname = "na\u00efve"\n[[job]]\nname = "b"\n', encoding="utf-8")
    named = os.fsdecode(b"\xff.json")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert gramophone(f"{QUICK} --mix mix.toml --concurrency 1 --json a.json")[0] == 0
    (folder / "a.json").rename(named)
    assert gramophone(f"bench --compare {named} {named} --html b.html")[0] == 0
    assert b"na?ve" in out.buffer.getvalue() and b"?.json: gramophone 1.2.3" in out.buffer.getvalue()
    parse_page((folder / "b.html").read_text())


def test_a_comparison_page_that_cannot_be_written_is_reported_after_the_table(gramophone, folder, monkeypatch):
    gramophone(f"{QUICK} --concurrency 1 --json a.json")

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(command, "write_atomically", full)
    code, out, err = gramophone("bench --compare a.json a.json --html b.html")
    assert code == 2 and "throughput, jobs/s" in out
    assert err[0] == "gramophone: b.html: not written: No space left on device"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--json adir", "adir: --json needs its own file, and this is a folder; name another file"),
        ("--html adir/..", "adir/..: --html needs its own file, and this is a folder; name another file"),
        ("--json -", "-: --json needs its own file, and this is standard output or error; name another file"),
        ("--json a.txt", "a.txt: --json needs its own file, and this is standard output or error; name another file"),
        ("--json pipe", "pipe: --json needs its own file, and this is a device or a pipe; name another file"),
        ("--json same --html ./same", "same: --html needs its own file, and this is the file of --json; name another"),
        ("--mix b.toml --html b.toml", "b.toml: --html needs its own file, and this is an input; name another file"),
        ("--compare b.toml c --html link", "link: --html needs its own file, and this is an input; name another file"),
        ("--json /proc/a.json", "/proc/a.json: cannot create a file there (No such file or directory); name another"),
        (f"--json {'a' * 250}", ": cannot create a file there (File name too long); name another file for --json"),
    ],
)
def test_files_that_cannot_be_written_are_rejected_before_the_measurement(
    gramophone, service, folder, monkeypatch, flags, message
):
    (folder / "adir").mkdir()
    (folder / "b.toml").write_text("[[job]]\n")
    (folder / "link").symlink_to("b.toml")
    os.mkfifo(folder / "pipe")
    with (folder / "a.txt").open("w") as redirected:
        fstat = os.fstat
        monkeypatch.setattr(os, "fstat", lambda stream: fstat(redirected.fileno() if stream == 1 else stream))
        before = sorted(folder.rglob("*"))
        code, out, err = gramophone(f"{QUICK} --concurrency 1 {flags}")
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("gramophone: ") and message in err[0]
    assert sorted(folder.rglob("*")) == before and not service.specs


def test_a_report_that_is_read_only_is_not_replaced(gramophone, service, folder, monkeypatch):
    (folder / "a.json").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, which may write any file
    code, _, err = gramophone(f"{QUICK} --concurrency 1 --json a.json")
    assert (code, err) == (
        2,
        ["gramophone: a.json: --json needs its own file, and this is read-only; name another file"],
    )
    assert (folder / "a.json").read_text() == "old" and not service.specs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--concurrency 0", "argument --concurrency: expected whole numbers from 1 to 1024 like 1,2,4, got '0'"),
        ("--rate 1,nan", "argument --rate: expected jobs/s above 0, at most 1000, like 0.5,1,2, got 'nan'"),
        ("--window 0", "argument --window: must be a number of seconds above 0, got '0'"),
        ("--warm-up -1", "argument --warm-up: must be a number of seconds, 0 or more, got '-1'"),
        ("photo.png", "gramophone: photo.png: a content image needs at least one style image; give both or neither"),
        ("--mix none.toml", "gramophone: none.toml: No such file or directory"),
        ("--size 5", "gramophone: --size: must be between 16 and 16384, got 5"),
        ("--html no/a.html", "gramophone: no/a.html: there is no folder no; create it first"),
        ("--compare a.json b.json", "gramophone: a.json: No such file or directory"),
        ("--compare a b --json c", "gramophone: --json: a comparison can only be written with --html"),
    ],
)
def test_invalid_flags_fail_with_a_clear_message(gramophone, service, flags, message):
    code, out, err = gramophone(f"bench {flags}")
    assert (code, out) == (2, "")
    assert message in err[-1]
    assert not service.specs
