import asyncio
import errno
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from gramophone.recipe import Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import GramophoneClient, cli
from gramophone_client.bench import command, display, report, run
from gramophone_client.bench.arrivals import ClosedLoop, OpenLoop
from gramophone_client.bench.measure import Recorder
from gramophone_client.bench.report import Step, read_report
from gramophone_client.bench.run import Bench, Pictures, Plan
from gramophone_client.bench.workload import BadMix, Kind
from gramophone_client.errors import DeadlineExceeded
from gramophone_client.types.picture import write_whole
from gramophone_server import errors as server_errors
from tests.client.bench.test_report import parsed
from tests.support.fake_service import HANG, accepted, encoded, frame, progress, refused

PICTURES = Pictures(encoded("red"), (encoded("yellow"),))
FULL = refused(server_errors.QueueFull(16, 16, retry_after_s=0.0))


@pytest.fixture(autouse=True)
def hasty(monkeypatch, tmp_path):
    """Refused callers come back soon, nobody waits for the fake's one running job to end, and files land in a folder."""
    monkeypatch.setattr(run, "LEAST_PAUSE_S", 0.001)
    monkeypatch.setattr(run, "SETTLE_S", 0.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FAST = Kind(name="fast")


@pytest.fixture
def gramophone(service, monkeypatch, capsys):
    """Runs a command against the fake service: (exit code, standard output, lines of standard error)."""
    monkeypatch.setenv("GRAMOPHONE_SERVER", service.target)

    def run(command: str):
        try:
            code = cli.main(command.split())
        except SystemExit as left:  # argparse
            code = left.code
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


def plan(*loads, mix=(FAST,), **fields) -> Plan:
    told = {"warm_up_s": 0.0, "window_s": 60.0, "duration_s": 60.0, "deadline_s": 10.0}
    return Plan(loads=loads, mix=mix, pictures=lambda _: PICTURES, **told | fields)


async def benched(service, plan: Plan) -> list[Step]:
    async with GramophoneClient(service.target, retries=False) as client:
        bench = Bench(plan)
        await bench.run(client)
        return bench.steps


@pytest.fixture
def bench(service, monkeypatch):
    """The first step of the plan, interrupted after so many jobs, whatever time they take."""

    def run(plan: Plan, jobs: int = 6) -> Step:
        async def interrupted() -> list[Step]:
            add, task = Recorder.add, asyncio.current_task()

            def counting(self, number, sample):
                add(self, number, sample)
                if sum(map(Counter.total, self.timeline)) == jobs:
                    task.cancel()

            monkeypatch.setattr(Recorder, "add", counting)
            return await benched(service, plan)

        (step,) = asyncio.run(interrupted())
        assert step.ending == "interrupted" and step.tally.ended >= jobs
        return step

    return run


@pytest.mark.parametrize("callers", [1, 3])
def test_a_closed_loop_keeps_as_many_jobs_as_it_has_callers(service, bench, callers):
    step = bench(plan(ClosedLoop(callers)))
    tally = step.tally
    assert tally.statuses == {"OK": tally.ended}
    assert (tally.frames, tally.frames_dropped) == (2 * tally.ended, 4 * tally.ended)
    assert tally.first_frame_s.count == tally.frame_gap_s.count == tally.result_s.count == tally.ended
    assert tally.bytes_received > 0 and tally.megapixel_iterations > 0
    assert step.server_before == step.server_after == (1, 0)
    assert step.unfinished <= callers
    assert sum(map(Counter.total, step.timeline)) == tally.ended


def test_steps_follow_each_other_until_their_time_is_up(service):
    first, second = asyncio.run(benched(service, plan(ClosedLoop(1), OpenLoop(50.0), duration_s=0.1)))
    assert (first.load, first.ending) == (ClosedLoop(1), "time is up")
    assert (second.load, second.ending) == (OpenLoop(50.0), "time is up")
    assert second.began_s > first.began_s


def test_each_job_has_a_seed_of_its_own(service, bench):
    bench(plan(ClosedLoop(2)))
    seeds = [spec.seed for spec in service.specs]
    assert len(set(seeds)) == len(seeds) > 1
    assert service.specs[0].content.data == PICTURES.content


def test_a_step_ends_when_it_is_stable(service, monkeypatch):
    monkeypatch.setattr(Recorder, "_is_stable", lambda self: len(self.windows) == 3)
    (step,) = asyncio.run(benched(service, plan(ClosedLoop(1), window_s=0.001)))
    assert step.ending == "stable"
    assert len(step.windows) == 3 and all(window.jobs >= 3 for window in step.windows)
    assert step.tally.ok == sum(window.jobs for window in step.windows)


def test_refusals_are_counted_by_reason_and_not_retried(service, bench):
    service.scripts = [[FULL]]
    step = bench(plan(ClosedLoop(2)))
    assert set(step.tally.statuses) == {"QUEUE_FULL"}
    assert step.tally.failed == step.tally.ended
    # One call for each, but for those that were on their way at the end.
    assert step.tally.ended <= len(service.specs) <= step.tally.ended + 2
    assert not step.tally.result_s.count


def test_unary_calls_are_not_retried_either(service, bench):
    service.scripts = [[FULL]]
    bench(plan(OpenLoop(100.0), mix=[Kind(name="fast", frames=False)]))
    assert len(service.request_ids) == len(set(service.request_ids)) >= 6


def test_a_status_without_a_reason_is_grpcs(service, bench):
    service.scripts = [[accepted(), frame(10), HANG]]
    step = bench(plan(ClosedLoop(1), mix=[Kind(name="fast", deadline_s=1.0)]), jobs=1)
    assert set(step.tally.statuses) == {"DEADLINE_EXCEEDED"}
    assert step.tally.first_frame_s.count == 1  # what came was seen


def test_the_unary_call_has_no_frames(service, bench):
    step = bench(plan(ClosedLoop(1), mix=[Kind(name="fast", frames=False)]))
    assert step.tally.ok > 0 and step.tally.megapixel_iterations > 0
    assert step.tally.frames == 0 and not any(spec.HasField("frames") for spec in service.specs)


def test_kinds_reach_the_request(service, bench):
    mix = [Kind(name="small", preset="quality", overrides={"size": 64}, frame_every=3, frame_size=32)]
    step = bench(plan(ClosedLoop(1), mix=mix))
    spec = service.specs[0]
    assert (spec.recipe.preset, spec.recipe.size) == (pb.PRESET_QUALITY, 64)
    assert (spec.frames.every_iterations, spec.frames.max_side) == (3, 32)
    assert list(step.tally.by_kind) == ["small"]


def test_jobs_are_left_as_often_as_the_mix_asks(service, bench):
    service.scripts = [[accepted(), progress(300), HANG]]  # whoever does not leave would wait
    step = bench(plan(ClosedLoop(2), mix=[Kind(name="fast", cancel=1.0)]))
    assert set(step.tally.statuses) == {"LEFT"}
    assert step.tally.failed == 0 and step.tally.megapixel_iterations > 0


def test_a_job_that_is_to_be_left_is_streamed_even_without_frames(service, bench):
    service.scripts = [[accepted(), progress(300), HANG]]
    step = bench(plan(ClosedLoop(1), mix=[Kind(name="fast", cancel=1.0, frames=False)]))
    assert set(step.tally.statuses) == {"LEFT"}
    assert not any(spec.HasField("frames") for spec in service.specs)


def test_an_open_loop_counts_from_the_schedule(service, bench, monkeypatch):
    stream, blocked = GramophoneClient.stream, []

    def blocking(self, *args, **kwargs):
        if not blocked:
            blocked.append(True)
            time.sleep(0.3)  # so that the next jobs, due every few milliseconds, cannot be sent
        return stream(self, *args, **kwargs)

    monkeypatch.setattr(GramophoneClient, "stream", blocking)
    step = bench(plan(OpenLoop(100.0)))
    assert step.late_s > 0.1
    assert step.tally.result_s.max_s > 0.1  # though each took a few milliseconds from when it was sent


def test_a_server_that_stands_still_holds_up_no_step(service, monkeypatch):
    told, asked = GramophoneClient.server_info, []

    async def stuck(self, *, timeout_s=10.0):
        asked.append(timeout_s)
        if len(asked) == 1:  # in the beginning
            return await told(self)
        await asyncio.sleep(timeout_s)
        raise DeadlineExceeded("no answer")

    monkeypatch.setattr(GramophoneClient, "server_info", stuck)
    monkeypatch.setattr(run, "LOAD_S", 0.05)
    steps = asyncio.run(benched(service, plan(ClosedLoop(1), ClosedLoop(2), duration_s=0.1)))
    assert asked[1:] == [0.05] * 4
    assert [(step.server_before, step.server_after) for step in steps] == [(None, None)] * 2
    assert all("the server did not say what others had there before this step" in step.notes() for step in steps)
    assert all(step.tally.ok for step in steps)


def test_an_invalid_job_ends_the_bench(service):
    service.scripts = [[refused(server_errors.InvalidRequest([Violation("spec.recipe.size", "must be at most 2048")]))]]
    with pytest.raises(BadMix, match=r"the server takes no job like 'fast': .*must be at most 2048"):
        asyncio.run(benched(service, plan(ClosedLoop(2))))


@pytest.mark.parametrize("width", [30, 100])
def test_the_display_fits_and_goes(service, monkeypatch, width):
    monkeypatch.setattr(display, "REFRESH_S", 0.01)
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=30, legacy_windows=False)

    async def show() -> None:
        async with GramophoneClient(service.target, retries=False) as client:
            bench = Bench(plan(ClosedLoop(1), OpenLoop(50.0), duration_s=0.3))
            async with display.shown(bench, console):
                await bench.run(client)

    asyncio.run(show())
    out = console.file.getvalue()
    assert "step 1 of 2" in out and "step 2 of 2" in out
    assert ("result p50" in out) == (width == 100)


