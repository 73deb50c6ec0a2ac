import functools
import io
import json
import math
import xml.etree.ElementTree as ET
from collections import Counter
from itertools import islice, pairwise

import pytest
from rich.console import Console

from gramophone.recipe import LayerWeight, Recipe
from gramophone_client.bench import table
from gramophone_client.bench.arrivals import ClosedLoop, OpenLoop, poisson
from gramophone_client.bench.histogram import Histogram
from gramophone_client.bench.html import page
from gramophone_client.bench.measure import LEFT, OK, Recorder, Sample, Tally, megapixel_iterations
from gramophone_client.bench.metrics import METRICS, number, pairs
from gramophone_client.bench.pictures import synthetic
from gramophone_client.bench.report import BadReport, Report, Step, Window, read_report
from gramophone_client.bench.workload import BadMix, Kind, draws, read_mix
from gramophone_client.types.picture import Picture

METRIC = {metric.name: metric for metric in METRICS}


def sample(ended_s: float, seconds: float = 1.0, status: str = OK, **fields) -> Sample:
    """A job that was due so long before its end."""
    return Sample("fast", ended_s - seconds, ended_s=ended_s, status=status, **fields)


def make_step(load=ClosedLoop(1), results=(1.0, 2.0, 3.0), refusals=0, **fields) -> Step:  # noqa: B008  (frozen)
    tally = Tally(seconds=10.0, due=len(results) + refusals)
    for seconds in results:
        one = sample(5.0, seconds, megapixel_iterations=2.0)
        one.frame(5.0 - seconds / 2, 1000, dropped=0)
        one.frame(5.0 - seconds / 4, 1000, dropped=1)
        tally.add(one)
    for _ in range(refusals):
        tally.add(sample(5.0, 0.002, "QUEUE_FULL"))
    told = {"ending": "stable", "is_warm": True, "began_s": 0.0, "windows": (Window(3.0, 3, 2.0),), "tally": tally}
    told |= {"unfinished": 1, "oldest_unfinished_s": 0.5, "late_s": 0.01, "client_cpu": 0.25}
    told |= {"server_before": (0, 0), "server_after": None}
    told |= {"timeline": (Counter({OK: 2}), Counter({OK: 1, "QUEUE_FULL": 3}), Counter())}
    return Step(load=load, **told | fields)


def make_report(*steps: Step, **fields) -> Report:
    server = {"version": "1.2.3", "device": "cpu (<test> & more)", "precision": "fp32", "backbone": "vgg19"}
    told = {"began": "2026-01-01T00:00:00+00:00", "client": "1.2.3", "machine": "Linux", "settings": {"seed": 0}}
    return Report(server=server, steps=steps or (make_step(),), **told | fields)


# --- load


def test_arrivals_are_poisson_and_the_same_for_the_same_seed():
    assert list(islice(poisson(2.0, 7), 50)) == list(islice(poisson(2.0, 7), 50))
    assert next(poisson(2.0, 7)) != next(poisson(2.0, 8))
    moments = [0.0, *islice(poisson(2.0, 7), 20_000)]
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.03)
    # Of exponential gaps as many are longer than the mean, and than twice the mean, as e says.
    for times in (1, 2):
        assert sum(gap > times * mean for gap in gaps) / len(gaps) == pytest.approx(math.exp(-times), abs=0.02)


# --- histogram


def test_a_histogram_is_right_within_a_bucket():
    histogram = Histogram()
    durations = [0.000_03 * 1.01**i for i in range(1500)]  # 30 us to 90 s
    for seconds in durations:
        histogram.record(seconds)
    for share in (0.01, 0.5, 0.95, 0.99, 1.0):
        true = durations[math.ceil(share * len(durations)) - 1]
        assert histogram.quantile(share) == pytest.approx(true, rel=0.01, abs=2e-6)
    assert histogram.quantile(1.0) == histogram.max_s == durations[-1]
    assert histogram.total_s == pytest.approx(sum(durations))


