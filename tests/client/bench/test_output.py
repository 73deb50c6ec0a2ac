"""Reports and comparisons as text and as HTML pages."""

import io
from collections import Counter

import pytest
from rich.console import Console

from gramophone_client.bench import table
from gramophone_client.bench.arrivals import ClosedLoop, OpenLoop
from gramophone_client.bench.html import page
from gramophone_client.bench.measure import LEFT, OK
from gramophone_client.bench.metrics import METRICS, format_number, pairs
from tests.support.bench_reports import make_report, make_sample, make_step, parse_page

METRIC = {metric.name: metric for metric in METRICS}


def test_steps_with_the_same_load_are_compared():
    before = make_report(make_step(ClosedLoop(1)), make_step(ClosedLoop(2)))
    after = make_report(make_step(ClosedLoop(4)), make_step(ClosedLoop(2), results=(0.5, 1.0, 1.5, 1.0, 1.0, 1.0)))
    (pair,) = pairs(before, after)
    assert pair.ratio(METRIC["throughput"]) == 2.0
    assert pair.ratio(METRIC["result p50"]) == pytest.approx(0.5, rel=0.02)
    assert pair.ratio(METRIC["failed"]) is None  # the divisor is 0
    assert list(table.differences(before, after)) == ["only one report has: 1 at a time, 4 at a time"]
    other = make_report(*before.steps, settings={"seed": 1, "mix": [{"name": "fast"}]})
    assert list(table.differences(before, other)) == [
        "the reports differ in mix",
        "the reports differ in seed: 0 and 1",
    ]


def test_repeated_steps_with_the_same_load_are_compared_in_order():
    twice = make_report(make_step(results=(1.0,)), make_step(ClosedLoop(2)), make_step(results=(1.0, 1.0)))
    assert [pair.ratio(METRIC["throughput"]) for pair in pairs(twice, twice)] == [1.0, 1.0, 1.0]
    assert list(table.differences(twice, twice)) == []
    once = make_report(make_step(results=(1.0, 1.0)), make_step(ClosedLoop(2)))
    for before, after in ((twice, once), (once, twice)):
        assert [pair.before.load for pair in pairs(before, after)] == [ClosedLoop(1), ClosedLoop(2)]
        assert list(table.differences(before, after)) == ["one report has more steps of: 1 at a time"]
    assert pairs(twice, once)[0].ratio(METRIC["throughput"]) == 2.0


def test_numbers_have_three_digits():
    formatted = [format_number(value) for value in (None, 0.0, 0.001234, 1.234, 123.4, 12345.6)]
    assert formatted == ["-", "0", "0.00123", "1.23", "123", "12346"]


@pytest.mark.parametrize("width", [24, 40, 60, 100, 200])
def test_the_table_fits_the_console(width):
    console = Console(width=width, file=io.StringIO())
    console.print(table.StepTable([make_step(), make_step(OpenLoop(2.0), refusals=3)]))
    lines = console.file.getvalue().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    assert "jobs/s" in lines[0] + lines[1]
    assert ("CPU" in lines[1]) == (width == 200)
    assert any("2 jobs/s" in line for line in lines)


@pytest.mark.parametrize(
    "names", [("old", "new"), ("results/of/yesterday/report.json", "results/of/today/report.json")]
)
def test_a_narrow_comparison_still_has_its_numbers(names):
    before, after = make_report(), make_report(make_step(results=(2.0, 4.0)))
    console = Console(width=40, file=io.StringIO())
    table.print_comparison(console, before, after, names)
    lines = console.file.getvalue().splitlines()
    assert all(len(line.rstrip()) <= 40 for line in lines)
    (throughput,) = (line for line in lines if "throughput" in line)
    assert throughput.split()[-3:] == ["0.3", "0.2", "0.67"]


def test_the_text_has_the_statuses_and_the_failures(capsys):
    table.print_report(Console(width=200), make_report(make_step(refusals=2, ending="interrupted")))
    out = capsys.readouterr().out
    assert "gramophone 1.2.3 on cpu (<test> & more), fp32, vgg19" in out
    assert "1 at a time: 3 OK, 2 QUEUE_FULL" in out
    assert "1 at a time: time to failure, s, p50/p95/p99/max: QUEUE_FULL 0.002/0.002/0.002/0.002" in out
    assert "interrupted before three windows agreed" in out


def test_the_page_is_self_contained():
    steps = [
        make_step(ClosedLoop(1)),
        make_step(ClosedLoop(2), refusals=3, began_s=4.0, ending="time is up"),
        make_step(OpenLoop(0.5), began_s=8.0, timeline=tuple(Counter({OK: 1, LEFT: 1}) for _ in range(500))),
    ]
    root = parse_page(page.report_page(make_report(*steps)))
    captions = [caption.text for caption in root.iter("figcaption")]
    assert captions.count("Throughput, jobs/s") == captions.count("Latency, s") == 2  # closed and open loop
    assert captions[-1] == "How the jobs ended, jobs/s"
    text = " ".join(root.itertext())
    assert "cpu (<test> & more)" in text
    assert "QUEUE_FULL: 1 at 4" in text  # the tooltip of a bar
    assert "prefers-color-scheme: dark" in text
    assert len(list(root.iter("svg"))) == 7
    for bar in root.iter("rect"):
        assert float(bar.get("width")) > 0 and float(bar.get("height")) >= 0


def test_jobs_cancelled_on_purpose_are_not_shown_as_lost():
    step = make_step(OpenLoop(1.0), results=(1.0,) * 8)
    for _ in range(2):
        step.tally.add(make_sample(5.0, status=LEFT))
    text = " ".join(parse_page(page.report_page(make_report(step))).itertext())
    # The tooltips of two dots.
    assert "completed: 0.8 at 1" in text and "completed, and cancelled on purpose: 1 at 1" in text
    other = make_report(make_step(OpenLoop(1.0)), make_step(ClosedLoop(1)))
    text = " ".join(parse_page(page.comparison_page(make_report(step), other, ("old", "new"))).itertext())
    assert "old, and cancelled on purpose: 1 at 1" in text and "new, and cancelled" not in text
    assert "on purpose" not in page.report_page(other)


def test_a_report_without_results_has_a_page():
    step = make_step(results=(), refusals=3, timeline=())
    text = " ".join(parse_page(page.report_page(make_report(step))).itertext())
    assert "no job was completed" in text and "Nothing was measured." in text


def test_the_page_of_a_comparison_marks_better_and_worse():
    before = make_report(make_step(), make_step(OpenLoop(1.0)))
    after = make_report(make_step(results=(2.0, 4.0, 6.0)), make_step(OpenLoop(2.0)))
    root = parse_page(page.comparison_page(before, after, ("old", "new <b>")))
    verdicts = {row[0].text: row[3].get("class") for row in root.iter("tr") if len(row) == 4}
    assert verdicts["result p50 "] == "worse" and verdicts["throughput "] is None
    text = " ".join(root.itertext())
    assert "new <b>" in text and "only one report has: 1 jobs/s, 2 jobs/s" in text


def test_reports_without_a_load_in_common_can_still_be_compared():
    html = page.comparison_page(make_report(), make_report(make_step(OpenLoop(1.0))), ("old", "new"))
    assert "only one report has" in " ".join(parse_page(html).itertext())