def test_a_pipe_gets_no_display(service):
    console = Console(file=io.StringIO(), width=100)

    async def show() -> None:
        async with display.shown(None, console):
            pass

    asyncio.run(show())
    assert console.file.getvalue() == ""


# --- the command

QUICK = "bench --warm-up 0 --window 10 --duration 0.3"


def test_the_command_writes_its_reports(gramophone, service, hasty):
    code, out, err = gramophone(f"{QUICK} --concurrency 1,2 --rate 20 --size 64 --json a.json --html a.html")
    assert (code, err) == (0, [])
    assert out.startswith("gramophone 1.2.3 on cpu (a test), fp32, vgg19")
    assert "1 at a time" in out and "20 jobs/s" in out
    report = read_report(hasty / "a.json")
    assert [str(step.load) for step in report.steps] == ["1 at a time", "2 at a time", "20 jobs/s"]
    assert report.settings["mix"][0]["overrides"] == {"size": 64}
    assert report.server["version"] == "1.2.3" and "presets" not in report.server
    assert "jobs_per_s" in json.loads((hasty / "a.json").read_text())["steps"][0]
    parsed((hasty / "a.html").read_text())
    assert service.specs[0].content.data != service.specs[0].styles[0].image.data

    code, out, _ = gramophone("bench --compare a.json a.json --html b.html")
    assert code == 0
    assert "throughput, jobs/s" in out and "1.00" in out
    parsed((hasty / "b.html").read_text())