def test_histograms_merge_and_travel():
    first, second, both = Histogram(), Histogram(), Histogram()
    for i in range(100):
        for one in (first if i % 3 else second, both):
            one.record(i / 7)
    first.merge(second)
    assert first.as_json()["buckets"] == both.as_json()["buckets"]
    assert Histogram.from_json(first.as_json()).as_json() == first.as_json()
    assert Histogram().quantile(0.5) is None
    assert Histogram.from_json(Histogram().as_json()).count == 0


def test_a_clock_that_steps_back_is_no_duration():
    histogram = Histogram()
    histogram.record(-1.0)
    assert (histogram.count, histogram.quantile(1.0)) == (1, 0.0)


# --- measure


def record(recorder: Recorder, *samples: Sample) -> None:
    for i, one in enumerate(samples):
        recorder.send(i, one.due_s, one.due_s)
        recorder.add(i, one)


def test_latency_counts_from_when_a_job_was_due():
    recorder = Recorder(OpenLoop(1.0), warm_up_s=0, window_s=10)
    recorder.send(1, due_s=1.0, sent_s=4.0)
    recorder.add(1, Sample("fast", 1.0, ended_s=5.0))
    assert recorder.measured(5.0).result_s.quantile(0.5) == pytest.approx(4.0, rel=0.01)
    assert recorder.late_s == 3.0


def test_three_windows_that_agree_are_the_measurement():
    recorder = Recorder(ClosedLoop(1), warm_up_s=4, window_s=3)
    record(recorder, *(sample(second + 1.0, 9.0) for second in range(4)))  # the warm-up: 0 to 4 s
    assert recorder.is_warm and not recorder.windows
    record(recorder, *(sample(5.0 + second, 2.0) for second in range(3)))  # 4 to 7 s, twice as slow as what follows
    record(recorder, *(sample(8.0 + second, 1.0) for second in range(6)))  # 7 to 13 s
    assert len(recorder.windows) == 3 and not recorder.is_stable
    assert recorder.measured(13.0).ok == 9  # all since the warm-up
    record(recorder, *(sample(14.0 + second, 1.05) for second in range(3)))
    assert recorder.is_stable
    measured = recorder.measured(20.0)
    assert (measured.ok, measured.seconds, measured.jobs_per_s) == (9, 9.0, 1.0)
    assert measured.result_s.max_s == pytest.approx(1.05)


def test_windows_that_hold_other_numbers_of_jobs_do_not_agree():
    recorder = Recorder(ClosedLoop(1), warm_up_s=0, window_s=3)
    record(recorder, *(sample(second) for second in (1, 2, 3, 4, 5, 6, 6.5, 7, 7.5, 8, 8.5, 9)))
    assert [window.ok for window in recorder.windows] == [3, 3, 6]
    assert not recorder.is_stable


def test_an_open_loop_is_not_stable_while_jobs_pile_up():
    def recorded(arriving: int) -> Recorder:
        recorder = Recorder(OpenLoop(10.0), warm_up_s=0, window_s=1)
        for i in range(60):
            for late in range(arriving):
                recorder.send(100 * i + late, i / 10, i / 10)
            recorder.add(100 * i, sample(i / 10))
        return recorder

    assert recorded(arriving=1).is_stable
    assert not recorded(arriving=2).is_stable


def test_only_good_jobs_end_a_window():
    recorder = Recorder(ClosedLoop(2), warm_up_s=1, window_s=1)
    record(recorder, sample(2.0), *(sample(3.0 + i, status="QUEUE_FULL") for i in range(9)))
    assert not recorder.is_warm
    record(recorder, sample(20.0))  # as many have ended as there are callers
    assert recorder.is_warm and not recorder.windows
    record(recorder, *(sample(21.0 + i, status="QUEUE_FULL") for i in range(9)))
    assert not recorder.windows and recorder.current.statuses == {"QUEUE_FULL": 9}
    assert [dict(second) for second in recorder.timeline[2:5]] == [{OK: 1}, {"QUEUE_FULL": 1}, {"QUEUE_FULL": 1}]


def test_a_step_without_an_end_of_its_warm_up_tells_that():
    recorder = Recorder(ClosedLoop(1), warm_up_s=100, window_s=1)
    record(recorder, sample(1.0), sample(2.0))
    assert not recorder.is_warm
    assert recorder.measured(4.0).jobs_per_s == 0.5


