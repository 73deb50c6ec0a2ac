"""The report: its JSON file and its notes."""

import functools
import io
import json
from collections import Counter

import pytest
from rich.console import Console

from gramophone_client.bench import table
from gramophone_client.bench.arrivals import ClosedLoop, OpenLoop
from gramophone_client.bench.html import page
from gramophone_client.bench.measure import OK, Tally
from gramophone_client.bench.report import InvalidReport, Report, Window, read_report
from tests.support.bench_reports import make_report, make_step, parse_page


def test_a_report_can_be_saved_and_read(tmp_path):
    path = tmp_path / "report.json"
    report = make_report(make_step(refusals=3), make_step(OpenLoop(0.5), server_after=(1, 16)))
    report.save(path)
    read = read_report(path)
    assert [step.as_json() for step in read.steps] == [step.as_json() for step in report.steps]
    assert (read.server, read.settings, read.began) == (report.server, report.settings, report.began)
    assert read.steps[0].tally.statuses == {OK: 3, "QUEUE_FULL": 3}
    assert read.steps[0].tally.failed_s["QUEUE_FULL"].count == 3
    assert [step.load for step in read.steps] == [ClosedLoop(1), OpenLoop(0.5)]


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"format": 1}', '{"format": 1, "steps": 3}', '{"format": {}}', "[" * 99_999, "\xff"]
)
def test_other_files_are_rejected(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InvalidReport, match=r"other.json: not a report written by `gramophone bench --json`"):
        read_report(path)


def value_paths(document, path=()):
    """Yields the path of every value of a JSON document, including objects and lists."""
    if isinstance(document, dict):
        items = document.items()
    else:
        items = enumerate(document) if isinstance(document, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from value_paths(value, (*path, key))


def steps_as_json(report: Report) -> list:
    return [step.as_json() for step in report.steps]


def test_a_report_with_one_wrong_value_is_rejected_or_can_be_shown(tmp_path):
    path = tmp_path / "wrong.json"
    make_report(make_step(refusals=1, windows=(Window(3.0, 3, 2.0),)), make_step(OpenLoop(0.5))).save(path)
    good, text = read_report(path), path.read_text()
    messages, shown = [], [steps_as_json(good)]
    for value_path in value_paths(json.loads(text)):
        for wrong in ("missing", None, "x", -1, 10**400, 1e300, float("nan"), [], {}, ["x"], {"x": "y"}, True):
            document = json.loads(text)
            *parents, key = value_path
            parent = functools.reduce(lambda value, key: value[key], parents, document)
            parent[key] = wrong
            if wrong == "missing":
                del parent[key]
            path.write_text(json.dumps(document))
            try:
                read = read_report(path)
            except InvalidReport as error:
                messages.append(str(error))
                continue
            if steps_as_json(read) in shown:
                continue
            shown.append(steps_as_json(read))
            table.print_comparison(Console(file=io.StringIO(), width=100), read, good, ("wrong", "good"))
            parse_page(page.comparison_page(good, read, ("good", "wrong")))
            parse_page(page.report_page(read))
    start = f"{path}: not a report written by `gramophone bench --json`: "
    for line in (
        "server.device is missing",
        "server.device must be a string, got None",
        "steps[0].windows[0].jobs must be a whole number, 0 or more, got -1",
        "steps[1].result_s.buckets must be a list, got 'x'",
        "a histogram of 3 durations has 0 in its buckets",
    ):
        assert start + line in messages


def test_a_report_of_a_later_format_is_rejected(tmp_path):
    (tmp_path / "later.json").write_text('{"format": 2}')
    with pytest.raises(InvalidReport, match="the report has format 2, but this version reads 1"):
        read_report(tmp_path / "later.json")


def test_notes_state_the_limits_of_the_measurement():
    assert make_step().notes() == []
    (note,) = make_step(ending="time is up").notes()
    assert note == "time is up before three windows agreed within 10 % (medians of the last windows: 2 s)"
    (note,) = make_step(is_warm=False, ending="time is up").notes()
    assert note == (
        "the step ended during its warm-up, so the values are those of the warm-up; use a longer --duration"
    )
    (note,) = make_step(is_warm=False, ending="interrupted").notes()
    assert note == "the step ended during its warm-up, so the values are those of the warm-up"
    (note,) = make_step(unfinished=4, oldest_unfinished_s=30.0).notes()
    assert note == "4 jobs had not ended when the step ended, the oldest after 30 s"
    (note,) = make_step(client_cpu=0.95).notes()
    assert "this client used 0.95 cores" in note
    (note,) = make_step(OpenLoop(1.0), late_s=2.0).notes()
    assert note == "a job was sent 2 s late; its latency counts from the time it was due"
    (note,) = make_step(server_before=(1, 2)).notes()
    assert "already had 1 running and 2 waiting jobs" in note


def test_a_step_without_a_successful_job_states_the_reason():
    def tally(**statuses: int) -> Tally:
        return Tally(seconds=4.0, statuses=Counter(statuses))

    for is_warm in (False, True):  # without a warm-up, a step is warm from its start
        fields = {"is_warm": is_warm, "ending": "time is up", "windows": (), "unfinished": 0}
        fields |= {"oldest_unfinished_s": 0.0, "timeline": ()}
        (note,) = make_step(tally=tally(QUEUE_FULL=12, LEFT=3, UNAVAILABLE=1), **fields).notes()
        assert note == (
            "no job succeeded: 12 failed with QUEUE_FULL, 3 cancelled on purpose, 1 failed with UNAVAILABLE"
        )
        (note,) = make_step(tally=tally(LEFT=9), **fields).notes()
        assert note == (
            "no job succeeded: 9 cancelled on purpose, as the mix requests; set cancel below 1 so that some can succeed"
        )
    fields |= {"timeline": (Counter({OK: 1}), Counter({"QUEUE_FULL": 2}))}
    (note,) = make_step(tally=tally(QUEUE_FULL=2), **fields).notes()
    assert note == "no job succeeded since the warm-up: 2 failed with QUEUE_FULL"
    # No job has ended at all: jobs may take longer than the step.
    fields = {"is_warm": False, "ending": "time is up", "windows": (), "unfinished": 2, "oldest_unfinished_s": 4.0}
    first, second = make_step(tally=tally(), **fields).notes()
    assert "use a longer --duration" in first
    assert second == "2 jobs had not ended when the step ended, the oldest after 4 s"