def test_the_command_takes_pictures_and_a_mix(gramophone, service, hasty):
    (hasty / "photo.png").write_bytes(PICTURES.content)
    (hasty / "painting.png").write_bytes(PICTURES.styles[0])
    (hasty / "mix.toml").write_text('[[job]]\nname = "a"\nsize = 64\n[[job]]\nname = "b"\n')
    code, _, _ = gramophone(f"{QUICK} photo.png painting.png --mix mix.toml --preset quality --beta 5 --json a.json")
    assert code == 0
    assert {spec.content.data for spec in service.specs} == {PICTURES.content}
    assert {(spec.recipe.preset, spec.recipe.beta) for spec in service.specs} == {(pb.PRESET_QUALITY, 5.0)}
    settings = read_report(hasty / "a.json").settings
    assert [kind["name"] for kind in settings["mix"]] == ["a", "b"]
    assert settings["pictures"] == ["photo.png", "painting.png"]


def test_an_interrupt_ends_the_bench_and_reports(gramophone, service, hasty, monkeypatch):
    add, jobs = Recorder.add, []

    def interrupting(self, number, sample):
        add(self, number, sample)
        jobs.append(sample)
        if len(jobs) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recorder, "add", interrupting)
    code, out, err = gramophone("bench --warm-up 0 --concurrency 1,2 --json a.json")
    assert (code, err) == (130, ["gramophone: interrupted"])
    assert "1 at a time: interrupted before three windows agreed" in out
    (step,) = read_report(hasty / "a.json").steps
    assert step.ending == "interrupted" and step.tally.ok >= 3