def test_work_is_counted_scale_by_scale():
    recipe = Recipe(size=64, smallest_size=32, iterations=5, coarse_iterations=3)  # 32, 45 and 64 pixels
    small, middle, full = (64 * 48 * (size / 64) ** 2 / 1e6 for size in (32, 45, 64))
    whole = megapixel_iterations(recipe, 64, 48, planned=11, done=11)
    assert whole == pytest.approx(3 * small + 3 * middle + 5 * full)
    assert megapixel_iterations(recipe, 64, 48, planned=11, done=4) == pytest.approx(3 * small + middle)
    # A thin picture has fewer scales, and leaves out the coarsest.
    assert megapixel_iterations(recipe, 64, 48, planned=8, done=4) == pytest.approx(3 * middle + full)


# --- mix

MIX = """
[[job]]
name = "thumbnail"
weight = 3
size = 128
cancel = 0.25

[[job]]
preset = "quality"
style_layers = { relu1_1 = 1, relu3_1 = 0.5 }
pooling = "average"
frames = false
deadline_s = 300
"""


@pytest.fixture
def mix_file(tmp_path):
    def write(text: str):
        path = tmp_path / "mix.toml"
        path.write_text(text)
        return path

    return write


def test_a_mix_file_holds_kinds_of_jobs(mix_file):
    thumbnail, other = read_mix(mix_file(MIX))
    assert (thumbnail.name, thumbnail.weight, thumbnail.cancel, thumbnail.frames) == ("thumbnail", 3, 0.25, True)
    assert thumbnail.recipe() == Recipe(size=128)
    assert (other.name, other.preset, other.frames, other.deadline_s) == ("job 2", "quality", False, 300)
    assert other.recipe().style_layers == (LayerWeight("relu1_1", 1), LayerWeight("relu3_1", 0.5))
    assert other.recipe().pooling == "average"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[job]\n", "mix.toml: not TOML: "),
        ("jobs = 3\n", "mix.toml: 'jobs' is not a key of a mix; allowed is [[job]], one for each kind"),
        ("", "mix.toml: a mix needs at least one [[job]]"),
        ("job = 3\n", "mix.toml: a mix needs at least one [[job]]"),
        ("[[job]]\nwieght = 3\n", "mix.toml: job 1: 'wieght' is not a key of a job; allowed are name, weight, preset,"),
        ("[[job]]\nwieght = 3\n", "and of a recipe content_layers,"),
        ("[[job]]\nweight = 0\n", "mix.toml: job 1: weight must be a number above 0, got 0"),
        ("[[job]]\nweight = inf\n", "weight must be a number above 0, got inf"),
        ("[[job]]\n[[job]]\ncancel = 1.5\n", "mix.toml: job 2: cancel must be a number from 0 to 1, got 1.5"),
        ("[[job]]\nframes = 1\n", "job 1: frames must be true or false, got 1"),
        ("[[job]]\nframe_every = -1\n", "frame_every must be a whole number of iterations, 0 or more, got -1"),
        ("[[job]]\npreset = 'slow'\n", "job 1: preset must be one of fast, quality, textbook, got 'slow'"),
        ("[[job]]\nsize = 64.5\n", "job 1: size must be a whole number, got 64.5"),
        ("[[job]]\nsize = 5\n", "job 1: size must be between 16 and 16384, got 5"),
        ("[[job]]\nbeta = 'much'\n", "job 1: beta must be a number, got 'much'"),
        ("[[job]]\noptimiser = 'sgd'\n", "optimiser must be one of gradient-descent, normalised-descent, adam, lbfgs,"),
        (
            "[[job]]\nstyle_layers = ['relu1_1']\n",
            "style_layers must be a table of layers and weights like { relu1_1 =",
        ),
        ("[[job]]\nname = 'a'\n[[job]]\nname = 'a'\n", "two jobs are called 'a'; give each a name of its own"),
    ],
)
def test_a_bad_mix_is_told_in_a_sentence(mix_file, text, said):
    with pytest.raises(BadMix) as caught:
        read_mix(mix_file(text))
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(mix_file(text)))