def test_a_server_that_goes_away_leaves_what_was_measured(gramophone, service, hasty, monkeypatch):
    told, asked = GramophoneClient.server_info, []

    async def failing(self, **kwargs):
        asked.append(True)
        if len(asked) > 2:  # in the beginning, before the first step, and now after it
            self.target = "127.0.0.1:1"
            await self.close()
        return await told(self, **kwargs)

    monkeypatch.setattr(GramophoneClient, "server_info", failing)
    code, out, err = gramophone(f"{QUICK} --concurrency 1,2")
    assert code == 5 and len(err) == 1
    assert "1 at a time" in out and "2 at a time" not in out


@pytest.mark.parametrize("lost", ["json", "html"])
def test_a_file_that_cannot_be_written_costs_neither_the_table_nor_the_other(gramophone, hasty, monkeypatch, lost):
    def full(path, data):
        if Path(path).suffix == f".{lost}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_whole(path, data)

    for module in (command, report):
        monkeypatch.setattr(module, "write_whole", full)
    code, out, err = gramophone(f"{QUICK} --concurrency 1 --json a.json --html a.html")
    assert code == 2 and "1 at a time" in out
    assert err == [
        f"gramophone: a.{lost}: not written: No space left on device",
        "gramophone: not all files of the report are written; the table above has its figures",
    ]
    assert {path.name for path in hasty.iterdir()} == {"a.json", "a.html"} - {f"a.{lost}"}


def test_a_table_that_cannot_be_printed_costs_no_file(gramophone, hasty, monkeypatch):
    def full(write):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command, "_print", full)
    code, _, err = gramophone(f"{QUICK} --concurrency 1 --json a.json --html a.html")
    assert (code, err) == (2, ["gramophone: [Errno 28] No space left on device"])
    assert {path.name for path in hasty.iterdir()} == {"a.json", "a.html"}


def test_names_that_the_output_cannot_say_cost_nothing(gramophone, hasty, monkeypatch):
    (hasty / "mix.toml").write_text('[[job]]\nname = "na\u00efve"\n[[job]]\nname = "b"\n', encoding="utf-8")
    named = os.fsdecode(b"\xff.json")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert gramophone(f"{QUICK} --mix mix.toml --concurrency 1 --json a.json")[0] == 0
    (hasty / "a.json").rename(named)
    assert gramophone(f"bench --compare {named} {named} --html b.html")[0] == 0
    assert b"na?ve" in out.buffer.getvalue() and b"?.json: gramophone 1.2.3" in out.buffer.getvalue()
    parsed((hasty / "b.html").read_text())


def test_a_page_of_a_comparison_that_cannot_be_written_is_told_after_the_table(gramophone, hasty, monkeypatch):
    gramophone(f"{QUICK} --concurrency 1 --json a.json")

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(command, "write_whole", full)
    code, out, err = gramophone("bench --compare a.json a.json --html b.html")
    assert code == 2 and "throughput, jobs/s" in out
    assert err[0] == "gramophone: b.html: not written: No space left on device"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--json adir", "adir: --json needs a file of its own, and this is a folder; name another"),
        ("--html adir/..", "adir/..: --html needs a file of its own, and this is a folder; name another"),
        ("--json -", "-: --json needs a file of its own, and this is where the table or the display goes; name anoth"),
        ("--json a.txt", "a.txt: --json needs a file of its own, and this is where the table or the display goes; "),
        ("--json pipe", "pipe: --json needs a file of its own, and this is a device or a pipe; name another"),
        ("--json same --html ./same", "same: --html needs a file of its own, and this is that of --json; name another"),
        ("--mix b.toml --html b.toml", "b.toml: --html needs a file of its own, and this is an input; name another"),
        ("--compare b.toml c --html link", "link: --html needs a file of its own, and this is an input; name another"),
        ("--json /proc/a.json", "/proc/a.json: no file can be made there (No such file or directory); name another"),
        (f"--json {'a' * 250}", ": no file can be made there (File name too long); name another for --json"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_anything_is_measured(
    gramophone, service, hasty, monkeypatch, flags, said
):
    (hasty / "adir").mkdir()
    (hasty / "b.toml").write_text("[[job]]\n")
    (hasty / "link").symlink_to("b.toml")
    os.mkfifo(hasty / "pipe")
    with (hasty / "a.txt").open("w") as redirected:
        real = os.fstat
        monkeypatch.setattr(os, "fstat", lambda stream: real(redirected.fileno() if stream == 1 else stream))
        before = sorted(hasty.rglob("*"))
        code, out, err = gramophone(f"{QUICK} --concurrency 1 {flags}")
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("gramophone: ") and said in err[0]
    assert sorted(hasty.rglob("*")) == before and not service.specs


def test_a_report_that_is_read_only_is_not_replaced(gramophone, service, hasty, monkeypatch):
    (hasty / "a.json").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # these tests may be root's, who may write all
    code, _, err = gramophone(f"{QUICK} --concurrency 1 --json a.json")
    said = "gramophone: a.json: --json needs a file of its own, and this is read-only; name another"
    assert (code, err) == (2, [said])
    assert (hasty / "a.json").read_text() == "old" and not service.specs


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--concurrency 0", "argument --concurrency: expected whole numbers from 1 to 1024 like 1,2,4, got '0'"),
        ("--rate 1,nan", "argument --rate: expected jobs/s above 0, at most 1000, like 0.5,1,2, got 'nan'"),
        ("--window 0", "argument --window: must be a number of seconds above 0, got '0'"),
        ("--warm-up -1", "argument --warm-up: must be a number of seconds, 0 or more, got '-1'"),
        ("photo.png", "gramophone: photo.png: a content needs a style after it; name both, or neither"),
        ("--mix none.toml", "gramophone: none.toml: No such file or directory"),
        ("--size 5", "gramophone: --size: must be between 16 and 16384, got 5"),
        ("--html no/a.html", "gramophone: no/a.html: there is no folder no; make it first"),
        ("--compare a.json b.json", "gramophone: a.json: No such file or directory"),
        ("--compare a b --json c", "gramophone: --json: a comparison is told as text and with --html"),
    ],
)
def test_bad_flags_are_told_in_a_sentence(gramophone, service, flags, said):
    code, out, err = gramophone(f"bench {flags}")
    assert (code, out) == (2, "")
    assert said in err[-1]
    assert not service.specs