def test_kinds_come_by_weight_and_leave_by_share():
    mix = [Kind(name="often", weight=3, cancel=0.25), Kind(name="seldom")]
    drawn = list(islice(draws(mix, 5), 8000))
    assert drawn == list(islice(draws(mix, 5), 8000)) != list(islice(draws(mix, 6), 8000))
    often = [draw for draw in drawn if draw.kind.name == "often"]
    assert len(often) / len(drawn) == pytest.approx(0.75, abs=0.02)
    leaving = [draw.leave_at for draw in often if draw.leave_at is not None]
    assert len(leaving) / len(often) == pytest.approx(0.25, abs=0.02)
    assert min(leaving) < 0.05 and max(leaving) > 0.95
    assert not any(draw.leave_at is not None for draw in drawn if draw.kind.name == "seldom")


def test_synthetic_pictures_are_seeded():
    assert synthetic(1, 64) == synthetic(1, 64) != synthetic(2, 64)
    assert Picture("png", 64, 48, synthetic(1, 64)).image().size == (64, 48)


# --- report


def test_a_report_survives_its_file(tmp_path):
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
def test_another_file_is_no_report(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(BadReport, match=r"other.json: not a report that `gramophone bench --json` wrote"):
        read_report(path)


def places(told, path=()):
    """Where the values of a JSON document are, with its objects and lists."""
    for key, value in told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def figures(report: Report) -> list:
    return [step.as_json() for step in report.steps]


def test_a_report_with_one_thing_wrong_is_told_or_harmless(tmp_path):
    path = tmp_path / "wrong.json"
    make_report(make_step(refusals=1, windows=(Window(3.0, 3, 2.0),)), make_step(OpenLoop(0.5))).save(path)
    good, text = read_report(path), path.read_text()
    said, drawn = [], [figures(good)]
    for place in places(json.loads(text)):
        for wrong in ("gone", None, "x", -1, 10**400, 1e300, float("nan"), [], {}, ["x"], {"x": "y"}, True):
            told = json.loads(text)
            *folders, key = place
            inner = functools.reduce(lambda value, key: value[key], folders, told)
            inner[key] = wrong
            if wrong == "gone":
                del inner[key]
            path.write_text(json.dumps(told))
            try:
                read = read_report(path)
            except BadReport as error:
                said.append(str(error))
                continue
            if figures(read) in drawn:
                continue
            drawn.append(figures(read))
            table.print_comparison(Console(file=io.StringIO(), width=100), read, good, ("wrong", "good"))
            parsed(page.comparison_page(good, read, ("good", "wrong")))
            parsed(page.report_page(read))
    start = f"{path}: not a report that `gramophone bench --json` wrote: "
    for line in (
        "server.device is missing",
        "server.device must be a text, got None",
        "steps[0].windows[0].jobs must be a whole number, 0 or more, got -1",
        "steps[1].result_s.buckets must be a list, got 'x'",
        "a histogram of 3 durations has 0 in its buckets",
    ):
        assert start + line in said


def test_a_report_of_a_later_version_is_told(tmp_path):
    (tmp_path / "later.json").write_text('{"format": 2}')
    with pytest.raises(BadReport, match="a report of format 2, and this version reads 1"):
        read_report(tmp_path / "later.json")


def test_notes_say_what_the_figures_leave_out():
    assert make_step().notes() == []
    (note,) = make_step(ending="time is up").notes()
    assert note == "time is up before three windows agreed within 10 % (medians of the last ones: 2 s)"
    (note,) = make_step(is_warm=False, ending="time is up").notes()
    assert note == "the warm-up had not ended, so these are its figures; allow more --duration"
    (note,) = make_step(is_warm=False, ending="interrupted").notes()
    assert note == "the warm-up had not ended, so these are its figures"
    (note,) = make_step(unfinished=4, oldest_unfinished_s=30.0).notes()
    assert note == "not ended in time: 4, the oldest after 30 s"
    (note,) = make_step(client_cpu=0.95).notes()
    assert "this client kept 0.95 cores busy" in note
    (note,) = make_step(OpenLoop(1.0), late_s=2.0).notes()
    assert note == "a job was sent 2 s late; its latency counts from when it was due"
    (note,) = make_step(server_before=(1, 2)).notes()
    assert "others had 1 running and 2 waiting" in note


def test_a_step_without_a_result_says_why_and_not_to_wait():
    def tally(**statuses: int) -> Tally:
        return Tally(seconds=4.0, statuses=Counter(statuses))

    for is_warm in (False, True):  # without a warm-up a step is warm from its beginning
        told = {"is_warm": is_warm, "ending": "time is up", "windows": (), "unfinished": 0, "oldest_unfinished_s": 0.0}
        told |= {"timeline": ()}
        (note,) = make_step(tally=tally(QUEUE_FULL=12, LEFT=3, UNAVAILABLE=1), **told).notes()
        assert note == "no job has ended well: 12 failed with QUEUE_FULL, 3 left on purpose, 1 failed with UNAVAILABLE"
        (note,) = make_step(tally=tally(LEFT=9), **told).notes()
        assert note == (
            "no job has ended well: 9 left on purpose, as the mix asks; a cancel below 1 lets some come to a result"
        )
    told |= {"timeline": (Counter({OK: 1}), Counter({"QUEUE_FULL": 2}))}
    (note,) = make_step(tally=tally(QUEUE_FULL=2), **told).notes()
    assert note == "no job has ended well since the warm-up: 2 failed with QUEUE_FULL"
    # Nothing has ended at all: jobs may be longer than the step.
    told = {"is_warm": False, "ending": "time is up", "windows": (), "unfinished": 2, "oldest_unfinished_s": 4.0}
    first, second = make_step(tally=tally(), **told).notes()
    assert "allow more --duration" in first and second == "not ended in time: 2, the oldest after 4 s"


# --- compare


def test_ratios_are_of_the_same_load():
    before = make_report(make_step(ClosedLoop(1)), make_step(ClosedLoop(2)))
    after = make_report(make_step(ClosedLoop(4)), make_step(ClosedLoop(2), results=(0.5, 1.0, 1.5, 1.0, 1.0, 1.0)))
    (pair,) = pairs(before, after)
    assert pair.ratio(METRIC["throughput"]) == 2.0
    assert pair.ratio(METRIC["result p50"]) == pytest.approx(0.5, rel=0.02)
    assert pair.ratio(METRIC["failed"]) is None  # nothing to divide by
    assert list(table.differences(before, after)) == ["only one of them has: 1 at a time, 4 at a time"]
    other = make_report(*before.steps, settings={"seed": 1, "mix": [{"name": "fast"}]})
    assert list(table.differences(before, other)) == ["they differ in mix", "they differ in seed: 0 and 1"]


def test_a_load_that_was_tried_again_is_compared_in_order():
    again = make_report(make_step(results=(1.0,)), make_step(ClosedLoop(2)), make_step(results=(1.0, 1.0)))
    assert [pair.ratio(METRIC["throughput"]) for pair in pairs(again, again)] == [1.0, 1.0, 1.0]
    assert list(table.differences(again, again)) == []
    once = make_report(make_step(results=(1.0, 1.0)), make_step(ClosedLoop(2)))
    for before, after in ((again, once), (once, again)):
        assert [pair.before.load for pair in pairs(before, after)] == [ClosedLoop(1), ClosedLoop(2)]
        assert list(table.differences(before, after)) == ["one of them has more often: 1 at a time"]
    assert pairs(again, once)[0].ratio(METRIC["throughput"]) == 2.0


def test_numbers_have_three_digits():
    shown = [number(value) for value in (None, 0.0, 0.001234, 1.234, 123.4, 12345.6)]
    assert shown == ["-", "0", "0.00123", "1.23", "123", "12346"]


# --- text and page


@pytest.mark.parametrize("width", [24, 40, 60, 100, 200])
def test_the_table_is_as_wide_as_there_is_room(width):
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
def test_a_narrow_comparison_still_has_its_figures(names):
    before, after = make_report(), make_report(make_step(results=(2.0, 4.0)))
    console = Console(width=40, file=io.StringIO())
    table.print_comparison(console, before, after, names)
    lines = console.file.getvalue().splitlines()
    assert all(len(line.rstrip()) <= 40 for line in lines)
    (throughput,) = (line for line in lines if "throughput" in line)
    assert throughput.split()[-3:] == ["0.3", "0.2", "0.67"]


def test_the_text_counts_what_went_wrong(capsys):
    table.print_report(Console(width=200), make_report(make_step(refusals=2, ending="interrupted")))
    out = capsys.readouterr().out
    assert "gramophone 1.2.3 on cpu (<test> & more), fp32, vgg19" in out
    assert "1 at a time: 3 OK, 2 QUEUE_FULL" in out
    assert "1 at a time: failed after s p50/p95/p99/max: QUEUE_FULL 0.002/0.002/0.002/0.002" in out
    assert "interrupted before three windows agreed" in out


def parsed(html: str) -> ET.Element:
    """The page, which is XML too, after a look at whether it needs anything from elsewhere."""
    assert html.startswith("<!DOCTYPE html>\n")
    for outside in ("http:", "https:", "//", "src=", "href=", "url(", "@import", "<script", "<link"):
        assert outside not in html.replace("&lt;", "")
    return ET.fromstring(html.split("\n", 1)[1])


def test_the_page_stands_alone():
    steps = [
        make_step(ClosedLoop(1)),
        make_step(ClosedLoop(2), refusals=3, began_s=4.0, ending="time is up"),
        make_step(OpenLoop(0.5), began_s=8.0, timeline=tuple(Counter({OK: 1, LEFT: 1}) for _ in range(500))),
    ]
    root = parsed(page.report_page(make_report(*steps)))
    captions = [caption.text for caption in root.iter("figcaption")]
    assert captions.count("Throughput, jobs/s") == captions.count("Latency, s") == 2  # of each loop
    assert captions[-1] == "What became of the jobs, jobs/s"
    words = " ".join(root.itertext())
    assert "cpu (<test> & more)" in words
    assert "QUEUE_FULL: 1 at 4" in words  # the tip of a bar
    assert "prefers-color-scheme: dark" in words
    assert len(list(root.iter("svg"))) == 7
    for bar in root.iter("rect"):
        assert float(bar.get("width")) > 0 and float(bar.get("height")) >= 0


def test_jobs_that_were_left_on_purpose_do_not_look_lost():
    step = make_step(OpenLoop(1.0), results=(1.0,) * 8)
    for _ in range(2):
        step.tally.add(sample(5.0, status=LEFT))
    words = " ".join(parsed(page.report_page(make_report(step))).itertext())
    assert "done: 0.8 at 1" in words and "done, with those left on purpose: 1 at 1" in words  # the tips of two dots
    other = make_report(make_step(OpenLoop(1.0)), make_step(ClosedLoop(1)))
    words = " ".join(parsed(page.comparison_page(make_report(step), other, ("old", "new"))).itertext())
    assert "old, with those left on purpose: 1 at 1" in words and "new, with those" not in words
    assert "on purpose" not in page.report_page(other)


def test_a_page_of_nothing_is_a_page():
    step = make_step(results=(), refusals=3, timeline=())
    words = " ".join(parsed(page.report_page(make_report(step))).itertext())
    assert "nothing was finished" in words and "Nothing was measured." in words


def test_the_page_of_a_comparison_judges():
    before = make_report(make_step(), make_step(OpenLoop(1.0)))
    after = make_report(make_step(results=(2.0, 4.0, 6.0)), make_step(OpenLoop(2.0)))
    root = parsed(page.comparison_page(before, after, ("old", "new <b>")))
    judged = {row[0].text: row[3].get("class") for row in root.iter("tr") if len(row) == 4}
    assert judged["result p50 "] == "worse" and judged["throughput "] is None
    words = " ".join(root.itertext())
    assert "new <b>" in words and "only one of them has: 1 jobs/s, 2 jobs/s" in words


def test_reports_without_a_load_in_common_can_still_be_compared():
    html = page.comparison_page(make_report(), make_report(make_step(OpenLoop(1.0))), ("old", "new"))
    assert "only one of them has" in " ".join(parsed(html).itertext())
